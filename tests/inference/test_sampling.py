"""Sampling against the `rwkv` package where it is right, and the right answer where it is not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.utils import PIPELINE

from rwkv_nb.inference import sampling
from rwkv_nb.inference.sampling import SamplingArgs, filter_probs, sample_logits

pytestmark = pytest.mark.usefixtures("one_thread")


def package_probs(monkeypatch, logits, temperature, top_p, top_k):
    """The probabilities that the package draws from, caught at the draw."""
    caught = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: caught.append(p) or 0)
    PIPELINE.sample_logits(object.__new__(PIPELINE), logits.clone(), temperature, top_p, top_k)
    return torch.from_numpy(caught[0]).double()


def logits(V=200, seed=0, spread=2.5):
    return spread * torch.randn(V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("top_k", [0, 1, 5, 60, 200, 999])
def test_equal_to_the_package(monkeypatch, temperature, top_p, top_k):
    for seed in range(3):
        x = logits(seed=seed)
        theirs = package_probs(monkeypatch, x, temperature, top_p, top_k)
        ours = filter_probs(x, temperature, top_p, top_k)
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-9)


def test_large_vocabulary_equal_to_the_package(monkeypatch):
    x = logits(65536, spread=4.0)
    torch.testing.assert_close(
        filter_probs(x, 0.8, 0.9), package_probs(monkeypatch, x, 0.8, 0.9, 0), rtol=1e-4, atol=1e-9
    )


def test_top_p_one_keeps_everything(monkeypatch):
    x = logits(65536, spread=1.0)
    p = filter_probs(x, 1.0, 1.0)
    torch.testing.assert_close(p, torch.softmax(x.double(), 0))
    generator = torch.Generator().manual_seed(0)
    draws = {sample_logits(x, SamplingArgs(top_p=1.0), generator) for _ in range(50)}
    assert len(draws) > 45
    # What it is not to repeat: rounding makes the package's choice among 65536 tokens a choice among one or few.
    kept = [int((package_probs(monkeypatch, logits(65536, s, 1.0), 1.0, 1.0, 0) > 0).sum()) for s in range(6)]
    assert 1 in kept


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-30, 5e-324])
def test_cold_is_arg_max_without_nan(temperature):
    x = logits()
    p = filter_probs(x, temperature, 1.0)
    assert p.isfinite().all() and float(p[x.argmax()]) == pytest.approx(1.0, abs=1e-6)


def test_where_the_package_divides_zero_by_zero_or_keeps_too_many(monkeypatch):
    """What it is not to repeat, so that a repaired package is noticed."""
    with np.errstate(invalid="ignore"):
        assert package_probs(monkeypatch, logits(), 1e-3, 0.85, 0).isnan().all()
    assert filter_probs(logits(), 1e-3, 0.85).isfinite().all()
    assert int((package_probs(monkeypatch, torch.zeros(8), 1.0, 0.5, 0) > 0).sum()) == 8
    assert int((filter_probs(torch.zeros(8), 1.0, 0.5) > 0).sum()) == 4


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.1, 12), st.sampled_from([1.0, 1 - 1e-9, 1 - 1e-7]))
def test_near_one_top_p_keeps_everything_that_matters(seed, spread, top_p):
    x = logits(5000, seed, spread)
    kept = filter_probs(x, 1.0, top_p) > 0
    p = torch.softmax(x.double(), 0)
    assert float(p[kept].sum()) >= top_p - 1e-12 and (top_p < 1 or bool(kept.all()))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    st.floats(1e-6, 5), st.floats(0, 1), st.integers(0, 40),
)  # fmt: skip
def test_always_probabilities_that_keep_the_order(values, temperature, top_p, top_k):
    x = torch.tensor(values)
    p = filter_probs(x, temperature, top_p, top_k)
    assert p.isfinite().all() and float(p.sum()) == pytest.approx(1) and int((p > 0).sum()) <= (top_k or len(x))
    log_p = torch.log_softmax(x.double(), 0)  # logits 1e-25 apart have equal probabilities: then the lower id is first
    order = torch.sort(log_p, descending=True, stable=True).indices  # what is cut is the end of this list
    assert not (p[order].diff() > 1e-12).any() and p[order[0]] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_as_on_the_processor():
    x = torch.stack([logits(seed=s) for s in range(4)])
    there = filter_probs(x.cuda(), 0.7, 0.8, 9)
    assert there.is_cuda and torch.equal(there.cpu(), filter_probs(x, 0.7, 0.8, 9))
    args = SamplingArgs(token_ban=(int(x[0].argmax()),))
    draws = [sample_logits(y, args, torch.Generator().manual_seed(5)) for y in (x, x.cuda())]
    assert draws[0] == draws[1]


def test_hot_is_uniform():
    p = filter_probs(logits(), 1e9, 1.0)
    torch.testing.assert_close(p, torch.full_like(p, 1 / 200), rtol=1e-6, atol=0)


def test_ties_are_cut_by_id():
    x = torch.zeros(8)
    assert torch.nonzero(filter_probs(x, 1.0, 0.5)).flatten().tolist() == [0, 1, 2, 3]
    assert torch.nonzero(filter_probs(x, 1.0, 1.0, 3)).flatten().tolist() == [0, 1, 2]
    assert filter_probs(x, 0.0).tolist() == [1] + [0] * 7
    x[6] = 1.0
    assert torch.nonzero(filter_probs(x, 1.0, 1.0, 3)).flatten().tolist() == [0, 1, 6]


def by_definition(x, temperature, top_p, top_k):
    """The shortest list of likeliest tokens that reaches top_p, cut to top_k, sharpened: token by token."""
    p = torch.softmax(x.double(), 0).tolist()
    kept, total = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        kept.append(i)
        total += p[i]
        if total >= top_p or len(kept) == top_k:
            break
    weights = {i: p[i] ** (1 / temperature) for i in kept}
    return [weights.get(i, 0.0) / sum(weights.values()) for i in range(len(p))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30),
    st.floats(0.2, 3),
    st.sampled_from([0.0, 0.3, 0.77, 0.95]),
    st.integers(0, 8),
)
def test_by_definition(values, temperature, top_p, top_k):
    x = torch.tensor(values)
    got = filter_probs(x, temperature, top_p, top_k).tolist()
    assert got == pytest.approx(by_definition(x, temperature, top_p, top_k), abs=1e-9)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 6.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.0, 0), (0.5, 0), (0.85, 0), (0.85, 7), (1.0, 300), (0.999, 3000)])
def test_a_large_vocabulary_is_cut_as_a_small_one(monkeypatch, spread, top_p, top_k):
    x = torch.round(4 * logits(5000, seed=1, spread=spread)) / 4  # many are equal, at the cut too
    fast = filter_probs(x, 0.8, top_p, top_k)
    monkeypatch.setattr(sampling, "LARGE", 10**9)
    assert torch.equal(fast, filter_probs(x, 0.8, top_p, top_k))


def test_draws_from_a_large_vocabulary_follow_the_probabilities():
    x = torch.full((2, 9000), -math.inf)
    places = [17, 4000, 8999], [5, 17, 8000]  # no row alone tells which tokens are left
    x[0, places[0]], x[1, places[1]] = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]).log()
    args, generator, n = SamplingArgs(top_p=1.0), torch.Generator().manual_seed(1), 400
    rows = np.array([sample_logits(x, args, generator) for _ in range(n)]).T
    rows = [*rows, np.array([sample_logits(x[0], args, generator) for _ in range(n)])]
    for drawn, row in zip(rows, (0, 1, 0), strict=True):
        counts = np.bincount(drawn, minlength=9000)[places[row]]
        assert counts.sum() == n
        assert np.abs(counts / n - x[row, places[row]].exp().numpy()).max() < 0.11  # more than four standard deviations


def test_draws_follow_the_probabilities():
    x = logits(6, seed=3, spread=1.0)
    args = SamplingArgs(temperature=0.7, top_p=0.9)
    generator = torch.Generator().manual_seed(0)
    n = 4000
    counts = np.bincount([sample_logits(x, args, generator) for _ in range(n)], minlength=6)
    p = filter_probs(x, 0.7, 0.9).numpy()
    assert (np.abs(counts / n - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()
    assert (counts[p == 0] == 0).all() and (p == 0).any()


def test_generator_repeats_and_logits_stay():
    x = logits()
    before = x.clone()
    args = SamplingArgs(top_p=1.0, token_ban=(int(x.argmax()),))
    draws = [[sample_logits(x, args, torch.Generator().manual_seed(s)) for s in range(30)] for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) > 5
    assert torch.equal(x, before)


def test_banned_tokens_are_never_drawn():
    x = logits(5)
    first, second = x.argsort(descending=True)[:2].tolist()
    assert sample_logits(x, SamplingArgs(temperature=0), None) == first
    assert sample_logits(x, SamplingArgs(temperature=0, token_ban=[first]), None) == second
    with pytest.raises(ValueError, match="every token is banned"):
        sample_logits(x, SamplingArgs(token_ban=range(5)))
    with pytest.raises(ValueError, match="token_ban holds 5, the vocabulary ends at 4"):
        sample_logits(x, SamplingArgs(token_ban=(5,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type(dtype):
    assert float(filter_probs(logits().to(dtype)).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_named(bad):
    x = logits()
    x[3] = bad
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        filter_probs(x)
    with pytest.raises(ValueError, match="must be a row"):
        filter_probs(torch.zeros(2, 2, 3))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"top_k": -1},
        {"top_k": 2.5},
        {"alpha_frequency": math.inf},
        {"alpha_presence": math.nan},
        {"alpha_decay": 1.1},
        {"token_ban": (-1,)},
        {"token_stop": ("\n",)},
        {"chunk_len": 0},
    ],
)
def test_bad_settings_are_named(bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"SamplingArgs: {name} = "):
        SamplingArgs(**bad)


def test_rows_are_what_each_is_alone():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    together = filter_probs(logits, 0.7, 0.8, 9)
    assert together.shape == (5, 40)
    assert all(torch.equal(together[i], filter_probs(logits[i], 0.7, 0.8, 9)) for i in range(5))
    args = SamplingArgs(temperature=0, token_ban=(int(logits[2].argmax()),))
    drawn = sample_logits(logits, args)
    assert drawn == [sample_logits(row, args) for row in logits] and drawn[2] not in args.token_ban
    assert filter_probs(logits[:0]).shape == (0, 40)

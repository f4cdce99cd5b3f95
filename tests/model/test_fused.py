"""The fused parts of a layer: against their definitions, a formula written by hand, and finite differences."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rwkv_nb.model import elementwise, fused
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.loss import l2wrap_cross_entropy
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.wkv import build

EPS = 64e-5
SHAPES = [(2, 37, 3, 8), (1, 2, 1, 4), (40, 3, 2, 16), (3, 70, 2, 64)]  # B, T, H, N
NAMES = ["mix4", "mix2", "normed_gate", "relu2", "gate"]

pytestmark = pytest.mark.skipif(build.find_cxx() is None, reason="no C++ compiler: the definitions run")


def inputs(name, shape, scale=1.0):
    """float64 tensors for one function."""
    B, T, H, N = shape
    g = torch.Generator().manual_seed(len(name) + sum(shape))

    def random(*size):
        return scale * torch.randn(*size, generator=g, dtype=torch.float64)

    D = H * N
    return {
        "mix4": lambda: [random(B, T, D), random(B, D), *(random(1, 1, D) for _ in range(4))],
        "mix2": lambda: [random(B, T, D), random(B, D), *(random(1, 1, D) for _ in range(2))],
        "normed_gate": lambda: [random(B, T, H, N), random(B, T, D), random(D), random(D)],
        "relu2": lambda: [random(B, T, D)],
        "gate": lambda: [random(B, T, D), random(B, T, D)],
    }[name]()


def call(name, tensors, plain=False, **options):
    """The outputs as a tuple."""
    base = name.rstrip("24") if name.startswith("mix") else name
    extra = (EPS,) if name == "normed_gate" else ()
    out = getattr(fused, ("plain_" if plain else "") + base)(*tensors, *extra, **options)
    return out if isinstance(out, tuple) else (out,)


def results(name, tensors, plain=False, **options):
    """Outputs and gradients, in float64; what comes from above is random, the same for every way."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outs = call(name, leaves, plain, **options)
    g = torch.Generator().manual_seed(5)
    above = [torch.randn(out.shape, generator=g).to(out.dtype) for out in outs]
    grads = torch.autograd.grad(outs, leaves, above)
    return [x.detach().double() for x in (*outs, *grads)]


def error(got, truth):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, truth, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition(name, shape):
    tensors = inputs(name, shape)
    truth = results(name, tensors, plain=True)
    assert error(results(name, tensors), truth) < 1e-13
    assert error(results(name, [x.float() for x in tensors]), truth) < 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name):
    leaves = [x.requires_grad_() for x in inputs(name, (2, 5, 2, 4))]
    assert torch.autograd.gradcheck(lambda *x: call(name, x), leaves)


def test_a_formula_written_by_hand():
    B, T, H, N = 2, 4, 2, 4
    x, before, *mixes = inputs("mix4", (B, T, H, N))
    outs = fused.mix(x, before, *mixes)
    y, g, weight, bias = inputs("normed_gate", (B, T, H, N))
    z = fused.normed_gate(y, g, weight, bias, EPS)
    r, v = inputs("gate", (B, T, H, N))
    gated, squared = fused.gate(r, v), fused.relu2(r)
    for b in range(B):
        for t in range(T):
            for c in range(H * N):
                now, past = float(x[b, t, c]), float(x[b, t - 1, c] if t else before[b, c])
                for out, mix in zip(outs, mixes, strict=True):
                    m = float(mix[0, 0, c])
                    assert float(out[b, t, c]) == pytest.approx(m * now + (1 - m) * past, rel=1e-12, abs=1e-14)
                head = y[b, t, c // N].tolist()
                mean = sum(head) / N
                deviation = math.sqrt(sum((a - mean) ** 2 for a in head) / N + EPS)
                normed = (head[c % N] - mean) / deviation * float(weight[c]) + float(bias[c])
                silu = float(g[b, t, c]) / (1 + math.exp(-float(g[b, t, c])))
                assert float(z[b, t, c]) == pytest.approx(normed * silu, rel=1e-11, abs=1e-14)
                a = float(r[b, t, c])
                assert float(gated[b, t, c]) == pytest.approx(float(v[b, t, c]) / (1 + math.exp(-a)), rel=1e-12)
                assert float(squared[b, t, c]) == (a * a if a > 0 else 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_products(name):
    """Under autocast what goes into a product is rounded once; arithmetic and parameters stay float32."""
    tensors = inputs(name, (2, 37, 2, 32))
    narrow = [x.bfloat16().double() for x in tensors]  # numbers that bfloat16 can hold
    given = [x.float() if name.startswith("mix") or x.dim() == 1 else x.bfloat16() for x in narrow]
    options = {"dtype": torch.float32} if name == "gate" else {}
    with torch.autocast("cpu", torch.bfloat16):
        outs = call(name, given, **options)
        got = results(name, given, **options)
    assert all(out.dtype == (torch.float32 if name == "gate" else torch.bfloat16) for out in outs)
    g = torch.Generator().manual_seed(5)
    leaves = [x.requires_grad_() for x in narrow]
    truth = call(name, leaves, plain=True)
    above = [torch.randn(out.shape, generator=g).to(out.dtype).double() for out in outs]
    truth = [x.detach() for x in (*truth, *torch.autograd.grad(truth, leaves, above))]
    assert error(got, truth) < 2**-8


def test_rounding_to_bfloat16_is_that_of_torch():
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3e38, 3.4e38, math.inf, math.nan, 1e-40])
    x = x.expand(1, 2, 9).contiguous()
    x.view(torch.int32)[..., 8] = 0x7FFFFFFF  # a NaN that would overflow
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = fused.mix(x, x[:, 0], torch.ones(1, 1, 9), torch.zeros(1, 1, 9))
    assert torch.equal(first[..., :6], x[..., :6].bfloat16()) and first[..., 7:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_numbers(dtype):
    x = torch.tensor([-1e4, -200.0, -89.0, -1e-30, 0.0, 1e-30, 89.0, 200.0, 1e4], dtype=dtype)
    x = x.expand(1, 2, 9).contiguous()
    for name, tensors in (("gate", [x, x]), ("relu2", [x])):
        got, truth = results(name, tensors), results(name, [t.double() for t in tensors], plain=True)
        assert all(a.isfinite().all() for a in got)
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-18)  # below 1e-19 a float's square, and its root, is 0
    bad = x.clone()
    bad[0, 1, 3] = math.nan
    for out in (fused.gate(bad, x), fused.gate(x, bad), fused.relu2(bad)):
        assert out[0, 1, 3].isnan() and out.isnan().sum() == 1


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_gives_the_same_bits(name):
    tensors = [x.float() for x in inputs(name, (3, 300, 2, 32))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(name, tensors)
        torch.set_num_threads(3)
        three = results(name, tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_turned_tensors(name):
    """Inputs and gradients that do not lie in order."""
    tensors = inputs(name, (2, 6, 2, 4))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in tensors]
    assert error(results(name, turned), results(name, tensors, plain=True)) < 1e-13
    leaves = [x.requires_grad_() for x in tensors]
    outs = call(name, leaves)
    above = [torch.arange(out.numel()).to(out.dtype).view(out.transpose(0, 1).shape).transpose(0, 1) for out in outs]
    plain = call(name, leaves, plain=True)
    got, truth = torch.autograd.grad(outs, leaves, above), torch.autograd.grad(plain, leaves, above)
    assert error(got, truth) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_from_above_stays_what_it_was(name):
    """The kernels may overwrite it: autograd's nodes give them a copy."""
    leaves = [x.requires_grad_() for x in inputs(name, (2, 6, 2, 4))]
    outs = call(name, leaves)
    above = [torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out) for out in outs]
    kept = [x.clone() for x in above]
    torch.autograd.grad(outs, leaves, above)
    assert all(torch.equal(a, b) for a, b in zip(above, kept, strict=True))


class Counted:
    def __init__(self, monkeypatch):
        self.calls, run = 0, elementwise.run

        def counting(*arguments, **options):
            self.calls += 1
            return run(*arguments, **options)

        monkeypatch.setattr(elementwise, "run", counting)


def test_where_the_kernel_runs_and_where_the_definition(monkeypatch):
    counted = Counted(monkeypatch)
    x, before, *mixes = (t.float() for t in inputs("mix2", (2, 5, 1, 4)))
    fused.mix(x, before, *mixes)
    assert counted.calls == 1
    fused.mix(x[:, :1], before, *mixes)  # one step of generation
    fused.mix(x.half(), before, *(m.half() for m in mixes))
    with torch.autocast("cpu", torch.float16):
        fused.mix(x, before, *mixes)
    fused.mix(x.to("meta"), before.to("meta"), *(m.to("meta") for m in mixes))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fused.mix(mode.from_tensor(x), mode.from_tensor(before), *(mode.from_tensor(m) for m in mixes))
    torch.compile(fused.mix, backend="eager", fullgraph=True)(x, before, *mixes)
    assert counted.calls == 1
    monkeypatch.setattr(elementwise, "library", lambda: None)
    fused.mix(x, before, *mixes)
    assert counted.calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_without_a_compiler_is_the_same_model(dtype, monkeypatch):
    config = ModelConfig(3, 64, 19, head_size_a=16)
    g = torch.Generator().manual_seed(1)
    weights = {name: x + 0.1 * torch.randn(x.shape, generator=g) for name, x in init_weights(config, seed=0).items()}
    model = RWKV(config, {name: x.to(dtype) for name, x in weights.items()})
    idx, targets = (torch.randint(0, 19, (2, 21), generator=g) for _ in range(2))
    state = [torch.randn(s.shape, generator=g).to(s) for s in model.new_state(2)]
    found = []
    counted = Counted(monkeypatch)
    for library in (elementwise.library, lambda: None):
        monkeypatch.setattr(elementwise, "library", library)
        twin = copy.deepcopy(model)
        carried = [s.clone().requires_grad_() for s in state]
        logits, after = twin(idx, carried)
        (l2wrap_cross_entropy(logits, targets) + sum(s.sum() for s in after) / 100).backward()
        found.append([logits.detach(), *after, *(p.grad for p in twin.parameters()), *(s.grad for s in carried)])
    assert counted.calls == 2 * 3 * 5  # forward and backward of five functions in three layers
    for a, b in zip(*found, strict=True):
        close = 1e-11 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(a, b, rtol=close, atol=close * float(b.detach().abs().max()))

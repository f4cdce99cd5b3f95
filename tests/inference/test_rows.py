"""Rows: stop strings, several texts at once, and stopping from outside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.inference.generation import generate, generate_batch
from rwkv_nb.inference.row import Row
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV

CHARS = CharTokenizer.from_text("\n abcdefghij")
V = CHARS.vocab_size


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RWKV(ModelConfig(2, 64, V, head_size_a=16))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_never_shown_and_nothing_before_them_is_lost(text, stop):
    row, shown, tokens = Row(CHARS, V, 1000, SamplingArgs(), stop), [], CHARS.encode(text)
    for token in tokens:
        shown.append(row.take(token))
        assert "".join(shown) == row.text and not any(s in row.text for s in stop)
        if row.over:
            break
    shown.append(row.finish())
    # Truth: the shortest beginning of the text that holds a stop string, cut where the first of these begins.
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)]
    want, by = text, None
    if ends:
        read = text[: ends[0]]
        at, by = min((read.find(s), -len(s), s) for s in stop if s in read)[::2]
        want = read[:at]
    assert row.text == "".join(shown) == want and row.stopped_by == by
    assert len(row.tokens) == (ends[0] if ends else len(text))


def test_a_stop_string_ends_generation_and_the_state_has_read_it(model):
    free = generate(model, CHARS, "ab", 60, generator=rng(3))
    whole = "".join(free)
    stop = whole[20:23]
    g = generate(model, CHARS, "ab", 60, generator=rng(3), stop=[stop])
    assert "".join(g) == g.text == whole[: whole.find(stop)] and g.stopped_by == stop
    assert CHARS.decode(g.tokens).endswith(stop)
    again = model(torch.tensor([CHARS.encode("ab") + g.tokens]), None)[1]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(g.state, again, strict=True))


def test_cancel_ends_it_with_a_state_to_go_on_from(model):
    g = generate(model, CHARS, "ab", 1000, generator=rng())
    pieces = []
    for piece in g:
        pieces.append(piece)
        if len(g.tokens) == 7:
            g.cancel()
    assert len(g.tokens) == 7 and "".join(pieces) == g.text and g.stopped_by is None
    assert list(g) == []


class During:
    """A model that calls a function while it works: the moment at which another thread would act."""

    training = False

    def __init__(self, model, function):
        self.model, self.config, self.emb, self.function = model, model.config, model.emb, function

    def __call__(self, idx, state, **rest):
        self.function(idx)
        return self.model(idx, state, **rest)


def test_cancel_while_the_model_works_is_not_lost(model):
    def cancel_at_the_fifth(idx):
        if len(g.tokens) == 4 and idx.shape[1] == 1:
            g.cancel()

    g = generate(During(model, cancel_at_the_fifth), CHARS, "ab", 1000, generator=rng())
    assert "".join(g) == g.text and len(g.tokens) == 5
    again = model(torch.tensor([CHARS.encode("ab") + g.tokens]), None)[1]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(g.state, again, strict=True))


def test_cancel_ends_the_reading_of_a_prompt_at_its_chunk(model):
    g = generate(During(model, lambda idx: g.cancel()), CHARS, "abcdefghij" * 50, 5, SamplingArgs(chunk_len=7))
    assert list(g) == [] and g.tokens == []
    again = model(torch.tensor([CHARS.encode("abcdefg")]), None)[1]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(g.state, again, strict=True))
    never = generate(model, CHARS, "ab", 5)
    never.cancel()
    assert list(never) == [] and never.state is None


def test_one_prompt_is_read_once_and_continued_many_times(model):
    read = []
    counted = During(model, lambda idx: read.append(idx.numel()))
    start = generate(counted, CHARS, "abc def", 0)
    assert list(start) == [] and sum(read) == 7
    branches = [
        generate(counted, CHARS, "", 10, state=start.state, logits=start.logits, generator=rng(i)) for i in range(3)
    ]
    texts = ["".join(g) for g in branches]
    assert sum(read) == 7 + 3 * 10
    alone = ["".join(generate(model, CHARS, "abc def", 10, generator=rng(i))) for i in range(3)]
    assert texts == alone and len(set(texts)) == 3
    rows = generate_batch(counted, CHARS, [""] * 3, 10, states=[start.state] * 3, logits=[start.logits] * 3,
                          generators=[rng(i) for i in range(3)])  # fmt: skip
    assert [row.text for row in rows] == texts and sum(read) == 7 + 2 * 3 * 10
    for g, row in zip(branches, rows, strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(g.state, row.state, strict=True))


def test_an_empty_prompt_after_a_state_begins_a_new_text(model):
    first = generate(model, CHARS, "abc", 0)
    list(first)
    anew = "".join(generate(model, CHARS, "", 20, state=first.state, generator=rng()))
    assert anew == "".join(generate(model, CHARS, "abc\n", 20, generator=rng()))
    with pytest.raises(ValueError, match="logits are given without the state"):
        generate(model, CHARS, "", 5, logits=torch.zeros(V))


def test_penalties_can_be_asked_for(model):
    args = SamplingArgs(alpha_presence=0.5, alpha_frequency=0.25, alpha_decay=0.5)
    row, [a, space] = Row(CHARS, V, 9, args), CHARS.encode("a ")
    for token in (a, space, a, space):
        row.count(token)
    lost = torch.zeros(V) - row.penalised(torch.zeros(V))
    assert lost[a] == pytest.approx(0.5 + 0.25 * (1 * 0.5**3 + 1 * 0.5)) and lost[space] == pytest.approx(0.5)
    assert lost.count_nonzero() == 2


def test_a_batch_writes_what_each_row_would_alone(model):
    prompts, args = ["", "abc", "a b c d e f", "j\n"], SamplingArgs(token_stop=(CHARS.encode("h")[0],))
    alone = [generate(model, CHARS, text, 40, args, generator=rng(i), stop=["aa"]) for i, text in enumerate(prompts)]
    texts = ["".join(g) for g in alone]
    rows = generate_batch(model, CHARS, prompts, 40, args, generators=[rng(i) for i in range(4)], stop=["aa"])
    assert [row.text for row in rows] == texts and len({len(row.tokens) for row in rows}) > 1  # they end at other steps
    for row, g in zip(rows, alone, strict=True):
        assert row.tokens == g.tokens and row.stopped_by == g.stopped_by
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(row.state, g.state, strict=True))


def test_a_batch_goes_on_from_states(model):
    first = generate_batch(model, CHARS, ["abc", "de"], 5, generators=[rng(0), rng(1)])
    more = generate_batch(model, CHARS, ["f", "g"], 5, states=[r.state for r in first], generators=[rng(2), rng(3)])
    one = generate(model, CHARS, "g", 5, state=first[1].state, generator=rng(3))
    assert "".join(one) == more[1].text
    assert generate_batch(model, CHARS, [], 5) == []


def test_what_is_wrong_is_said(model):
    with pytest.raises(ValueError, match="stop = 'ab' must be a list of texts"):
        generate(model, CHARS, "a", 5, stop="ab")
    with pytest.raises(ValueError, match="at least one character"):
        generate(model, CHARS, "a", 5, stop=[""])
    with pytest.raises(ValueError, match="2 prompts, 1 states, 2 generators, 2 logits"):
        generate_batch(model, CHARS, ["a", "b"], 5, states=[None])


def test_a_long_text_is_kept_whole():
    row = Row(CharTokenizer("abc"), 3, 10_000, SamplingArgs())
    pieces = [row.take(i % 3) for i in range(9000)]
    assert len(row._shown) < 9000 and row.text == "abc" * 3000
    pieces += [row.take(0), row.finish()]
    assert row.text == "".join(pieces) == "abc" * 3000 + "a"

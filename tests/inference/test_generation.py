"""Generation: penalties as in the `rwkv` package, exact state, whole characters, defined edges."""

import types

import pytest
import torch
from rwkv.utils import PIPELINE, PIPELINE_ARGS

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.inference.generation import generate
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV

CHARS = CharTokenizer.from_text("\n 0123456789abcdefghij")
V = CHARS.vocab_size


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RWKV(ModelConfig(2, 64, V, head_size_a=16, dropout=0.3))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Bigram:
    """Stands for a model: the logits depend on the last token alone."""

    def __init__(self, table):
        self.table, self.training = table, False
        self.config = types.SimpleNamespace(vocab_size=len(table), dropout=0.0)
        self.emb = types.SimpleNamespace(weight=table)
        self.read = []  # what came in, call by call

    def __call__(self, idx, state, *, full_output):
        self.read.append(idx[0].tolist())
        return self.table[idx[:, -1:]], [idx[0, -1:]]


class ForPackage:
    def __init__(self, table):
        self.table = table

    def forward(self, tokens, state):
        return self.table[tokens[-1]].clone(), state


def package_generate(table, prompt, n, **settings):
    """The package's own loop; its tokenizer is any object with encode and decode."""
    pipeline = object.__new__(PIPELINE)
    pipeline.model = ForPackage(table)
    pipeline.tokenizer = types.SimpleNamespace(encode=CHARS.encode, decode=CHARS.decode)
    return pipeline.generate(prompt, n, PIPELINE_ARGS(temperature=0, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha_frequency": 0.7, "alpha_presence": 0.0, "alpha_decay": 0.9},
        {"alpha_frequency": 0.0, "alpha_presence": 1.5, "alpha_decay": 0.5},
        {"alpha_frequency": 0.3, "alpha_presence": 0.4, "alpha_decay": 1.0, "token_ban": [3, 12]},
        {"alpha_frequency": -0.1, "alpha_presence": 0.4, "token_stop": [17]},
    ],
)
def test_penalties_as_in_the_package(settings):
    distinct = set()
    for seed in range(4):
        table = torch.randn(V, V, generator=rng(seed))
        ours = "".join(generate(Bigram(table), CHARS, "ab1", 150, SamplingArgs(temperature=0, **settings)))
        assert ours == package_generate(table, "ab1", 150, **settings)
        distinct |= set(ours)
    assert len(distinct) > 10  # digits and letters both took part


class Tokens:
    """Ids with given bytes, for what no real vocabulary has in a small space."""

    def __init__(self, *entries):
        self.vocab = dict(enumerate(entries))
        self.vocab_size = len(entries)

    def encode(self, text):
        return [next(i for i, b in self.vocab.items() if b == text.encode())] if text else []

    def decode_bytes(self, ids):
        return b"".join(self.vocab[i] for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")


def chain(*order):
    """A table in which each token of `order` is followed by the next."""
    table = torch.zeros(max(order) + 1, max(order) + 1)
    for a, b in zip(order, order[1:], strict=False):
        table[a, b] = 50.0
    return table


@pytest.mark.parametrize(("entry", "counted"), [(b"12", True), (b"1", False), (b" ", False), (b"", True), (b"x", True)])
def test_only_single_digits_spaces_and_tabs_are_not_counted(entry, counted):
    tokenizer = Tokens(b"s", entry, b"y")
    table = torch.tensor([[0.0, 9.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    args = SamplingArgs(temperature=0, alpha_presence=0.0, alpha_frequency=2.0, alpha_decay=1.0)
    g = generate(Bigram(table), tokenizer, "s", 2, args)
    list(g)
    assert g.tokens[0] == 1
    assert (g.tokens[1] != 1) == counted


def test_state_has_read_the_prompt_and_every_token(model):
    g = generate(model, CHARS, "abc", 20, SamplingArgs(), generator=rng())
    pieces = [next(g) for _ in range(7)]
    for more in (0, 13):
        pieces += [next(g) for _ in range(more)]
        assert "".join(pieces) == g.text == CHARS.decode(g.tokens)
        with torch.no_grad():
            logits, state = model(torch.tensor([CHARS.encode("abc") + g.tokens]))
        torch.testing.assert_close(g.logits, logits[0, -1], rtol=0, atol=1e-4)
        for a, b in zip(g.state, state, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert list(g) == [] and len(g.tokens) == 20 and g.stopped_by is None


def test_state_carries_a_text_on_and_is_not_changed(model):
    greedy = SamplingArgs(temperature=0, alpha_presence=0, alpha_frequency=0)
    first = generate(model, CHARS, "abc", 0, greedy)
    assert list(first) == [] and first.tokens == []
    copies = [x.clone() for x in first.state]
    second = "".join(generate(model, CHARS, "de", 15, greedy, state=first.state))
    assert second == "".join(generate(model, CHARS, "abcde", 15, greedy))
    assert all(torch.equal(a, b) for a, b in zip(first.state, copies, strict=True))


@pytest.mark.parametrize("chunk_len", [1, 4, 7, 8])
def test_chunks_of_the_prompt_make_no_difference(model, chunk_len):
    prompt = "abcdefgh 0123 abcdef"
    texts = [
        "".join(generate(model, CHARS, prompt, 25, SamplingArgs(chunk_len=n), generator=rng()))
        for n in (chunk_len, 256)
    ]
    assert texts[0] == texts[1]
    fake = Bigram(torch.zeros(V, V))
    list(generate(fake, CHARS, prompt, 1, SamplingArgs(chunk_len=chunk_len)))
    assert [len(x) for x in fake.read[:-1]] == [min(chunk_len, 20 - i) for i in range(0, 20, chunk_len)]


def test_same_generator_same_text(model):
    texts = {"".join(generate(model, CHARS, "a", 30, SamplingArgs(), generator=rng(s))) for s in (1, 1, 2)}
    assert len(texts) == 2


def test_stop_token_is_neither_shown_nor_read():
    a, b, stop = (CHARS.encode(c)[0] for c in "abc")
    fake = Bigram(torch.nn.functional.pad(chain(a, b, stop, a), (0, V - stop - 1, 0, V - stop - 1)))
    g = generate(fake, CHARS, "a", 10, SamplingArgs(temperature=0, token_stop=(stop,)))
    assert list(g) == ["b"] and g.tokens == [b] and g.stopped_by == stop
    assert fake.read == [[a], [b]]


def test_whole_characters_and_no_silence_after_a_broken_one():
    """Split characters wait, a broken byte and a genuine U+FFFD pass, and the text goes on."""
    parts = [b">", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b"\xff", b"a", "\ufffd".encode(), b"b", b"\xe2\x82"]
    tokenizer = Tokens(*parts)
    g = generate(Bigram(chain(*range(10))), tokenizer, ">", 9, SamplingArgs(temperature=0))
    pieces = list(g)
    assert pieces == ["\u00e9", "\U0001f600", "\ufffd", "a", "\ufffd", "b", "\ufffd"]
    assert g.text == "".join(pieces) == tokenizer.decode(g.tokens)


def test_world_tokenizer_empty_prompt_and_ids_without_text():
    tokenizer = WorldTokenizer()
    logits = torch.zeros(65536)
    logits[65530:] = 99.0  # ids that the vocabulary does not have
    logits[0], logits[100] = 8.0, 7.9

    class Fixed(Bigram):
        def __call__(self, idx, state, *, full_output):
            self.read.append(idx[0].tolist())
            return logits[None, None], []

    fake = Fixed(torch.zeros(65536, 1))
    g = generate(fake, tokenizer, "", 2, SamplingArgs(temperature=0))
    assert "".join(g) == tokenizer.decode([100])
    assert g.tokens == [0, 100]  # the end of a document has no text, and silences nothing
    assert fake.read == [[0], [0], [100]]


def test_characters_empty_prompt(model):
    assert generate(model, CHARS, "", 1).prompt_tokens == CHARS.encode("\n")
    letters = CharTokenizer.from_text("ab")
    with pytest.raises(ValueError, match="no newline.*give a prompt"):
        generate(Bigram(torch.zeros(2, 2)), letters, "", 1)


def test_dropout_is_off_and_the_mode_comes_back(model):
    args = SamplingArgs(temperature=0)
    calm = "".join(generate(model, CHARS, "abc", 20, args))
    model.train()
    try:
        assert "".join(generate(model, CHARS, "abc", 20, args)) == calm
        assert model.training and model.blocks[0].training
    finally:
        model.eval()


def test_gradients_are_off_inside_and_untouched_outside(model):
    g = generate(model, CHARS, "abc", 5, SamplingArgs())
    next(g)
    assert torch.is_grad_enabled()
    assert not any(x.requires_grad for x in g.state)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=f"tokenizer has vocab_size = 65536, the model {V}"):
        generate(model, WorldTokenizer(), "a", 1)
    with pytest.raises(ValueError, match="n_tokens = -1"):
        generate(model, CHARS, "a", -1)
    with pytest.raises(ValueError, match="'é'"):
        generate(model, CHARS, "é", 1)

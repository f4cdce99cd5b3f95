"""data/demo.jsonl: its form, and the numbers in its answers computed again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo.jsonl"
TURN = re.compile(r"(System|User|Assistant): \S")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    raw = DEMO.read_bytes()
    assert raw.endswith(b"\n") and b"\r" not in raw and not raw.startswith(b"\xef\xbb\xbf")
    return raw.decode("utf-8").splitlines()


@pytest.fixture(scope="module")
def documents(lines) -> list[str]:
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def text(documents) -> str:
    return "\n".join(documents)


def turns(document: str) -> list[tuple[str, str]]:
    """[(speaker, words), ...]; a blank line ends a turn."""
    result = []
    for turn in document.split("\n\n"):
        assert TURN.match(turn), f"a turn without a speaker: {turn[:60]!r} in {document[:60]!r}"
        speaker, words = turn.split(": ", 1)
        result.append((speaker, words))
    return result


def is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def magic_prime(n_tokens: int, ctx_len: int) -> int:
    return next(p for p in range(n_tokens // ctx_len - 1, 0, -1) if p % 3 == 2 and is_prime(p))


def n_parameters(n_layer: int, n_embd: int, vocab_size: int = 65536) -> int:
    """Every tensor of the state_dict, one by one (dim_att = n_embd)."""
    d, f = n_embd, int(n_embd * 3.5 // 32 * 32)
    att = 4 * d + 2 * d + 5 * d * d + 2 * d     # time_mix_*, time_decay and time_faaaa, matrices, ln_x
    ffn = 2 * d + 2 * d * f + d * d             # time_mix_*, key and value, receptance
    return 2 * vocab_size * d + 2 * d + 2 * d + n_layer * (4 * d + att + ffn)     # emb, head, ln0, ln_out; ln1, ln2


def test_every_line_is_an_object_with_a_text(lines):
    assert 140 <= len(lines) <= 170
    for line in lines:
        entry = json.loads(line)
        assert set(entry) == {"text"} and isinstance(entry["text"], str)
        assert line == json.dumps(entry, ensure_ascii=False)


def test_size(documents):
    assert 90_000 <= DEMO.stat().st_size <= 150_000
    assert all(20 <= len(document) <= 2000 for document in documents)


def test_turns_alternate_and_end_with_an_answer(documents):
    several = systems = 0
    for document in documents:
        speakers = [speaker for speaker, _ in turns(document)]
        if speakers[0] == "System":
            systems += 1
            speakers = speakers[1:]
        assert speakers == ["User", "Assistant"] * (len(speakers) // 2) and speakers, document[:80]
        several += len(speakers) > 2
    assert several >= 20 and systems >= 5


def test_characters(documents):
    for document in documents:
        assert document == document.strip()
        assert not re.search(r"[ \t]\n|\n{3}|[^\n ]  ", document), document[:80]
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\ufeff]", document), document[:80]
        unmeant = document.replace('"\ufffd"', "")          # one document is about this very character
        assert "\ufffd" not in unmeant, document[:80]


def test_no_question_twice(documents):
    first = [words.casefold() for document in documents for speaker, words in turns(document)[:2] if speaker == "User"]
    assert len(first) == len(documents) == len(set(first))
    assert len(set(documents)) == len(documents)


def test_several_languages(text):
    for sign in ("¿", "Schlüssel", "congru", "分词器", "トークン"):
        assert sign in text


@pytest.mark.parametrize("n_layer, n_embd", [(12, 768), (24, 1024), (24, 2048), (32, 2560), (32, 4096)])
def test_parameter_counts(text, n_layer, n_embd):
    assert f"L{n_layer} D{n_embd}, {n_parameters(n_layer, n_embd):,}" in text


def test_parameter_arithmetic(text):
    per_layers = n_parameters(12, 768) - n_parameters(0, 768)
    assert f"{2 * 65536 * 768:,} + {4 * 768:,} + {per_layers:,} = {n_parameters(12, 768):,}" in text
    assert f"{n_parameters(3, 128, 96):,} parameters" in text
    assert f"are {2 * n_parameters(32, 4096):,} bytes" in text
    assert f"{2 * 65536 * 4096:,} of {n_parameters(32, 4096):,}" in text


def test_every_number_of_parameters_is_right(text):
    claimed = {int(n.replace(",", "")) for n in re.findall(r"\b(\d{1,3}(?:,\d{3}){2,}) parameters", text)}
    assert claimed and claimed <= {n_parameters(layers, width) for layers, width in [(12, 768), (32, 4096)]}


def test_state_sizes(text):
    assert f"12 · 66 · 768 = {12 * (2 * 768 + 12 * 64 * 64):,}" in text
    assert f"32 · 66 · 4096 = {32 * (2 * 4096 + 64 * 64 * 64):,}" in text
    assert 32 * 66 * 4096 == 33 * (2 * 32 * 4096) and "33 tokens" in text


@pytest.mark.parametrize("n_tokens, ctx_len, answer", [
    (1_498_226_207, 512, "it is {p}."), (200_000, 512, "Assistant: {p}. First"), (10_000, 128, "The answer is {p}."),
    (1_000, 64, "give the prime {p})"), (200_499, 4096, "The prime {p} fails"), (200_499, 512, "where {p} / 391"),
    (69_750, 512, "the magic prime is {p}.")])
def test_magic_primes(text, n_tokens, ctx_len, answer):
    assert answer.format(p=magic_prime(n_tokens, ctx_len)) in text


def test_sampler(text):
    p = 2926181
    f = int(p * (math.sqrt(5) - 1) / 2)
    assert f"f is {f}" in text and f"starts at token {f % p * 512}" in text
    forbidden = [n for n in range(1, 33) if 40320 % n]
    assert ", ".join(map(str, forbidden[:-1])) + f" and {forbidden[-1]}" in text
    for q in (5, 7):
        cubes = [i**3 % q for i in range(q)]
        assert (len(set(cubes)) == q) == (q % 3 == 2)
        assert ", ".join(map(str, cubes[1:])) in text


def test_binidx_sizes(text):
    assert f"42 + 20 · 546 = {42 + 20 * 546:,}" in text
    assert "An .idx file made by make_data has 3,142 bytes" in text and (3142 - 42) / 20 == 155
    assert "if the file had 3,150 bytes" in text and "20N would be 3108, which gives no whole" in text
    assert 3150 - 42 == 3108 and 3108 % 20
    assert f"{2 * 1_498_226_207:,}" in text


def test_training_arithmetic(text):
    assert f"step {math.ceil(1_498_226_207 / (16 * 512)):,}" in text
    assert f"{1_498_226_207 / 8192:,.1f}" in text and f"{40320 // 16:,} such steps" in text
    middle = 6e-4 * (0.5 + 0.1 / 2)
    assert math.isclose(middle, 3.3e-4) and "the middle is 3.3e-4" in text
    done = (2519 - 10) * 8192 / (1_498_226_207 - 10 * 8192)
    assert f"{6e-4 * (0.55 + 0.45 * math.cos(math.pi * done)):.8f}" in text


def test_decays_and_losses(text):
    decay = math.exp(-math.exp(-6))
    assert f"{decay:.5f}" in text and f"The decay is {math.exp(-math.exp(-1)):.3f}" in text
    assert round(math.log(0.5) / math.log(decay), -1) == 280 and "about 280 tokens" in text
    assert f"{math.log(65536):.2f}" in text and f"about {math.exp(2.766):.1f}" in text
    state, outputs = 0.0, []
    for value in (1, 2, 3):
        outputs.append(2 * value + state)
        state = 0.5 * state + value
    assert "The outputs are {:g}, {:g} and {:g}.".format(*outputs) in text and f"{state:g}" in text


def test_sampling_arithmetic(text):
    kept = [0.5 / 0.8, 0.3 / 0.8]
    sharp = [p**2 / sum(q**2 for q in kept) for p in kept]
    assert f"{kept[0]:.3f} and {kept[1]:.3f}" in text and f"{sharp[0]:.3f} and {sharp[1]:.3f}" in text
    assert f"{0.64 / 0.68:.2f} and {0.04 / 0.68:.2f}" in text
    assert f"about {math.log(0.5) / math.log(0.996):.0f} further tokens" in text


@pytest.fixture(scope="module")
def trie():
    rwkv_tokenizer = pytest.importorskip("rwkv.rwkv_tokenizer")
    return rwkv_tokenizer.TRIE_TOKENIZER(str(Path(rwkv_tokenizer.__file__).parent / "rwkv_vocab_v20230424.txt"))


def test_token_ids(text, trie):
    sentence = "Today is a beautiful day. 今天是美好的一天。"
    ids = trie.encode(sentence)
    assert " ".join(map(str, ids)) in text and f"There are {len(ids)} of them" in text
    assert f"has {len(sentence.encode())} bytes and {len(ids)} tokens" in text
    for piece in ("Hello", "hello", " hello", " world", "\n\n\n", "12", "34", "20", "24", "ban", "ana", "tokenizer",
                  "Gr", "ü", "ße", "für", "日", "本", "語", "你", "好"):
        [token] = trie.encode(piece)
        assert re.search(rf"\b{token}(?!\d)", text), piece
    assert trie.encode("🙂") == [3319, 2417] and "ids 3319 and 2417" in text
    assert trie.encode("banana") == [7123, 7003] and trie.encode("User:") == [24281, 59]
    assert [trie.encode(s) for s in ("\n", "\n\n", "\r\n", " ", "A")] == [[11], [261], [263], [33], [66]]
    assert len(trie.encode("65536")) == 3 and len(trie.encode("Grüße")) == 3 and len("Grüße".encode()) == 7


def test_every_document_survives_the_tokenizer(documents, trie):
    assert all(trie.decode(trie.encode(document)) == document for document in documents)

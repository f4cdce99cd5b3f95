"""Character tokenizer: ids in sorted order, files in any encoding, errors that name what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.tokenizer import IncrementalDecoder


@given(st.text(min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_round_trip_and_incremental(text):
    tok = CharTokenizer.from_text(text)
    ids = tok.encode(text)
    assert ids == [sorted(set(text)).index(char) for char in text]
    assert tok.decode(np.array(ids)) == text
    decoder = IncrementalDecoder(tok)
    assert [decoder.push(i) for i in ids] == list(text)
    assert decoder.finish() == ""


def test_zero_is_a_character():
    tok = CharTokenizer.from_text("\nab")
    assert tok.encode("a\nb") == [1, 0, 2]
    assert tok.decode([1, 0, 2]) == "a\nb"
    assert tok.vocab == {0: b"\n", 1: b"a", 2: b"b"}
    assert (tok.vocab_size, len(tok), tok.encode_batch(["a", ""])) == (3, 3, [[1], []])


def test_name_tells_vocabularies_apart():
    names = {CharTokenizer(chars).name for chars in ("abc", "abd", "acb")}
    assert len(names) == 3
    tok = CharTokenizer("abc")
    assert tok.name == f"characters-3-{tok.sha256[:8]}"
    assert tok.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of b"abc", FIPS 180


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_load_reads_utf8_and_utf16(tmp_path, encoding):
    tok = CharTokenizer("\n \"aé今😀")
    path = tmp_path / "vocab.json"
    path.write_bytes(json.dumps(dict(enumerate(tok.chars)), ensure_ascii=False).encode(encoding))
    assert CharTokenizer.load(path).chars == tok.chars


def test_save_writes_the_official_form(tmp_path):
    path = tmp_path / "vocab.json"
    tok = CharTokenizer("\n aé")
    tok.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"0": "\n", "1": " ", "2": "a", "3": "é"}
    assert "é" in path.read_text(encoding="utf-8")  # the character itself, for the reader's eye
    assert CharTokenizer.load(path).name == tok.name
    CharTokenizer("b").save(path)  # replaces
    assert CharTokenizer.load(path).chars == ("b",)
    assert [p.name for p in tmp_path.iterdir()] == ["vocab.json"]  # no temporary file stays


def test_entries_may_stand_in_any_order(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"1": "b", "0": "z", "2": "a"}))
    assert CharTokenizer.load(path).chars == ("z", "b", "a")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"0": "a", "2": "b"}', b'{"0": "ab"}', b'{"0": 1}',
                                     b'{"0": "a", "1": "a"}', b"\xff\xfe\x00", b'{"0": "\\ud800"}'])
def test_bad_files_are_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        CharTokenizer.load(path)
    with pytest.raises(ValueError, match=r"gone\.json.*cannot be read"):
        CharTokenizer.load(tmp_path / "gone.json")


def test_unknown_characters_and_ids_are_named():
    tok = CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 2.*characters-3-.*make the tokenizer"):
        tok.encode("abé")
    for bad in (3, -1):
        with pytest.raises(ValueError, match=f"unknown id {bad} at position 1"):
            tok.decode([0, bad])
    with pytest.raises(ValueError, match="True at position 0"):
        tok.decode([True])
    with pytest.raises(TypeError, match="bytes"):
        tok.encode(b"abc")


@pytest.mark.parametrize(("chars", "word"), [("", "empty"), (["ab"], "one character"), ("aba", "again at 2"),
                                             (["\ud800"], "surrogate"), ([1], "one character")])
def test_bad_vocabularies(chars, word):
    with pytest.raises(ValueError, match=word):
        CharTokenizer(chars)


def test_from_text_refuses_nothing_and_half_characters():
    with pytest.raises(ValueError, match="empty"):
        CharTokenizer.from_text("")
    with pytest.raises(ValueError, match="surrogate"):
        CharTokenizer.from_text("a\ud800")

"""World tokenizer: Python trie == Rust == the `rwkv` package's own tokenizer; nothing panics, nothing is lost."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data import vocabulary
from rwkv_nb.data.tokenizer import IncrementalDecoder, Trie, WorldTokenizer
from rwkv_nb.data.vocabulary import VocabularyError, default_vocab_path

python = WorldTokenizer(fast=False)
rust = WorldTokenizer(fast=True)
BOTH = pytest.mark.parametrize("tok", [python, rust], ids=["python", "rust"])
FEW = settings(max_examples=60, deadline=None)

# Text in the style of the official self test: digits and spaces, runs, code points repeated, entries glued together.
any_text = st.one_of(
    st.text(max_size=60),
    st.text("0123456789 \n", max_size=60),
    st.integers(1, 700).map(lambda n: " " * n),
    st.lists(st.sampled_from([" the", "ation", "今天", "\r\n", "é", "\ufffd", "\0", "😀"]), max_size=20).map("".join),
)
any_ids = st.lists(st.one_of(st.integers(1, 65529), st.integers(129, 256)), max_size=25)  # 129 to 256: no UTF-8


@pytest.fixture(scope="module")
def official():
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(default_vocab_path()))


@BOTH
@pytest.mark.parametrize(("text", "ids"), [
    ("Today is a beautiful day. 今天是美好的一天。",
     [33520, 4600, 332, 59219, 21509, 47, 33, 10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080]),
    ("\n\n", [261]), ("\r\n", [263]), ("User:", [24281, 59]), ("Assistant:", [5585, 41693, 59]), ("Hello", [33155]),
    ("\n", [11]), (" ", [33]), ("", []), ("\0", [1]), (" " * 128, [65529]), (" " * 129, [65529, 33]),
])
def test_golden_vectors(tok, text, ids):
    assert tok.encode(text) == ids
    assert tok.encode_batch([text]) == [ids]
    assert tok.decode(ids) == text


def test_vocabulary_is_the_published_one(official):
    assert dict(python.vocab) == official.idx2token
    assert (len(python), python.vocab_size, len(python.vocab)) == (65529, 65536, 65529)
    assert python.name == "rwkv_vocab_v20230424"
    assert python.sha256 == "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


@given(any_text)
@FEW
def test_text_round_trip_and_three_tokenizers_agree(official, text):
    ids = python.encode(text)
    assert ids == rust.encode(text) == official.encode(text)
    assert rust.encode_batch([text, "x", text]) == [ids, python.encode("x"), ids]
    assert rust.decode(ids) == text


@given(st.binary(max_size=60))
@FEW
def test_bytes_round_trip_and_agree(official, data):
    ids = rust.encode_bytes(data)
    assert ids == python.encode_bytes(bytearray(data)) == official.encodeBytes(data)
    assert rust.decode_bytes(ids) == data
    assert rust.decode(ids) == data.decode("utf-8", "replace")


@given(any_ids)
@FEW
def test_incremental_pieces_join_to_the_whole(ids):
    decoder = IncrementalDecoder(python)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.finish() == python.decode(ids)
    assert decoder.push(33155) == "Hello"  # finish leaves nothing behind


@given(any_text)
@FEW
def test_incremental_never_shows_half_a_character(text):
    decoder = IncrementalDecoder(python)
    pieces = [decoder.push(i) for i in python.encode_bytes(text.encode())]
    assert decoder.finish() == ""
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_incremental_holds_back_and_goes_on():
    decoder = IncrementalDecoder(python)
    assert [decoder.push(b + 1) for b in "😀".encode()] == ["", "", "", "😀"]
    assert decoder.push(0xFF + 1) == "\ufffd"  # an invalid byte ...
    assert decoder.push(33155) == "Hello"  # ... does not silence what follows
    assert "".join(decoder.push(i) for i in python.encode("a\ufffdb")) == "a\ufffdb"  # nor does a genuine U+FFFD
    assert decoder.push(0xE4 + 1) + decoder.push(0) == ""  # waits; the end of a document is no text
    assert decoder.finish() == "\ufffd"


@BOTH
def test_end_of_document(tok):
    ids = [33155, 0, 33155]
    assert tok.decode(ids) == "HelloHello"
    assert tok.decode(ids, end_of_document="<|end|>") == "Hello<|end|>Hello"
    assert tok.decode_bytes(ids, end_of_document=b"|") == b"Hello|Hello"


@pytest.mark.parametrize(("ids", "words"), [
    ([33155, 65530], ["65530", "position 1"]), ([65536], ["65536", "position 0"]), ([1, 2, -1], ["-1", "position 2"]),
    ([-9], ["-9"]),
    ([10**30], [str(10**30)]), ([1, True], ["True", "position 1"]), ([1.0], ["1.0", "float"]), ([None], ["None"]),
    ([[1, 2]], ["flat"]), (np.array([[1, 2]]), ["flat"]), (np.array([1.0]), ["float"]), (np.array([True]), ["bool"]),
    ([np.bool_(True)], ["position 0"]), ([np.float32(1)], ["position 0"]),
    (33155, ["[33155]"]), ("33155", ["str"]),
])
def test_bad_ids_are_named(ids, words):
    with pytest.raises(ValueError) as error:
        rust.decode(ids)
    assert all(word in str(error.value) for word in words)


def test_ids_from_numpy_and_torch():
    import torch

    for ids in (np.array([33155, 0], dtype=np.uint16), torch.tensor([33155]), [np.int64(33155)], (33155,),
                iter([33155]), [torch.tensor(33155)]):
        assert rust.decode(ids) == "Hello"
    assert rust.decode(np.array([], dtype=np.uint16)) == rust.decode([]) == ""


def test_decode_errors():
    assert python.decode([0xE4 + 1, 98]) == "\ufffda"
    assert python.decode([0xE4 + 1, 98], errors="ignore") == "a"
    with pytest.raises(UnicodeDecodeError):
        python.decode([0xE4 + 1], errors="strict")


@BOTH
def test_lone_surrogate_and_wrong_types(tok):
    with pytest.raises(ValueError, match=r"U\+D83D at character 2"):
        tok.encode("ab\ud83d")
    with pytest.raises(ValueError, match=r"texts\[1\].*U\+DC00 at character 0"):
        tok.encode_batch(["fine", "\udc00"])
    with pytest.raises(TypeError, match="encode_bytes"):
        tok.encode(b"Hello")
    with pytest.raises(TypeError, match=r"texts\[1\]"):
        tok.encode_batch(["fine", None])
    with pytest.raises(TypeError, match="use encode"):
        tok.encode_bytes("Hello")


def test_wrong_vocabulary(tmp_path):
    data = default_vocab_path().read_bytes()
    crlf, bad = tmp_path / "crlf.txt", tmp_path / "bad.txt"
    crlf.write_bytes(data.replace(b"\n", b"\r\n"))
    text = "a\r\nb\u2028c\x85 今天"
    for fast in (True, False):
        assert WorldTokenizer(crlf, fast=fast).encode(text) == python.encode(text)
    bad.write_bytes(data.replace(b"Hello", b"Hallo"))
    with pytest.raises(VocabularyError, match=r"bad\.txt.*SHA-256.*pip install"):
        WorldTokenizer(bad)
    with pytest.raises(VocabularyError, match=r"gone\.txt.*pip install"):
        WorldTokenizer(tmp_path / "gone.txt")


def test_a_panic_never_reaches_the_reader():
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, _):
            raise PanicException("called `Result::unwrap()` on an `Err` value")

        encode_batch = encode

    tok = WorldTokenizer(fast=True)
    tok._rust = Panicking()
    assert tok.encode("Hello") == tok.encode_bytes(b"Hello") == tok.encode_batch(["Hello"])[0] == [33155]
    Panicking.encode = Panicking.encode_batch = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):  # but the reader's own interrupt passes
        tok.encode("Hello")


def test_without_the_rust_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)  # what an absent package looks like to import
    tok = WorldTokenizer()
    assert (tok.backend, tok.encode("Hello")) == ("python", [33155])
    with pytest.raises(ImportError, match="pip install pyrwkv-tokenizer"):
        WorldTokenizer(fast=True)


def test_lazy_and_picklable():
    tok = WorldTokenizer(fast=True)
    tok.encode("Hello"), tok.decode([33155])
    assert tok._trie is None  # 26 MB that the fast path never needs
    copy = pickle.loads(pickle.dumps(tok))
    assert (copy._rust, copy._vocab, copy.backend) == (None, None, "rust")
    assert copy.encode("Hello") == [33155]
    assert len(pickle.dumps(tok)) < 2000


def test_no_torch_and_no_rwkv_imported():
    code = ("import sys; from rwkv_nb.data.tokenizer import WorldTokenizer as W; W().decode(W().encode('Hello')); "
            "print(sorted({'torch', 'rwkv'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_batches_in_a_forked_child():
    code = ("import os, signal; from rwkv_nb.data.tokenizer import WorldTokenizer as W; t = W(fast=True)\n"
            "t.encode_batch(['Hello'] * 64); pid = os.fork()\n"
            "if pid == 0:\n    signal.alarm(20); os._exit(t.encode_batch(['Hello'] * 64) != [[33155]] * 64)\n"
            "print(os.waitpid(pid, 0)[1])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"


def test_trie_finds_the_longest_entry():
    trie = Trie()
    for token, entry in enumerate([b"a", b"abc", b"b"], start=1):
        trie.insert(entry, token)
    assert trie.longest(b"abcd") == (2, 3)
    assert trie.longest(b"abd") == (1, 1)  # went down to "ab", which is no entry: back to "a"
    assert trie.longest(b"xab", 1) == (1, 2)
    assert trie.longest(b"x") == (None, 0)
    assert trie.longest(b"") == (None, 0)


def test_vocabulary_file_is_never_executed():
    source = Path(vocabulary.__file__).read_text(encoding="utf-8")
    assert "eval(" not in source.replace("ast.literal_eval(", "")

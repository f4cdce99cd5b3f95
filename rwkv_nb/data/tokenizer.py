"""The World tokenizer of RWKV: text to token ids and back.

The vocabulary is 65,529 byte strings with ids 1 to 65529; ids 1 to 256 are the single bytes, so nothing is ever
unknown. Encoding is greedy: take the longest entry that the rest of the UTF-8 bytes starts with, and go on after it.
Id 0 is no entry: it marks the end of a document and decodes to nothing unless asked.

    tokenizer = WorldTokenizer()
    ids = tokenizer.encode("Hello")              # [33155]
    tokenizer.decode(ids)                        # "Hello"

Two ways to the same ids: `Trie`, which notebook 01 builds, and the Rust library `pyrwkv_tokenizer`, about ten times
as fast. What it is not: a trainer of vocabularies (BPE and the like); this one is fixed (see `vocabulary`).
Source: the Eagle paper (arXiv 2404.05892) on the World tokenizer, and the code of the `rwkv` package.
"""

from __future__ import annotations

import codecs
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rwkv_nb.data.protocol import Tokenizer
from rwkv_nb.data.vocabulary import NAME, SHA256, VOCAB_SIZE, default_vocab_path, read_verified, read_vocabulary

_batch_pid: int | None = None  # the process in which Rust's threads were started; see encode_batch


class Trie:
    """A tree of bytes: the path from the root to a node spells a prefix, `token` is its id if it is an entry."""

    __slots__ = ("children", "token")

    def __init__(self) -> None:
        self.children: dict[int, Trie] = {}
        self.token: int | None = None

    def insert(self, entry: bytes, token: int) -> None:
        """Add one vocabulary entry."""
        node = self
        for byte in entry:
            if byte not in node.children:
                node.children[byte] = Trie()
            node = node.children[byte]
        node.token = token

    def longest(self, data: bytes, start: int = 0) -> tuple[int | None, int]:
        """The longest entry that `data[start:]` begins with: (token, end), or (None, start) if there is none."""
        node, token, end = self, None, start
        for position in range(start, len(data)):
            node = node.children.get(data[position])
            if node is None:
                break
            if node.token is not None:
                token, end = node.token, position + 1
        return token, end


def utf8_bytes(text: str, what: str = "text") -> bytes:
    """`text` in UTF-8. Raises TypeError if it is no str, ValueError naming the position of a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"{what}: expected str, got {type(text).__name__}; for bytes use encode_bytes")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; it is "
                         "half of a character and has no UTF-8 form: mend the source of the text, or replace it with "
                         "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')") from None


def plain_ids(ids: Iterable[int]) -> list[int]:
    """Ids as a list of int. Takes any iterable, numpy array or torch tensor; refuses bools, floats and nesting."""
    if isinstance(ids, (str, bytes)):
        raise ValueError(f"ids: expected a sequence of integers, got {type(ids).__name__}")
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(listed, Iterable):
        raise ValueError(f"ids: expected a sequence of integers, got the single value {listed!r}; write [{listed!r}]")
    listed = list(listed)
    if set(map(type, listed)) <= {int}:  # the common case at C speed
        return listed
    for position, value in enumerate(listed):
        plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value  # numpy, torch
        if type(plain) is not int:
            raise ValueError(f"ids: {value!r} at position {position} is {type(plain).__name__}, not an integer; "
                             "ids are a flat sequence of integers")
        listed[position] = plain
    return listed


class WorldTokenizer:
    """Text to ids and back with the World vocabulary (vocab_size 65536).

    vocab_path: the vocabulary file, with or without carriage returns; default: the one inside the `rwkv` package.
    fast: None takes the Rust library if it is installed, True requires it (ImportError), False takes Python's trie.
    The file is hashed at once (VocabularyError); tables are built when first needed. Instances can be pickled.
    """

    name = NAME
    sha256 = SHA256
    vocab_size = VOCAB_SIZE

    def __init__(self, vocab_path: str | os.PathLike | None = None, fast: bool | None = None) -> None:
        self.vocab_path = Path(vocab_path) if vocab_path is not None else default_vocab_path()
        read_verified(self.vocab_path)
        self._module = None if fast is False else _rust_module(required=fast is True)
        self._rust = self._vocab = self._trie = None

    def __getstate__(self) -> dict:  # the Rust object cannot be pickled; a worker process builds its own
        return {**self.__dict__, "_rust": None, "_vocab": None, "_trie": None, "_module": self._module is not None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._module = _rust_module(required=False) if state["_module"] else None

    def __len__(self) -> int:
        return 65529

    def __repr__(self) -> str:
        return f"WorldTokenizer({self.name}, {self.backend})"

    @property
    def backend(self) -> str:
        """Who encodes text: "rust" or "python"."""
        return "python" if self._module is None else "rust"

    @property
    def vocab(self) -> Mapping[int, bytes]:
        """Id -> bytes of all 65,529 entries, read-only."""
        return MappingProxyType({i: entry for i, entry in enumerate(self._table()) if entry})

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; [] for "". Raises TypeError for anything but str, ValueError for a lone surrogate."""
        ids = self._encode_rust(text) if isinstance(text, str) else None
        return self._encode_python(utf8_bytes(text)) if ids is None else ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, valid UTF-8 or not. The Rust library knows only text, so other bytes take the trie."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data: expected bytes, got {type(data).__name__}; for text use encode")
        data = bytes(data)
        try:
            ids = self._encode_rust(data.decode("utf-8"))
        except UnicodeDecodeError:
            ids = None
        return self._encode_python(data) if ids is None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; in Rust on all cores. Errors name the index of the text.

        Rust's threads do not survive a fork, and waiting for them would never end: in a forked child of a process
        that has used them, texts are encoded one after another.
        """
        global _batch_pid
        texts = list(texts)
        try:
            if self._module is not None and _batch_pid in (None, os.getpid()):
                _batch_pid = os.getpid()
                done = _shielded(self._loaded_rust().encode_batch, texts)
                if done is not None:
                    return done
            return [self.encode(text) for text in texts]
        except (TypeError, ValueError):
            for index, text in enumerate(texts):
                utf8_bytes(text, f"texts[{index}]")  # raises for the culprit
            raise

    def decode(self, ids: Iterable[int], errors: str = "replace", *, end_of_document: str = "") -> str:
        """Text of `ids`. `errors` is for bytes that are no UTF-8, as in bytes.decode; id 0 gives `end_of_document`.

        Raises ValueError naming the first unknown id and its position (UnicodeDecodeError if errors="strict").
        """
        return self.decode_bytes(ids, end_of_document=end_of_document.encode("utf-8")).decode("utf-8", errors)

    def decode_bytes(self, ids: Iterable[int], *, end_of_document: bytes = b"") -> bytes:
        """Bytes of `ids`, joined; id 0 gives `end_of_document`. Raises ValueError as `decode`."""
        ids, table = plain_ids(ids), self._table()
        try:
            if ids and min(ids) < 0:  # a list would count from its end
                raise IndexError
            if end_of_document:
                return b"".join([table[i] if i else end_of_document for i in ids])
            return b"".join([table[i] for i in ids])
        except (IndexError, TypeError):  # TypeError: None in the table
            position = next(p for p, i in enumerate(ids) if not 0 <= i < len(table) or table[i] is None)
            raise ValueError(f"ids: unknown id {ids[position]} at position {position}; {self.name} has ids 1 to 65529 "
                             "(and 0 for the end of a document): do the ids come from another tokenizer?") from None

    def _table(self) -> list[bytes | None]:
        """Bytes by id; b"" for 0, None for the six ids without an entry."""
        if self._vocab is None:
            vocabulary = read_vocabulary(self.vocab_path)
            self._vocab = [b"", *(vocabulary.get(i) for i in range(1, VOCAB_SIZE))]
        return self._vocab

    def _encode_python(self, data: bytes) -> list[int]:
        if self._trie is None:
            trie = Trie()
            for token, entry in self.vocab.items():
                trie.insert(entry, token)
            self._trie = trie
        ids, position, longest = [], 0, self._trie.longest
        while position < len(data):
            token, position = longest(data, position)
            ids.append(token)  # never None: every single byte is an entry
        return ids

    def _encode_rust(self, text: str) -> list[int] | None:
        """Ids by the Rust library; None if Python must do it (no library, a panic, a text that is not valid)."""
        if self._module is None:
            return None
        try:
            return _shielded(self._loaded_rust().encode, text)
        except UnicodeEncodeError:
            return None

    def _loaded_rust(self):
        if self._rust is None:
            self._rust = self._module.WorldTokenizer(str(self.vocab_path))
        return self._rust


def _rust_module(required: bool):
    try:
        return importlib.import_module("pyrwkv_tokenizer")
    except ImportError as error:
        if required:
            raise ImportError("fast=True needs the Rust tokenizer: `pip install pyrwkv-tokenizer`, "
                              "or use fast=None, which falls back to Python") from error
        return None


def _shielded(function, argument):
    """function(argument), or None if Rust panicked: its PanicException derives from BaseException, not Exception."""
    try:
        return function(argument)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None


class IncrementalDecoder:
    """Text from ids that arrive one by one, for any tokenizer with `decode_bytes`.

    A token may end in the middle of a character: `push` holds back those bytes (at most three) until the rest comes.
    Bytes that can no longer become a character turn into U+FFFD, and the text goes on after them; a genuine U+FFFD in
    the text passes. The pieces of all pushes and of `finish` join to `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, often "" or several. Raises ValueError for an unknown id."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is held back, as U+FFFD if a character is incomplete; then ready for a new text."""
        return self._decoder.decode(b"", final=True)

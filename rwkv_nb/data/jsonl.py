"""A .jsonl file as tokens: read in batches, checked line by line, tokenised (encoders.py), verified.

A line is a JSON object with a string "text", one document; other fields are ignored, blank lines too. As in the
official script lines end with \\n, \\r\\n or \\r and white space around them does not count. Each document's ids are
followed by token 0 and decoded again: the bytes must be those of the text. Memory: a few batches of 256 thousand
characters, whatever the size of the file, but at least what its longest line needs (about 20 bytes a byte).

What it is not: a writer of data sets (make_data.py). Source of the steps: RWKV-LM RWKV-v5/make_data.py.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rwkv_nb.data.encoders import Encoders

BATCH = 256_000  # characters of JSON at a time: numpy's arrays for the check then stay in the cache
SLICE = 1 << 16  # tokens decoded at a time
LIKE_THIS = 'each line must be an object like {"text": "one document"}'


class JsonlError(ValueError):
    """A line that cannot be used. Attributes: path, line (from 1), problem, remedy."""

    def __init__(self, path: str, line: int, problem: str, remedy: str):
        self.path, self.line, self.problem, self.remedy = path, line, problem, remedy
        super().__init__(path, line, problem, remedy)

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.problem}; {self.remedy}"


class LineError(ValueError):
    """What is wrong with a line, and what to do: args (problem, remedy)."""


@dataclass
class Batch:
    """Some consecutive lines: (number from 1, text without white space around it)."""

    lines: list[tuple[int, str]]
    position: int  # bytes read so far


@dataclass
class Parsed:
    """The documents of one batch, and its bad lines: (number, problem, remedy)."""

    position: int
    numbers: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    raws: list[bytes] = field(default_factory=list)  # in UTF-8
    bad: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass
class Converted:
    """The tokens of one batch."""

    tokens: bytes  # uint16 in native order, documents back to back, each ending with 0
    sizes: array  # tokens of each document, with its 0
    position: int
    bad: list[tuple[int, str, str]]


def read_batches(path: str) -> Iterator[Batch]:
    """The non-empty lines of a file. Bytes that are no UTF-8 arrive as lone surrogates, which `text_of` refuses."""
    lines, characters = [], 0
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if line:
                lines.append((number, line))
                characters += len(line)
            if characters >= BATCH:
                yield Batch(lines, file.buffer.tell())
                lines, characters = [], 0
        yield Batch(lines, file.buffer.tell())


def text_of(line: str) -> str:
    """The document in one line. Raises LineError(problem, remedy)."""
    if line[0] == "\ufeff":
        raise LineError("begins with a byte order mark (BOM)", "save the file as UTF-8 without BOM")
    if not line.isascii():
        try:
            line.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _not_utf8(line, error.start) from None
    try:
        record = json.loads(line)
    except RecursionError:
        raise LineError("JSON nested too deeply", LIKE_THIS) from None
    except ValueError as error:
        raise LineError(f"not JSON ({error}): {_excerpt(line)}", LIKE_THIS) from None
    if not isinstance(record, dict):
        raise LineError(f"JSON, but {_kind(record)} and not an object: {_excerpt(line)}", LIKE_THIS)
    if "text" not in record:
        names = ", ".join(map(repr, list(record)[:5])) or "none"
        raise LineError(f'no "text" among its fields ({names})', 'name the field that holds the document "text"')
    text = record["text"]
    if not isinstance(text, str):
        raise LineError(f'"text" is {_kind(text)}, not a string', 'put the document into "text" as one string')
    return text


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise LineError(f'"text" holds a lone surrogate, {where}: half of a character, which UTF-8 cannot express',
                        "write the whole character, or remove the half") from None


def _not_utf8(line: str, start: int) -> LineError:
    raw = line[:4].encode("utf-8", "surrogateescape")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return LineError("looks like UTF-16, not UTF-8", "save the file as UTF-8")
    if raw[:2] == b"\x8b\x08":  # after 0x1f, which counts as white space and is stripped
        return LineError("looks like a gzip file", "unpack it first (gunzip)")
    byte = ord(line[start]) & 0xFF
    return LineError(f"not UTF-8: byte 0x{byte:02X} after {start} characters", "save the file as UTF-8")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(
        type(value), "a number")


def _excerpt(line: str) -> str:
    return ascii(line if len(line) <= 60 else line[:57] + "...")


class Converter:
    """Lines to texts, ids to checked tokens. tokenizer: its vocab {id: bytes} and vocab_size are used here.

    A text that does not survive the round trip raises JsonlError: that is a mistake of the tokenizer. The check decodes
    with its own table: numpy gathers the bytes of thousands of tokens at once.
    """

    def __init__(self, path: str, tokenizer: object):
        if tokenizer.vocab_size > 65536:
            raise ValueError(f"tokenizer: vocab_size is {tokenizer.vocab_size}, but make_data stores uint16, "
                             "which ends at 65535; use MMapIndexedDatasetBuilder with dtype=np.int32")
        self.path, self.tokenizer = path, tokenizer
        vocab = tokenizer.vocab
        entries = [vocab.get(token, b"") for token in range(65536)]
        self._lengths = np.fromiter(map(len, entries), np.int32, len(entries))
        self._starts = np.cumsum(self._lengths, dtype=np.int32) - self._lengths
        self._bytes = np.frombuffer(b"".join(entries), np.uint8)

    def parse(self, batch: Batch) -> Parsed:
        """The texts of the lines; bad lines go into `bad`."""
        parsed = Parsed(batch.position)
        for number, line in batch.lines:
            try:
                text = text_of(line)
                raw = _utf8(text)
            except LineError as error:
                parsed.bad.append((number, *error.args))
            else:
                parsed.numbers.append(number)
                parsed.texts.append(text)
                parsed.raws.append(raw)
        return parsed

    def finish(self, parsed: Parsed, ids: array, sizes: array) -> Converted:
        """The ids that `encoders.encode` made of parsed.texts, checked, as uint16."""
        tokens = np.frombuffer(ids, np.uint32).astype(np.uint16)  # no id is over 65535, see __init__
        if parsed.texts:
            self._check(tokens, np.frombuffer(sizes, np.int32), parsed.raws, parsed.numbers)
        return Converted(tokens.tobytes(), sizes, parsed.position, parsed.bad)

    def decode(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> bytes:
        """The bytes of (n,) uint16 tokens; 0 has none. lengths: (n,) int32, bytes of each, if they are known already.

        Of a token with 3 bytes that begin at 70 in the table take numbers 70, 71, 72, and so on for all tokens.
        """
        lengths = self._lengths.take(tokens) if lengths is None else lengths
        pieces = []
        for a in range(0, len(tokens), SLICE):
            part = lengths[a:a + SLICE]
            before = np.cumsum(part, dtype=np.int32) - part  # bytes ahead of each token
            index = np.repeat(self._starts.take(tokens[a:a + SLICE]) - before, part)
            index += np.arange(len(index), dtype=np.int32)
            pieces.append(self._bytes.take(index).tobytes())
        return b"".join(pieces)

    def _check(self, tokens: np.ndarray, sizes: np.ndarray, raws: list[bytes], numbers: list[int]) -> None:
        lengths, ends = self._lengths.take(tokens), np.cumsum(sizes, dtype=np.int64)
        if (np.array_equal(np.flatnonzero(tokens == 0), ends - 1)
                and np.array_equal(np.add.reduceat(lengths, ends - sizes), [len(raw) for raw in raws])
                and self.decode(tokens, lengths) == b"".join(raws)):
            return
        for number, raw, end, size in zip(numbers, raws, ends.tolist(), sizes.tolist(), strict=True):
            document = tokens[end - size:end - 1]
            if self.decode(document) != raw or not document.all():
                raise JsonlError(self.path, number, "its tokens decode to another text",
                                 f"the tokenizer {self.tokenizer!r} makes a mistake: please report the line")


def convert(converter: Converter, encoders: Encoders) -> Iterator[Converted]:
    """Tokens of the converter's file, batch by batch in the order of the file, however many processes tokenise.

    Raises JsonlError (see Converter), OSError, ChildProcessError if a process died, and what the tokenizer raises.
    """
    parsed = map(converter.parse, read_batches(converter.path))
    for batch, encoded in encoders.map((batch, batch.texts) for batch in parsed):
        yield converter.finish(batch, *encoded)

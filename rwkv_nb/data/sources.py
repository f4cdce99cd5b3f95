"""Where training tokens come from: each data type of the official trainer as a flat run of tokens, or as rows.

A source has n_tokens and window(start, length), which copies just that window. Files stay on disk and are mapped into
memory; pickled to a DataLoader worker, a source takes its path along, not its tokens, and opens the file again there.

What it is not: a sampler (rwkv_nb.data.sampler), nor a check of token ids against the model (rwkv_nb.data.dataset).
Source: RWKV-LM `RWKV-v5/src/dataset.py`, December 2023; unlike there, "numpy" and "uint16" data stay on disk.
"""

from __future__ import annotations

import os
from functools import cached_property

import numpy as np

from rwkv_nb.data.binidx import MMapIndexedDataset, check_tokenizer
from rwkv_nb.data.characters import CharTokenizer

TEXT_TYPES = ("utf-8", "utf-16le", "dummy")
DATA_TYPES = ("binidx", "numpy", "uint16", *TEXT_TYPES)


class Source:
    """Tokens under a name. Subclasses say in `_open` how to get at them; `tokens` is opened at first use."""

    what = "tokens"

    def __init__(self, path: str):
        self.path = os.fspath(path)

    def _open(self) -> np.ndarray:
        raise NotImplementedError

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._open()

    @property
    def n_tokens(self) -> int:
        return self.tokens.size

    def n_starts(self, ctx_len: int) -> int:
        """How many places a window of ctx_len tokens and its target can start at. Raises ValueError if none."""
        if self.n_tokens <= ctx_len:
            raise ValueError(f"{self.path}: {self.n_tokens} {self.what}, too few for one window of ctx_len {ctx_len} "
                             f"and its target ({ctx_len + 1}); use more data, or a ctx_len below {self.n_tokens}")
        return self.n_tokens - ctx_len

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length - 1 as int64 (length,). Raises ValueError outside of the data."""
        if not 0 <= start <= self.n_tokens - length:
            raise ValueError(f"{self.path}: tokens {start} to {start + length} are not within its {self.n_tokens}")
        return self.tokens[start:start + length].astype(np.int64)

    def __getstate__(self) -> dict:  # the mapped file does not travel to a worker process, its path does
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


class Binidx(Source):
    """PREFIX.bin and PREFIX.idx. meta: what PREFIX.meta.json says, or None."""

    @cached_property
    def _file(self) -> MMapIndexedDataset:
        return MMapIndexedDataset(self.path)

    @property
    def meta(self) -> dict | None:
        return self._file.meta

    def _open(self) -> np.ndarray:
        return _integers(self._file.tokens, f"{self.path}.bin")

    def check_tokenizer(self, name: str, sha256: str | None) -> None:
        """Raises ValueError if the pair says that it was made by another tokenizer."""
        check_tokenizer(self.path, name, sha256)


class Numpy(Source):
    """A one-dimensional .npy file of integers."""

    def _open(self) -> np.ndarray:
        _must_exist(self.path, "numpy", "a .npy file, written by numpy.save")
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{self.path}: not a readable .npy file ({error}); write it with numpy.save") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{self.path}: an archive of arrays (.npz); write the one array with numpy.save")
        if array.ndim != 1:
            raise ValueError(f"{self.path}: the array has shape {array.shape}; it must be flat, of shape (n_tokens,): "
                             "save array.reshape(-1)")
        return _integers(array, self.path)


class Rows(Source):
    """Raw uint16 numbers, rows of row_len = my_sample_len tokens."""

    def __init__(self, path: str, row_len: int):
        super().__init__(path)
        self.row_len = row_len

    def _open(self) -> np.ndarray:
        _must_exist(self.path, "uint16", "a file of raw 16-bit numbers")
        if self.row_len < 2:
            raise ValueError(f"my_sample_len is {self.row_len}: data_type uint16 needs the length of a row, at least 2")
        size, row = os.path.getsize(self.path), 2 * self.row_len
        if size == 0 or size % row:
            raise ValueError(f"{self.path}: {size} bytes are no whole number of rows of my_sample_len = {self.row_len} "
                             f"tokens ({row} bytes); is my_sample_len right?")
        return np.memmap(self.path, dtype=np.uint16, mode="r")

    def n_starts(self, ctx_len: int) -> int:
        """The number of rows. Raises ValueError if a row, less its last token, is longer than ctx_len."""
        if self.row_len - 1 > ctx_len:
            raise ValueError(f"my_sample_len is {self.row_len}: rows of {self.row_len - 1} inputs do not fit ctx_len "
                             f"{ctx_len}; raise ctx_len")
        return self.n_tokens // self.row_len


class Text(Source):
    """A text file, one token a character. tokenizer: its CharTokenizer, ids in sorted order of the characters.

    The text is read whole: a character vocabulary needs every character. The ids are kept, in the smallest dtype.
    """

    what = "characters"

    def __init__(self, path: str, encoding: str):
        super().__init__(path)
        self.encoding = encoding
        self.tokenizer, self.tokens = _by_character(self._read())

    def _read(self) -> str:
        _must_exist(self.path, self.encoding, "a text file")
        try:
            with open(self.path, encoding=self.encoding) as file:
                text = file.read()
        except UnicodeError as error:
            raise ValueError(f"{self.path}: not {self.encoding} ({error}); the other text type is "
                             f"{'utf-16le' if self.encoding == 'utf-8' else 'utf-8'}, or convert the file") from error
        if not text:
            raise ValueError(f"{self.path}: the file is empty; give it some text")
        return text

    def _open(self) -> np.ndarray:
        tokenizer, ids = _by_character(self._read())
        if tokenizer.chars != self.tokenizer.chars:
            raise ValueError(f"{self.path}: the file has changed since training began; start again with the new text")
        return ids


class Dummy(Text):
    """The official test data: `.a+b=c.` a hundred thousand times, a = i mod 10000, b = i * i mod 10000, c = a + b."""

    def __init__(self) -> None:
        super().__init__("(dummy data)", "utf-8")

    def _read(self) -> str:
        sums = ((i % 10000, i * i % 10000) for i in range(100000))
        return "".join(f".{a}+{b}={a + b}." for a, b in sums)


class Mixture(Source):
    """Several binidx pairs listed in a text file (my_pile_version 2), one a line: `prefix [...] chunks cutoff`.

    chunks = its tokens - ctx_len, the number of starts it has. cutoff: the first start number that belongs to the next
    line. n_tokens = the last cutoff. A start s is in the first pair with cutoff > s, at (s - previous cutoff) % chunks:
    a pair whose range is wider than its chunks is read more than once, which is how a mixture gives it weight.
    Prefixes are relative to the current directory, as in the official trainer.
    """

    what = "starts"

    def __init__(self, path: str, ctx_len: int):
        super().__init__(path)
        _must_exist(self.path, "binidx with my_pile_version 2", "a text file with one `prefix chunks cutoff` a line")
        self.parts: list[tuple[int, int, Binidx]] = []
        with open(self.path, encoding="utf-8") as file:
            lines = file.read().strip().split("\n")
        for number, line in enumerate(lines, 1):
            self.parts.append(self._part(f"{self.path}, line {number}", line.split(), ctx_len))

    def _part(self, where: str, fields: list[str], ctx_len: int) -> tuple[int, int, Binidx]:
        try:
            prefix, chunks, cutoff = fields[0], int(fields[1]), int(fields[-1])
            if len(fields) < 3:
                raise IndexError
        except (IndexError, ValueError):
            raise ValueError(f"{where}: {' '.join(fields)!r} is not `prefix chunks cutoff`, two integers after "
                             "a name without spaces") from None
        part, previous = Binidx(prefix), self.parts[-1][0] if self.parts else 0
        if part.n_tokens - ctx_len != chunks or chunks < 1:
            raise ValueError(f"{where}: chunks is {chunks}; {prefix} has {part.n_tokens} tokens, so at ctx_len "
                             f"{ctx_len} it must be their difference, {part.n_tokens - ctx_len}, and positive")
        if cutoff <= previous:
            raise ValueError(f"{where}: cutoff is {cutoff}; it must be above the one before, {previous}")
        return cutoff, chunks, part

    @property
    def n_tokens(self) -> int:
        return self.parts[-1][0]

    def n_starts(self, ctx_len: int) -> int:
        return self.n_tokens

    def window(self, start: int, length: int) -> np.ndarray:
        previous = 0
        for cutoff, chunks, part in self.parts:
            if previous <= start < cutoff:
                return part.window((start - previous) % chunks, length)
            previous = cutoff
        raise ValueError(f"{self.path}: start {start} is not below the last cutoff, {self.n_tokens}")

    def check_tokenizer(self, name: str, sha256: str | None) -> None:
        for _, _, part in self.parts:
            part.check_tokenizer(name, sha256)

    @property
    def meta(self) -> dict | None:
        return self.parts[0][2].meta


def open_source(flags: object) -> Source:
    """The source that the flags data_type, data_file, my_pile_version, ctx_len and my_sample_len describe."""
    path = flags.data_file
    if flags.data_type == "dummy":
        return Dummy()
    if not path:
        raise ValueError(f"data_file is empty: data_type {flags.data_type} needs a path (binidx: the prefix)")
    if flags.data_type == "binidx":
        return Mixture(path, flags.ctx_len) if flags.my_pile_version == 2 else Binidx(path)
    if flags.data_type == "numpy":
        return Numpy(path)
    if flags.data_type == "uint16":
        return Rows(path, flags.my_sample_len)
    return Text(path, flags.data_type)


def _by_character(text: str) -> tuple[CharTokenizer, np.ndarray]:
    tokenizer = CharTokenizer.from_text(text)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    order = np.array([ord(char) for char in tokenizer.chars], dtype="<u4")  # sorted, so that a search finds the id
    dtype = np.min_scalar_type(len(order) - 1)
    return tokenizer, np.searchsorted(order, points).astype(dtype)


def _integers(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name}: dtype is {array.dtype}; tokens are integers: save it again as uint16 or int32")
    return array


def _must_exist(path: str, data_type: str, expected: str) -> None:
    if not path:
        raise ValueError(f"data_file is empty: data_type {data_type} needs the path of {expected}")
    if not os.path.isfile(path):
        raise ValueError(f"data_file {path}: no such file; data_type {data_type} needs {expected}")

"""The writer of .idx/.bin pairs: byte for byte the files of the official builder, in little memory, all or nothing.

What it is not: a converter from text (make_data.py). The layout and the way of publication: binidx_format.py.
Source: the class of the same name in RWKV-LM RWKV-v5/make_data.py.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from rwkv_nb.data.binidx_format import (
    BLOCK,
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    BinidxError,
    discard,
    flush,
    meta_bytes,
    publish,
)


def write_index(path: str | os.PathLike, sizes: np.ndarray | array, doc_idx: np.ndarray | array | None = None,
                dtype: object = np.uint16) -> None:
    """Write an index file and flush it to disk. sizes: (N,) tokens per item; doc_idx: (M,), or None for one document
    an item; dtype: that of the tokens. Memory: a few blocks, whatever N."""
    dtype = np.dtype(dtype)
    sizes = np.asarray(sizes)
    n_docs = len(sizes) + 1 if doc_idx is None else len(doc_idx)
    blocks = range(0, len(sizes), BLOCK)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype.newbyteorder("<")], len(sizes), n_docs))
        for a in blocks:
            file.write(sizes[a:a + BLOCK].astype("<i4").tobytes())
        address = 0
        for a in blocks:
            ends = address + np.cumsum(sizes[a:a + BLOCK], dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[address], ends[:-1]]).astype("<i8").tobytes())
            address = int(ends[-1])
        for a in range(0, n_docs, BLOCK):
            block = np.arange(a, min(a + BLOCK, n_docs)) if doc_idx is None else np.asarray(doc_idx[a:a + BLOCK])
            file.write(block.astype("<i8").tobytes())
        flush(file)


class MMapIndexedDatasetBuilder:
    """Writes a pair. As a context manager it publishes at the end, or on an exception removes what it wrote.

        with MMapIndexedDatasetBuilder("data/demo", tokenizer=tokenizer) as builder:
            for text in texts:
                builder.add_item(tokenizer.encode(text) + [0])
                builder.end_document()

    dtype: of the stored tokens; uint16 holds every vocabulary of up to 65536. tokenizer: written to PREFIX.meta.json.
    Nothing at PREFIX changes before `finalize`. Memory: 12 bytes a document.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: object = np.uint16, tokenizer: object = None):
        self.prefix, self.dtype, self.tokenizer = os.fspath(prefix), np.dtype(dtype), tokenizer
        if self.dtype.newbyteorder("<") not in CODES:
            raise ValueError(f"dtype {self.dtype} has no code in the index; use one of "
                             f"{', '.join(name.name for name in CODES)}")
        folder = os.path.dirname(os.path.abspath(self.prefix))
        if not os.path.isdir(folder):
            raise ValueError(f"prefix {self.prefix}: folder {folder} does not exist; create it first")
        discard(self.prefix)
        self._sizes, self._doc_idx, self._n_tokens = array("i"), array("q", [0]), 0
        self._file = open(self.prefix + ".bin.tmp", "wb", buffering=1 << 20)  # noqa: SIM115  closed by finalize

    def add_item(self, tokens: np.ndarray | Iterable[int]) -> None:
        """Append one item. tokens: (length,), integers of any type as long as each value fits the builder's dtype.

        Raises ValueError naming the item and the value otherwise; nothing is written then.
        """
        if self._file is None:
            raise ValueError(f"{self.prefix}: the builder is finished; make a new one")
        stored = self._convert(tokens)
        self._file.write(stored.tobytes())
        self._sizes.append(stored.size)
        self._n_tokens += stored.size

    def _convert(self, tokens: np.ndarray | Iterable[int]) -> np.ndarray:
        item = f"item {len(self._sizes)} of {self.prefix}"
        values = np.asarray(tokens if hasattr(tokens, "__len__") else list(tokens))
        if values.ndim != 1:
            raise ValueError(f"{item} has shape {values.shape}; expected one dimension of tokens")
        if values.size >= 1 << 31:
            raise ValueError(f"{item} has {values.size} tokens; an item may have 2147483647. Split the document")
        if values.size == 0 or values.dtype == self.dtype:
            return values.astype(self.dtype.newbyteorder("<"), copy=False)
        if self.dtype.kind not in "iu":
            fits = values.dtype.kind in "iuf" and np.can_cast(values.dtype, self.dtype)
            if not fits:
                raise ValueError(f"{item} is {values.dtype}; {self.dtype} cannot hold it exactly. Convert it first")
        elif values.dtype.kind not in "iu":
            raise ValueError(f"{item} is {values.dtype} and begins with {values[0]!r}; expected integers for "
                             f"{self.dtype}")
        else:
            limits = np.iinfo(self.dtype)
            for value in (int(values.min()), int(values.max())):
                if not limits.min <= value <= limits.max:
                    raise ValueError(f"{item} holds {value}; {self.dtype} goes from {limits.min} to {limits.max}. "
                                     "Another tokenizer? A larger vocabulary needs dtype=np.int32")
        return values.astype(self.dtype.newbyteorder("<"))

    def end_document(self) -> None:
        """The items since the last call are one document."""
        self._doc_idx.append(len(self._sizes))

    def finalize(self) -> None:
        """Flush everything to disk and put the new pair in place of an older one."""
        if self._file is None:
            raise ValueError(f"{self.prefix}: the builder is finished; make a new one")
        try:
            flush(self._file)
            written, expected = self._file.tell(), self._n_tokens * self.dtype.itemsize
            self._close()
            if written != expected:  # an add_item failed half-way, and its exception was swallowed
                raise BinidxError(self.prefix + ".bin.tmp", "length", written, expected, "Is the disk full?")
            write_index(self.prefix + ".idx.tmp", self._sizes, self._doc_idx, self.dtype)
            if self.tokenizer is not None:
                with open(self.prefix + ".meta.json.tmp", "wb") as file:
                    file.write(meta_bytes(self.tokenizer, len(self._sizes), self._n_tokens, self.dtype))
                    flush(file)
            publish(self.prefix)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give up: remove the temporary files, leave the present pair as it is."""
        with suppress(OSError):  # on a full disk there is no room for what is still in its buffer
            self._close()
        discard(self.prefix)

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def __enter__(self) -> MMapIndexedDatasetBuilder:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._file is not None:
            if kind is None:
                self.finalize()
            else:
                self.abort()

"""The .idx/.bin pair ("MMIDIDX"): documents as token ids, written once and read through a memory map.

    with MMapIndexedDatasetBuilder("data/demo", tokenizer=tokenizer) as builder:
        builder.add_item(tokenizer.encode("Hello") + [0])  # token 0 ends a document
        builder.end_document()
    data = MMapIndexedDataset("data/demo")
    data[0], data.tokens[5:5 + ctx_len + 1]

Here: the reader and what PREFIX.meta.json says. The layout byte by byte and how a pair is replaced are in
binidx_format.py, the builder is in binidx_builder.py; their names can be imported from here.

Dtype codes 6 and 7 mean float32 and float64 in fairseq, float64 and float32 in Megatron-core (RWKV's reader fails
on 6): the length of .bin decides which it is. A code swapped for another of the same width (8 and 3, 4 and 6) cannot be
seen from the two files; PREFIX.meta.json names the dtype and gives it away.

What it is not: a tokenizer (tokenizer.py), a converter (make_data.py), a sampler (dataset.py).
Source: RWKV-LM RWKV-v5/src/binidx.py.
"""

from __future__ import annotations

import mmap
import operator
import os

import numpy as np

from rwkv_nb.data.binidx_builder import MMapIndexedDatasetBuilder, write_index
from rwkv_nb.data.binidx_format import (
    BLOCK,
    DTYPES,
    HEADER,
    MAGIC,
    REBUILD,
    VERSION,
    BinidxError,
    discard,
    flush,
    meta_bytes,
    publish,
    read_meta,
    recover,
    remove,
)

__all__ = ["BinidxError", "MMapIndexedDataset", "MMapIndexedDatasetBuilder", "check_tokenizer", "discard", "flush",
           "publish", "recover", "write_index", "write_meta"]


def write_meta(prefix: str | os.PathLike, tokenizer: object) -> None:
    """Say in PREFIX.meta.json that `tokenizer` (.name, .sha256, .vocab_size) made the pair that is already there."""
    prefix = os.fspath(prefix)
    remove(prefix + ".meta.json.tmp")
    with MMapIndexedDataset(prefix, ignore_meta=True) as data, open(prefix + ".meta.json.tmp", "wb") as file:
        file.write(meta_bytes(tokenizer, len(data), data.n_tokens, data.dtype))
        flush(file)
    os.replace(prefix + ".meta.json.tmp", prefix + ".meta.json")


def check_tokenizer(prefix: str | os.PathLike, name: str, sha256: str | None = None) -> None:
    """Raise BinidxError if PREFIX.meta.json says that another tokenizer made the data. No such file: no complaint.

    Files are compared by SHA-256 of the vocabulary where both sides have one, else by name.
    """
    path = os.fspath(prefix) + ".meta.json"
    if os.path.exists(os.fspath(prefix) + ".idx.new"):
        recover(prefix)
    meta = read_meta(path)
    if meta is None:
        return
    by_hash = sha256 is not None and meta.get("sha256") is not None
    if (meta["sha256"] != sha256) if by_hash else (meta["tokenizer"] != name):
        raise BinidxError(path, "tokenizer", f"{meta['tokenizer']!r} (sha256 {meta.get('sha256')})",
                          f"{name!r} (sha256 {sha256})", f"These tokens mean other text to {name!r}: use "
                          f"{meta['tokenizer']!r} for training, or rebuild the data with {name!r}.")


def _map(path: str) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise BinidxError(path, "file", "missing", "PREFIX.bin and PREFIX.idx beside each other",
                          "Give the prefix without .bin or .idx, or build the pair with make_data.") from error


class MMapIndexedDataset:
    """Reads a pair: `data[i]` is item i as a read-only view into the mapped file, `data[a:b]` a list of them.

    sizes (N,) int32, doc_idx (M,) int64, tokens (n_tokens,): read-only views, valid as long as you hold them, also
    after `close`. n_tokens: the length of .bin, as in the official reader. meta: dict of PREFIX.meta.json, or None.
    verify=False checks header and lengths and leaves out the pass over all items. Raises BinidxError.
    """

    def __init__(self, prefix: str | os.PathLike, verify: bool = True, *, ignore_meta: bool = False):
        self.prefix, self.closed = os.fspath(prefix), False
        if os.path.exists(self.prefix + ".idx.new"):
            recover(self.prefix)
        index, data = _map(self.prefix + ".idx"), _map(self.prefix + ".bin")
        code, n_items, n_docs = self._read_header(index)
        self.sizes = self._array(index, "<i4", n_items, HEADER.size)
        self._pointers = self._array(index, "<i8", n_items, HEADER.size + 4 * n_items)
        self.doc_idx = self._array(index, "<i8", n_docs, HEADER.size + 12 * n_items)
        if verify:
            self.dtype = self._check_sizes(code, len(data))
            self._check_pointers()
            self._check_doc_idx()
        else:
            self.dtype = self._dtype_of(code, len(data), None)
        self.tokens = self._array(data, self.dtype, len(data) // self.dtype.itemsize, 0)
        self.n_tokens = len(self.tokens)
        self.meta = None if ignore_meta else read_meta(self.prefix + ".meta.json")
        self._check_meta()

    @staticmethod
    def _array(buffer: mmap.mmap | bytes, dtype: object, count: int, offset: int) -> np.ndarray:
        if count == 0:
            empty = np.empty(0, dtype)
            empty.setflags(write=False)
            return empty
        return np.frombuffer(buffer, dtype, count, offset)

    def _fail(self, part: str, field: str, value: object, expected: object, remedy: str = REBUILD) -> None:
        raise BinidxError(self.prefix + part, field, value, expected, remedy)

    def _read_header(self, index: mmap.mmap | bytes) -> tuple[int, int, int]:
        if len(index) < HEADER.size:
            self._fail(".idx", "length", f"{len(index)} bytes", f"at least {HEADER.size}")
        magic, version, code, n_items, n_docs = HEADER.unpack(index[:HEADER.size])
        if magic != MAGIC:
            self._fail(".idx", "magic", magic, MAGIC, "This is not an index of the memory-mapped kind (MMIDIDX).")
        if version != VERSION:
            self._fail(".idx", "version", version, VERSION)
        if code not in DTYPES:
            self._fail(".idx", "dtype code", code, "1 to 8")
        length = HEADER.size + 12 * n_items + 8 * n_docs
        if len(index) != length:
            self._fail(".idx", "length", f"{len(index)} bytes",
                       f"{length} for N = {n_items} items and M = {n_docs} document bounds")
        return code, n_items, n_docs

    def _dtype_of(self, code: int, n_bytes: int, n_tokens: int | None) -> np.dtype:
        """The dtype a code means. Codes 6 and 7 have two meanings: the length of .bin decides.

        n_tokens: by the sizes; None: the last item alone is looked at, it must end where the file ends.
        """
        lengths = {}
        for name in {6: ("<f4", "<f8"), 7: ("<f8", "<f4")}.get(code, (DTYPES[code],)):
            dtype = np.dtype(name)
            if n_tokens is not None:
                lengths[dtype] = n_tokens * dtype.itemsize
            else:
                lengths[dtype] = int(self._pointers[-1]) + int(self.sizes[-1]) * dtype.itemsize if len(self) else 0
            if n_bytes == lengths[dtype]:
                return dtype
        self._fail(".bin", "length", f"{n_bytes} bytes",
                   f"{' or '.join(map(str, lengths.values()))} by the sizes in {self.prefix}.idx",
                   "The two files are not of one pair, or .bin was cut short: copy both again or rebuild them.")

    def _check_sizes(self, code: int, n_bytes: int) -> np.dtype:
        if len(self.sizes) and self.sizes.min() < 0:
            i = int(np.argmin(self.sizes))
            self._fail(".idx", f"sizes[{i}]", int(self.sizes[i]), "0 or more")
        return self._dtype_of(code, n_bytes, int(self.sizes.sum(dtype=np.int64)))

    def _check_pointers(self) -> None:
        address = 0
        for a in range(0, len(self.sizes), BLOCK):
            ends = address + np.cumsum(self.sizes[a:a + BLOCK], dtype=np.int64) * self.dtype.itemsize
            expected = np.concatenate([[address], ends[:-1]])
            wrong = np.flatnonzero(self._pointers[a:a + BLOCK] != expected)
            if len(wrong):
                i = int(wrong[0])
                self._fail(".idx", f"pointers[{a + i}]", int(self._pointers[a + i]),
                           f"{int(expected[i])}, the bytes of the items before it")
            address = int(ends[-1])

    def _check_doc_idx(self) -> None:
        before = 0
        for a in range(0, len(self.doc_idx), BLOCK):
            block = self.doc_idx[a:a + BLOCK]
            lowest = np.concatenate([[before], block[:-1]])
            wrong = np.flatnonzero((block < lowest) | (block > len(self.sizes)))
            if len(wrong):
                i = int(wrong[0])
                self._fail(".idx", f"doc_idx[{a + i}]", int(block[i]),
                           f"{int(lowest[i])} to {len(self.sizes)}: an item's number, never falling")
            before = int(block[-1])

    def _check_meta(self) -> None:
        found = {"dtype": self.dtype.name, "n_items": len(self), "n_tokens": self.n_tokens}
        for field, value in found.items():
            if self.meta is not None and self.meta.get(field, value) != value:
                self._fail(".meta.json", field, repr(self.meta[field]), f"{value!r} as in the pair beside it",
                           "The pair was changed, or replaced by a tool that does not know this file. If the pair is "
                           "good, delete it or write it anew with write_meta; if not, rebuild the pair.")

    def __len__(self) -> int:
        return len(self.sizes)

    def _position(self, idx: int) -> int:
        if self.closed:
            raise ValueError(f"{self.prefix}: the dataset is closed; open it again")
        i = operator.index(idx)
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.prefix}: item {i} of {len(self)}")
        return i % len(self)

    def __getitem__(self, idx: int | slice) -> np.ndarray | list[np.ndarray]:
        """Item `idx`, or a list of items; read-only views. Negative numbers count from the end."""
        if isinstance(idx, slice):
            return [self.get(i) for i in range(*idx.indices(len(self)))]
        return self.get(idx)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens (default: to the item's end) from the `offset`-th of item `idx` on: (length,), read-only.

        As in the official reader a length may lead past the item's end, through later documents: windows are read as
        item 0 with an offset. Past the end of .bin: ValueError.
        """
        i = self._position(idx)
        length = int(self.sizes[i]) - offset if length is None else length
        start = int(self._pointers[i]) // self.dtype.itemsize + offset
        if offset < 0 or length < 0 or start + length > self.n_tokens:
            raise ValueError(f"{self.prefix}.bin: offset {offset}, length {length} from item {i} "
                             f"is not within its {self.n_tokens} tokens")
        return self.tokens[start:start + length]

    def close(self) -> None:
        """Let go of the files. Views already handed out stay valid; the map ends with the last of them."""
        self.tokens = self.sizes = self.doc_idx = self._pointers = np.empty(0)
        self.n_tokens, self.closed = 0, True

    def __enter__(self) -> MMapIndexedDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return type(self), (self.prefix, False)  # for DataLoader workers: the parent has already checked it

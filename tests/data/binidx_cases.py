"""A tiny .idx/.bin pair written out by hand, and an independent reader, shared by the tests of binidx."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rwkv_nb.data.binidx import (
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
)

DOCUMENTS = [[33155, 0], [24281, 59, 33520, 261, 0], [65535, 0]]
WORLD = SimpleNamespace(name="rwkv_vocab_v20230424", sha256="e6dee3d4", vocab_size=65536)
PILE = SimpleNamespace(name="20B_tokenizer", sha256="aaaa", vocab_size=50277)
# Written out by hand from the layout, not by the code under test.
FIXTURE_BIN = struct.pack("<9H", 33155, 0, 24281, 59, 33520, 261, 0, 65535, 0)
FIXTURE_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)  # version
    + struct.pack("<B", 8)  # uint16
    + struct.pack("<Q", 3)  # items
    + struct.pack("<Q", 4)  # document bounds
    + struct.pack("<3i", 2, 5, 2)
    + struct.pack("<3q", 0, 4, 14)
    + struct.pack("<4q", 0, 1, 2, 3)
)


def build(prefix: Path, documents: list, **kwargs) -> None:
    with MMapIndexedDatasetBuilder(prefix, **kwargs) as builder:
        for document in documents:
            builder.add_item(document)
            builder.end_document()


def put(prefix: Path, idx: bytes, data: bytes) -> None:
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(data)


def official(prefix: Path) -> list[list[int]]:
    """The official reading, written again from the documented offsets: header fields one by one, then frombuffer."""
    idx, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00" and struct.unpack_from("<Q", idx, 9) == (1,)
    dtype = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 7: "f8", 8: "u2"}[idx[17]]
    (n,), (m,) = struct.unpack_from("<Q", idx, 18), struct.unpack_from("<Q", idx, 26)
    sizes = np.frombuffer(idx, "<i4", n, 34)
    pointers = np.frombuffer(idx, "<i8", n, 34 + 4 * n)
    assert len(idx) == 34 + 12 * n + 8 * m
    return [np.frombuffer(data, "<" + dtype, int(size), int(p)).tolist() if size else []
            for size, p in zip(sizes, pointers, strict=True)]


def content(prefix: Path) -> tuple:
    with MMapIndexedDataset(prefix) as data:
        return [item.tolist() for item in data], data.doc_idx.tolist(), data.dtype

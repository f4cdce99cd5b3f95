"""What the reader and the writer of .idx/.bin pairs share: layout, error, safe publication, side file.

    PREFIX.bin   the tokens of all items back to back, little endian, in the dtype that the index names
    PREFIX.idx   bytes 0 to 8 b"MMIDIDX\\0\\0"; 9 to 16 u64 version = 1; 17 u8 dtype code; 18 to 25 u64 N, the number
                 of items; 26 to 33 u64 M, the length of doc_idx; then i32 sizes[N] (tokens), i64 pointers[N] (bytes
                 into .bin), i64 doc_idx[M] (first item of each document, N at the end). 34 + 12 N + 8 M bytes.
    PREFIX.meta.json   ours, optional: which tokenizer made the tokens. The official reader ignores it.

In RWKV's data every document is one item that ends with token 0, so M = N + 1 and the index has 42 + 20 N bytes.

Replacing a pair is safe against a kill at any moment: a writer completes PREFIX.*.tmp, then `publish` renames them to
.new, the index last (that rename is the commit), then .new to the final names. Whoever finds PREFIX.idx.new finishes
the job with `recover`. One writer per prefix: nothing here locks.

Source of the layout: RWKV-LM RWKV-v5/src/binidx.py, which has it from Megatron-LM and fairseq.
"""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, M: 34 bytes, no padding
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}  # as fairseq writes
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
REBUILD = "The file is damaged or was cut short: copy it again or rebuild the pair with make_data."
PARTS = (".bin", ".meta.json", ".idx")  # in the order of publication: the index last
BLOCK = 1 << 20  # items handled at once when an index is written or checked: 8 MB an array


class BinidxError(ValueError):
    """A pair that cannot be read as it stands. Names file, field, value, expected value and remedy."""

    def __init__(self, path: str, field: str, value: object, expected: object, remedy: str):
        self.path, self.field, self.value, self.expected, self.remedy = path, field, value, expected, remedy
        super().__init__(f"{path}: {field} is {value}, expected {expected}. {remedy}")

def _sync_folder(prefix: str) -> None:
    """Make renames survive a power cut, where the system can (not on Windows)."""
    with suppress(OSError):
        folder = os.open(os.path.dirname(os.path.abspath(prefix)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(path: str) -> None:
    """Delete a file if it is there."""
    with suppress(FileNotFoundError):
        os.remove(path)


def recover(prefix: str | os.PathLike) -> bool:
    """Finish or undo a publication that was cut off; True if there was a committed one to finish. Safe to repeat.

    PREFIX.idx.new present: the commit happened, the remaining renames are done. Absent: leftover .new files go.
    """
    prefix = os.fspath(prefix)
    if not os.path.exists(prefix + ".idx.new"):
        for part in PARTS:
            remove(prefix + part + ".new")
        return False
    try:
        for part in PARTS:
            new = prefix + part + ".new"
            if part == ".idx":
                _sync_folder(prefix)  # the other two first, on disk too
            if part == ".meta.json" and os.path.exists(new) and os.path.getsize(new) == 0:
                remove(prefix + part)  # an empty one says: the new pair has none
                remove(new)
            else:
                with suppress(FileNotFoundError):  # renamed before the kill, or by a reader that helped
                    os.replace(new, prefix + part)
    except OSError as error:
        raise BinidxError(prefix + ".idx.new", "publication", f"cut off and cannot be finished ({error.strerror})",
                          "a folder and files that can be written",
                          "Open the pair once from an account that may write there.") from error
    _sync_folder(prefix)
    return True


def publish(prefix: str | os.PathLike) -> None:
    """Put PREFIX.bin.tmp, PREFIX.idx.tmp and, if there, PREFIX.meta.json.tmp in the place of the present files.

    The .tmp files must be complete and flushed (`fsync`). Killed at any moment, the old or the new pair stays usable,
    after `recover` where needed. Without PREFIX.meta.json.tmp an older PREFIX.meta.json is removed.
    """
    prefix = os.fspath(prefix)
    recover(prefix)
    for part in (".bin", ".idx"):
        if not os.path.exists(prefix + part + ".tmp"):
            raise BinidxError(prefix + part + ".tmp", "file", "missing", "a complete file", "Write it, then publish.")
    if os.path.exists(prefix + ".meta.json") and not os.path.exists(prefix + ".meta.json.tmp"):
        open(prefix + ".meta.json.tmp", "wb").close()
    for part in PARTS:
        if part == ".idx":
            _sync_folder(prefix)
        if os.path.exists(prefix + part + ".tmp"):
            os.replace(prefix + part + ".tmp", prefix + part + ".new")  # for .idx: the commit
    recover(prefix)


def discard(prefix: str | os.PathLike) -> None:
    """Remove what an unfinished writer left behind (.tmp files, uncommitted .new files); the present pair stays."""
    for part in PARTS:
        remove(os.fspath(prefix) + part + ".tmp")
    recover(prefix)


def flush(file: BinaryIO) -> None:
    """Hand everything written so far to the disk itself: a rename must not overtake its data."""
    file.flush()
    os.fsync(file.fileno())


def meta_bytes(tokenizer: object, n_items: int, n_tokens: int, dtype: np.dtype) -> bytes:
    """The content of PREFIX.meta.json. tokenizer: anything with .name, .sha256, .vocab_size."""
    meta = {"tokenizer": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name, "n_items": n_items, "n_tokens": n_tokens}
    return (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode()


def read_meta(path: str) -> dict | None:
    """The content of a PREFIX.meta.json, None if there is no such file. Raises BinidxError."""
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8; brackets within brackets
        raise BinidxError(path, "content", f"not JSON ({error})", "a JSON object",
                          "Delete the file, or write it anew with write_meta.") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("tokenizer"), str):
        raise BinidxError(path, "tokenizer", meta.get("tokenizer") if isinstance(meta, dict) else meta,
                          "the tokenizer's name", "Delete the file, or write it anew with write_meta.")
    return meta

"""What a `.pth` or `.state` file holds, read without running any of it and without believing what it says of itself.

    content = read_torch_file("rwkv-3.pth")      tensors on the CPU

torch's `weights_only=True` refuses code. Beyond that the checksums of the zip archive are looked at, which torch does
not do, so that a flipped bit is found. And a tensor is refused that claims more numbers than the file has, where torch
would add whatever lies in memory, or that is not plain numbers (sparse, quantised, on the "meta" device).

What it is not: a check of names and shapes (weights.py, training/trainer_state.py). Errors are CODE or DAMAGE; callers
put them into words, with the file's name.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import torch

CODE = (pickle.UnpicklingError,)
# What torch and zipfile raise for files that are cut, foreign or changed.
DAMAGE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    AssertionError, NotImplementedError, RecursionError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
_sound: set[tuple] = set()  # path, number, size and time of files whose checksums were right


def read_torch_file(path: str | os.PathLike, *, mmap: bool = False) -> Any:
    """What torch.save put into `path`. Raises one of CODE or DAMAGE; OSError for a file that cannot be opened.

    mmap: the tensors' bytes stay in the file until they are used, which must not change meanwhile; their checksums are
    looked at once in a process. Files older than torch 1.6 are read whole all the same.
    """
    with open(path, "rb") as file:
        room, archived = os.fstat(file.fileno()).st_size, zipfile.is_zipfile(file)
        if archived:
            with zipfile.ZipFile(file) as archive:
                room = sum(entry.file_size for entry in archive.infolist())
                found = os.fstat(file.fileno())
                name = (os.path.abspath(path), found.st_ino, found.st_size, found.st_mtime_ns)
                wrong = None if mmap and name in _sound else archive.testzip()
            if wrong is not None:
                raise zipfile.BadZipFile(f"wrong checksum in {wrong}")
            _sound.add(name)
        file.seek(0)
        source = os.fspath(path) if archived and mmap else file
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=archived and mmap)
    storages = {}
    for tensor in _tensors(content):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"a tensor in it is {kind}, not plain numbers")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > room:
        raise ValueError("its tensors claim more numbers than it has")
    return content


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for part in content.values():
            yield from _tensors(part)
    elif isinstance(content, list | tuple | set):
        for part in content:
            yield from _tensors(part)

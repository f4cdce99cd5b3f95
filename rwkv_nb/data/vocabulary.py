"""The World vocabulary's file: where it is, whether it is the right one, and what it says.

A line is "id literal length": the literal is a Python str (its UTF-8 bytes are meant) or bytes and may hold blanks; the
length counts bytes. Ids run from 1 to 65529; the file is sorted by length, then by bytes.
What it is not: text to be executed. Literals are parsed with ast.literal_eval, never with eval.
Source: rwkv_vocab_v20230424.txt of the `rwkv` package; it occurs with and without carriage returns.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from pathlib import Path

NAME = "rwkv_vocab_v20230424"
SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"  # of the file without carriage returns
VOCAB_SIZE = 65536  # rows of the embedding: the 65,529 entries, id 0, and six ids that nothing uses
_CHUNK = 2048  # lines parsed at once: faster than one by one, without a syntax tree of the whole file


class VocabularyError(ValueError):
    """The vocabulary file is missing or is not the one that World models were trained with."""


def default_vocab_path() -> Path:
    """The vocabulary file inside the installed `rwkv` package, found without importing it (which would load torch)."""
    spec = importlib.util.find_spec("rwkv")
    if spec is None or not spec.submodule_search_locations:
        raise VocabularyError("vocabulary: the package `rwkv`, which carries the file, is not installed; "
                              "run `pip install rwkv` or pass vocab_path")
    return Path(spec.submodule_search_locations[0]) / f"{NAME}.txt"


def read_vocabulary(path: str | os.PathLike) -> dict[int, bytes]:
    """Id -> bytes of every entry, after the file's SHA-256 was verified. Raises VocabularyError."""
    data = read_verified(Path(path)).decode("utf-8")
    lines = [line for line in data.split("\n") if line]  # not splitlines, which knows other line ends too
    vocabulary: dict[int, bytes] = {}
    for start in range(0, len(lines), _CHUNK):
        chunk = lines[start:start + _CHUNK]
        literals = ast.literal_eval("[" + ",".join(line[line.index(" "):line.rindex(" ")] for line in chunk) + "]")
        for line, literal in zip(chunk, literals, strict=True):
            entry = literal.encode("utf-8") if isinstance(literal, str) else literal
            vocabulary[int(line[:line.index(" ")])] = entry
    return vocabulary


def read_verified(path: Path) -> bytes:
    """The file's bytes without carriage returns (some releases have them), if they are the right ones."""
    try:
        data = path.read_bytes().replace(b"\r", b"")
    except OSError as error:
        raise VocabularyError(f"vocabulary {path}: cannot be read ({error.strerror}); "
                              "run `pip install --force-reinstall rwkv` or pass vocab_path") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise VocabularyError(f"vocabulary {path}: SHA-256 is {found}, expected {SHA256} ({NAME}); the file is damaged "
                              "or another vocabulary: run `pip install --force-reinstall rwkv` or pass vocab_path")
    return data

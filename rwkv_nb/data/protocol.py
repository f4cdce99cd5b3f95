"""What every tokenizer of the course can do, as a type for annotations.

What it is not: a base class. `WorldTokenizer` and `CharTokenizer` do not inherit from it; they have what it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back. vocab_size: rows of the model's embedding; vocab: the bytes of each id."""

    name: str
    vocab_size: int

    @property
    def vocab(self) -> Mapping[int, bytes]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...

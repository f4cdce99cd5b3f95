"""One id a character: the tokenizer of small models that read a text character by character.

Ids follow the sorted order of the characters, as in the official trainer's data types "utf-8" and "utf-16le". Id 0 is
therefore an ordinary character here (often the newline), not the end of a document as in the World vocabulary.

    tokenizer = CharTokenizer.from_text("hello")     # e h l o
    tokenizer.encode("hole")                         # [1, 3, 2, 0]

What it is not: able to encode characters that it was not made with; the World tokenizer can.
File: vocab.json, {"0": "\\n", "1": " ", ...}, as the official trainer writes beside its checkpoints; official code
it in UTF-8 in one place and read it as UTF-16 in another, so `load` reads both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rwkv_nb.data.tokenizer import plain_ids, utf8_bytes


class CharTokenizer:
    """Characters to ids and back. vocab_size = number of characters; name = "characters-<n>-<first 8 of sha256>".

    chars: the characters in the order of their ids, each once. Raises ValueError for repeated, empty or longer entries
    and for lone surrogates. `sha256` is that of the characters joined, in UTF-8.
    """

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = tuple(chars)
        if not self.chars:
            raise ValueError("characters: the vocabulary is empty; it needs at least one character")
        self._ids: dict[str, int] = {}
        for position, char in enumerate(self.chars):
            if not isinstance(char, str) or len(char) != 1:
                raise ValueError(f"characters: entry {position} is {char!r}, not one character")
            if char in self._ids:
                raise ValueError(f"characters: {char!r} stands at {self._ids[char]} and again at {position}; "
                                 "give each character once")
            self._ids[char] = position
        self.sha256 = hashlib.sha256(utf8_bytes("".join(self.chars), "characters")).hexdigest()
        self.vocab_size = len(self.chars)
        self.name = f"characters-{self.vocab_size}-{self.sha256[:8]}"

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The characters that occur in `text`, sorted by code point."""
        utf8_bytes(text)
        if not text:
            raise ValueError("text: empty, so it has no characters to make a vocabulary of")
        return cls(sorted(set(text)))

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"CharTokenizer({self.name})"

    @property
    def vocab(self) -> dict[int, bytes]:
        """Id -> UTF-8 bytes of every character."""
        return {i: char.encode("utf-8") for i, char in enumerate(self.chars)}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, one a character. Raises ValueError naming the first unknown character and its position."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            char = error.args[0]
            raise ValueError(f"text: character {char!r} (U+{ord(char):04X}) at position {text.index(char)} is not "
                             f"among the {self.vocab_size} of {self.name}; remove it, or make the tokenizer "
                             "(and the model) from a text that has it") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of `ids`. `errors` is there for the World tokenizer's sake: characters are never invalid.

        Raises ValueError naming the first unknown id and its position.
        """
        ids = plain_ids(ids)
        for position, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids: unknown id {i} at position {position}; {self.name} has ids 0 to "
                                 f"{self.vocab_size - 1}: do the ids come from another tokenizer?")
        return "".join([self.chars[i] for i in ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of `ids` in UTF-8; what IncrementalDecoder takes."""
        return self.decode(ids).encode("utf-8")

    def save(self, path: str | os.PathLike) -> None:
        """Write vocab.json in UTF-8, as a whole or not at all."""
        path = Path(path)
        text = json.dumps(dict(enumerate(self.chars)), ensure_ascii=False, indent=0)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(text.encode("utf-8"))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> CharTokenizer:
        """Read vocab.json in UTF-8 or UTF-16, with or without byte order mark. Raises ValueError naming the file."""
        path = Path(path)
        try:
            entries = json.loads(path.read_bytes())  # finds out UTF-8, UTF-16 and UTF-32 by itself
            if not isinstance(entries, dict) or any(str(i) not in entries for i in range(len(entries))):
                raise ValueError('expected an object with the keys "0", "1", ... without gaps')
            return cls(entries[str(i)] for i in range(len(entries)))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); a character model needs the vocab.json that "
                             "was written beside it") from error
        except (ValueError, RecursionError) as error:  # the latter: brackets within brackets
            raise ValueError(f"{path}: not a character vocabulary ({error}); it should look like "
                             '{"0": "\\n", "1": " ", ...}: take the file written beside the model') from error

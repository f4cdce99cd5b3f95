"""Tokenizers and their files: any bytes, any text, any ids; damaged vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.tokenizer import IncrementalDecoder, WorldTokenizer
from rwkv_nb.data.vocabulary import VocabularyError, default_vocab_path

from . import damaged, demand, refusal


class Greedy:
    """The independent path: the longest entry at each place, found in sets of entries of one length; no tree."""

    def __init__(self, vocabulary: dict[int, bytes]):
        self.ids = {entry: token for token, entry in vocabulary.items()}
        self.lengths: dict[bytes, list[int]] = {}
        for entry in vocabulary.values():
            lengths = self.lengths.setdefault(entry[:2], [])
            if len(entry) not in lengths:
                lengths.append(len(entry))
        for lengths in self.lengths.values():
            lengths.sort(reverse=True)

    def encode(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            pieces = (data[at : at + n] for n in [*self.lengths.get(data[at : at + 2], ()), 1])
            piece = next(piece for piece in pieces if piece in self.ids)
            ids.append(self.ids[piece])
            at += len(piece)
        return ids


ENDS = [
    0x41,
    0x7F,
    0x80,
    0x7FF,
    0x800,
    0xD7FF,
    0xD800,
    0xDBFF,
    0xDC00,
    0xDFFF,
    0xE000,
    0xFFFD,
    0xFFFF,
    0x10000,
    0x1F600,
    0x10FFFF,
    0,
    10,
    13,
    0x2028,
    0xFEFF,
]


def some_text(draw: Random, longest: int = 60) -> str:
    """Characters of all planes, at the ends of UTF-8's ranges, and half characters (surrogates) now and then."""
    kinds = draw.sample(["ascii", "any", "ends", "cjk"], draw.randint(1, 2))
    points = []
    for _ in range(draw.randint(0, longest)):
        kind = draw.choice(kinds)
        points.append(
            {
                "ascii": draw.randint(9, 126),
                "any": draw.randint(0, 0x10FFFF),
                "cjk": draw.randint(0x4E00, 0x9FFF),
                "ends": draw.choice(ENDS),
            }[kind]
        )
    text = "".join(map(chr, points))
    return text if draw.random() < 0.2 else text.encode("utf-8", "ignore").decode()


def some_bytes(draw: Random, entries: list[bytes]) -> bytes:
    pieces = []
    for _ in range(draw.randint(0, 12)):
        kind = draw.randrange(5)
        piece = draw.choice(entries) if kind < 3 else draw.randbytes(draw.randint(1, 12))
        piece = piece[: draw.randint(1, len(piece))] if kind == 2 else piece
        pieces.append(piece * draw.randint(1, 40) if kind == 4 else piece)
    return b"".join(pieces)


def tokenizer(folder: Path) -> Callable[[Random], str]:
    """Bytes, texts, lists of texts and ids, through Rust and through the trie."""
    fast, pure = WorldTokenizer(), WorldTokenizer(fast=False)
    vocabulary = dict(fast.vocab)
    greedy, entries = Greedy(vocabulary), list(vocabulary.values())

    def of_bytes(draw: Random) -> str:
        data = some_bytes(draw, entries)
        truth = greedy.encode(data)
        demand(fast.encode_bytes(data) == truth, f"fast: other ids for {data!r}")
        demand(pure.encode_bytes(data) == truth, f"pure: other ids for {data!r}")
        demand(fast.decode_bytes(truth) == data, f"decode_bytes gives other bytes than {data!r}")
        text = data.decode("utf-8", "replace")
        demand(fast.decode(truth) == text, f"decode gives another text than {text!r}")
        decoder = IncrementalDecoder(fast)
        demand(
            "".join([*map(decoder.push, truth), decoder.finish()]) == text, f"piece by piece: other text than {text!r}"
        )
        return "right"

    def of_text(draw: Random) -> str:
        texts = [some_text(draw) for _ in range(draw.choice((1, 1, 3)))]
        half = [any(0xD800 <= ord(c) <= 0xDFFF for c in text) for text in texts]
        outcome = "right"
        for one in (fast, pure):
            try:
                ids = one.encode_batch(texts) if len(texts) > 1 else [one.encode(texts[0])]
            except ValueError as error:
                demand(any(half), f"{one}: refuses {texts!r}")
                outcome = refusal(error, "surrogate")
            else:
                demand(not any(half), f"{one}: takes half a character in {texts!r}")
                demand(ids == [greedy.encode(text.encode()) for text in texts], f"{one}: other ids for {texts!r}")
                demand([one.decode(i) for i in ids] == texts, f"{one}: no round trip for {texts!r}")
        return outcome

    def of_ids(draw: Random) -> str:
        odd = (-1, 65530, 65535, 65536, 10**30, -(2**63), 3.0, True, None, "1", [1], float("nan"), b"x", 1j)
        ids = [draw.choice(odd) if draw.random() < 0.05 else draw.randint(0, 65529) for _ in range(draw.randint(0, 20))]
        known = all(type(i) is int and 0 <= i <= 65529 for i in ids)
        try:
            data = fast.decode_bytes(ids)
        except ValueError as error:
            demand(not known, f"refuses {ids!r}")
            return refusal(error, "position")
        demand(known, f"takes {ids!r}")
        demand(data == b"".join(vocabulary[i] for i in ids if i), f"other bytes for {ids!r}")
        demand(fast.decode(ids) == data.decode("utf-8", "replace"), f"other text for {ids!r}")
        return "right"

    return lambda draw: draw.choice((of_bytes, of_bytes, of_text, of_ids))(draw)


def vocabulary(folder: Path) -> Callable[[Random], str]:
    """The World vocabulary's file, damaged: it is refused, unless nothing but carriage returns has changed."""
    good, path = default_vocab_path().read_bytes(), folder / "vocab.txt"

    def case(draw: Random) -> str:
        if draw.random() < 0.05:
            data = good.replace(b"\n", b"\r\n") if draw.random() < 0.5 else good.replace(b"\r", b"")
        else:
            data = damaged(draw, good)
        path.write_bytes(data)
        try:
            made = WorldTokenizer(path)
        except VocabularyError as error:
            demand(data.replace(b"\r", b"") != good.replace(b"\r", b""), "the right file is refused")
            return refusal(error, str(path))
        demand(data.replace(b"\r", b"") == good.replace(b"\r", b""), "a damaged file is taken")
        demand(len(made) == 65529, "another length")
        return "right"

    return case


def characters(folder: Path) -> Callable[[Random], str]:
    """vocab.json of character models: damaged, of other kinds, in UTF-8 or UTF-16."""
    path = folder / "vocab.json"

    def parsed(data: bytes) -> list[str] | None:
        """The independent path: the characters in the order of their ids, or None."""
        try:
            entries = json.loads(data.decode(json.detect_encoding(data)))
        except (ValueError, RecursionError):
            return None
        if not isinstance(entries, dict) or entries.keys() != set(map(str, range(len(entries)))) or not entries:
            return None
        chars = [entries[str(i)] for i in range(len(entries))]
        fine = all(isinstance(c, str) and len(c) == 1 and not 0xD800 <= ord(c) <= 0xDFFF for c in chars)
        return chars if fine and len(set(chars)) == len(chars) else None

    def some_file(draw: Random) -> bytes:
        chars = list(dict.fromkeys(some_text(draw, 30)))
        content: object = {str(i): c for i, c in enumerate(chars)}
        if draw.random() < 0.3:
            content = draw.choice(
                [
                    chars,
                    {c: i for i, c in enumerate(chars)},
                    {"1": "a"},
                    {"0": "ab"},
                    {"0": 7},
                    None,
                    3,
                    {"0": "a", "1": "a"},
                    {"0": ["a"]},
                    [[[]]],
                ]
            )
        text = json.dumps(content, ensure_ascii=draw.random() < 0.5)
        if draw.random() < 0.02:
            text = draw.choice(["[" * 100_000, '{"0":' * 100_000, "1" * 5000, '{"0": ' + "9" * 5000 + "}"])
        data = text.encode(draw.choice(("utf-8", "utf-8", "utf-16", "utf-16-le", "utf-8-sig")), "surrogatepass")
        return damaged(draw, data) if draw.random() < 0.5 else data

    def ids_of(made: CharTokenizer, chars: Iterable[str]) -> list[int]:
        return made.encode("".join(chars))

    def case(draw: Random) -> str:
        data = some_file(draw)
        path.write_bytes(data)
        truth = parsed(data)
        try:
            made = CharTokenizer.load(path)
        except ValueError as error:
            demand(truth is None, f"refused: {data[:200]!r} ({error})")
            return refusal(error, str(path))
        demand(truth is not None, f"taken: {data[:200]!r}")
        demand(
            list(made.chars) == truth and ids_of(made, truth) == list(range(len(truth))), f"other ids: {data[:200]!r}"
        )
        return "right"

    return case

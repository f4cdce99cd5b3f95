"""The .idx/.bin reader and make_data's .jsonl reader, each against a slow reader of its own."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from rwkv_nb.data.binidx import BinidxError, MMapIndexedDataset
from rwkv_nb.data.make_data import JsonlError, make_data
from rwkv_nb.data.tokenizer import WorldTokenizer

from . import Wrong, damaged, demand, refusal
from .text import Greedy, some_text

LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "f", 7: "d", 8: "H"}  # of struct, by dtype code


def slow_reader(idx: bytes, data: bytes) -> tuple[list[list], list[int]] | None:
    """Items and doc_idx, number by number with struct; None for a pair that is not consistent."""
    if len(idx) < 34 or idx[:9] != b"MMIDIDX\0\0":
        return None
    version, code, n, m = struct.unpack_from("<QBQQ", idx, 9)
    if version != 1 or code not in LETTERS or len(idx) != 34 + 12 * n + 8 * m:
        return None
    sizes, pointers = struct.unpack_from(f"<{n}i", idx, 34), struct.unpack_from(f"<{n}q", idx, 34 + 4 * n)
    bounds = struct.unpack_from(f"<{m}q", idx, 34 + 12 * n)
    if any(size < 0 for size in sizes) or list(bounds) != sorted(bounds) or any(not 0 <= b <= n for b in bounds):
        return None
    for letter in {6: "fd", 7: "df"}.get(code, LETTERS[code]):  # two codes have two meanings
        width = struct.calcsize("<" + letter)
        starts = [width * sum(sizes[:i]) for i in range(n)]
        if len(data) == width * sum(sizes) and list(pointers) == starts:
            return [
                list(struct.unpack_from(f"<{s}{letter}", data, a)) for s, a in zip(sizes, starts, strict=True)
            ], list(bounds)
    return None


def written(items: list[list[int]], code: int, bounds: list[int]) -> tuple[bytes, bytes]:
    """(idx, bin) of a good pair."""
    letter, sizes = LETTERS[code], [len(item) for item in items]
    width = struct.calcsize("<" + letter)
    pointers = [width * sum(sizes[:i]) for i in range(len(items))]
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(items), len(bounds))
    idx += struct.pack(f"<{len(items)}i", *sizes) + struct.pack(f"<{len(items)}q", *pointers)
    return idx + struct.pack(f"<{len(bounds)}q", *bounds), b"".join(
        struct.pack(f"<{len(i)}{letter}", *i) for i in items
    )


EXTREME = (0, 1, 2, 3, 7, 2**7, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def spoiled(draw: Random, idx: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Damage in one or both; often a number of the header or of a table replaced by an extreme one."""
    if draw.random() < 0.5:
        changed, at = bytearray(idx), draw.choice((9, 18, 26, 34 + 4 * draw.randrange(max(1, (len(idx) - 34) // 4))))
        if at + 8 <= len(idx):
            struct.pack_into("<Q", changed, at, draw.choice(EXTREME))
        return bytes(changed), data
    both = draw.random()
    return (damaged(draw, idx) if both < 0.8 else idx), (damaged(draw, data) if both > 0.6 else data)


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def binidx(folder: Path) -> Callable[[Random], str]:
    """The reader takes a pair exactly if the slow reader does, and then both see the same numbers."""
    prefix = folder / "pair"

    def case(draw: Random) -> str:
        items = [
            [draw.randint(0, 127) for _ in range(draw.choice((0, 1, 2, 5, 20)))] for _ in range(draw.randint(0, 5))
        ]
        idx, data = written(items, draw.choice((1, 2, 3, 4, 5, 6, 7, 8, 8, 8)), list(range(len(items) + 1)))
        if draw.random() < 0.95:
            idx, data = spoiled(draw, idx, data)
        Path(f"{prefix}.idx").write_bytes(idx)
        Path(f"{prefix}.bin").write_bytes(data)
        truth = slow_reader(idx, data)
        try:
            with MMapIndexedDataset(prefix) as found:
                got, bounds, tokens = list(found), found.doc_idx.tolist(), found.tokens
                windows = found.get(0, 0, found.n_tokens) if got else tokens
        except BinidxError as error:
            demand(truth is None, f"a good pair is refused: {error}")
            return refusal(error, f"{prefix}.idx", f"{prefix}.bin")
        demand(truth is not None, f"a bad pair is taken: {idx!r} {data!r}")
        demand(equal(got, truth[0]) and bounds == truth[1], f"other items: {idx!r} {data!r}")
        flat = [number for item in truth[0] for number in item]
        demand(
            np.array_equal(tokens, flat, equal_nan=True) and len(windows) == len(flat),
            f"other tokens: {idx!r} {data!r}",
        )
        return "right"

    return case


def some_lines(draw: Random) -> bytes:
    """A .jsonl file: good lines, and lines that are wrong in every way that people and disks know."""
    lines = []
    for _ in range(draw.randint(0, 6)):
        text = some_text(draw, 40)
        record = json.dumps({"text": text}, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        if draw.random() < 0.35:
            record = draw.choice(
                (
                    lambda r: damaged(draw, r),
                    lambda r: draw.randbytes(draw.randint(0, 30)),
                    lambda r: b"",
                    lambda r: json.dumps(r.decode("utf-8", "replace")).encode(),
                    lambda r: b'{"txt": "a"}',
                    lambda r: b'{"text": 1}',
                    lambda r: b'{"text": null, "x": "y"}',
                    lambda r: b'{"text": "a"} {"text": "b"}',
                    lambda r: b'{"text": "a", "text": "b"}',
                    lambda r: "\ufeff".encode() + r,
                    lambda r: r[:-1],
                    lambda r: b'{"text": "\\ud800"}',
                    lambda r: b'{"text": "\\ud83d\\ude00"}',
                    lambda r: b"\xff\xfe" + r,
                    lambda r: b"[" * draw.choice((10, 100_000)),
                    lambda r: b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
                    lambda r: b" \t" + r + b"\x1c\x0b ",
                    lambda r: b'{"text": "a", "n": NaN}',
                    lambda r: b"\x00" * 7,
                )
            )(record)
        lines.append(record)
    ends = draw.choice(((b"\n",), (b"\n", b"\r\n"), (b"\r\n", b"\r", b"\n", b"\n\n")))
    return b"".join(line + draw.choice(ends) for line in lines)[: None if draw.random() < 0.8 else -1]


def text_in(line: bytes) -> str | None:
    """The document in one line, or None if the line must be refused."""
    try:
        record = json.loads(line.decode("utf-8").strip())
        record["text"].encode("utf-8")
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        return None
    return record["text"] if isinstance(record, dict) and isinstance(record["text"], str) else None


def jsonl(folder: Path) -> Callable[[Random], str]:
    """make_data on good and bad lines, stopping or skipping: the tokens of the good ones, the number of a bad one."""
    tokenizer = WorldTokenizer()
    greedy, source, prefix = Greedy(dict(tokenizer.vocab)), folder / "in.jsonl", folder / "out"

    def expected(texts: list[str], epochs: int, seed: int) -> list[int]:
        order, generator, tokens = list(texts), random.Random(seed), []
        for _ in range(epochs):
            generator.shuffle(order)
            tokens += [i for text in order for i in [*greedy.encode(text.encode()), 0]]
        return tokens

    def case(draw: Random) -> str:
        data, on_error = some_lines(draw), draw.choice(("stop", "skip"))
        epochs, ctx_len, seed = draw.randint(1, 3), draw.choice((1, 4, 64, 10**30)), draw.getrandbits(32)
        source.write_bytes(data)
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        lines = [(i, line) for i, line in enumerate(lines, 1) if line.decode("utf-8", "surrogateescape").strip()]
        texts = [text_in(line) for _, line in lines]
        bad = [number for (number, _), text in zip(lines, texts, strict=True) if text is None]
        good = [text for text in texts if text is not None]
        for part in (".bin", ".idx", ".meta.json"):
            Path(f"{prefix}{part}").unlink(missing_ok=True)
        try:
            report = make_data(source, prefix, epochs, ctx_len, seed, on_error=on_error, tokenizer=tokenizer)
        except JsonlError as error:
            demand(on_error == "stop" and bad and error.line == bad[0], f"line {error.line} of {data[:300]!r}: {error}")
            return refusal(error, f"line {bad[0]}:")
        except ValueError as error:
            demand(not good and not (bad and on_error == "stop"), f"refused: {data[:300]!r} ({error})")
            return refusal(error, str(source))
        demand(on_error == "skip" or not bad, f"line {bad[:1]} is taken: {data[:300]!r}")
        found = np.fromfile(f"{prefix}.bin", np.uint16).tolist()
        demand(found == expected(good, epochs, seed), f"other tokens: {data[:300]!r}")
        demand(
            (report.documents, report.skipped, report.tokens) == (len(good), len(bad), len(found)), f"report: {report}"
        )
        demand(len(str(report)) > 100, "no report")
        return "right"

    def tidy(draw: Random) -> str:
        outcome = case(draw)
        left = {path.name for path in folder.iterdir()} - {"in.jsonl", "out.bin", "out.idx", "out.meta.json"}
        if left:
            raise Wrong(f"left over: {left}")
        return outcome

    return tidy

"""The official steps of make_data, written again, and small inputs, shared by its tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from rwkv_nb.data import make_data as module
from rwkv_nb.data.binidx import MMapIndexedDataset
from rwkv_nb.data.tokenizer import WorldTokenizer

TOKENIZER = WorldTokenizer()  # loaded once: half a second
TEXTS = ["aa", "今天是美好的一天。", "", "User: hi\n\nAssistant: héllo 🙂", "a\x00b", "\r\n\r\n", " " * 300, "x" * 5000]


def make_data(*args, **options) -> module.MakeDataReport:
    return module.make_data(*args, **{"tokenizer": TOKENIZER, **options})


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


OFFICIAL = WorldTokenizer(fast=False)


def official(lines: list[str], n_epoch: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """The steps of the official script, word for word, with the pure Python tokenizer: (tokens, sizes)."""
    lines = [line.strip() for line in lines if line.strip()]
    random.seed(seed)
    temp = []
    for _ in range(n_epoch):
        random.shuffle(lines)
        temp.extend(lines)
    tokens, sizes = [], []
    for line in temp:
        ids = OFFICIAL.encode(json.loads(line)["text"])
        ids.append(0)
        tokens += ids
        sizes.append(len(ids))
    return np.array(tokens, np.uint16), sizes


def assert_official(prefix: Path, source: Path, n_epoch: int, seed: int) -> None:
    tokens, sizes = official(source.read_text(encoding="utf-8").split("\n"), n_epoch, seed)
    assert prefix.with_suffix(".bin").read_bytes() == tokens.tobytes()
    with MMapIndexedDataset(prefix) as data:
        assert data.sizes.tolist() == sizes
        assert data.doc_idx.tolist() == list(range(len(sizes) + 1))
    assert prefix.with_suffix(".idx").stat().st_size == 42 + 20 * len(sizes)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".tmp", ".new") or p.name.startswith(".make_data"))


class Unpicklable(WorldTokenizer):
    """Cannot be sent to another process."""

    def __getstate__(self):
        raise TypeError("no")

"""A .jsonl file of documents to the .bin/.idx pair that the trainer reads: shuffled, repeated, verified.

    python -m rwkv_nb make_data demo.jsonl 3 4096        three epochs, magic prime for ctx_len 4096

Two passes. First every document is tokenised once, in the order of the file, into an unnamed temporary file. Then for
each epoch the document numbers are shuffled and the tokens copied in that order. Only 24 bytes a document and 12 an
item are in memory (an item is one document in one epoch), and the disk holds one extra copy of the tokens meanwhile.

Each epoch shuffles the order of the one before, as the official script does with its list of lines. Python's shuffle
depends on the length alone, so `seed` gives the order that random.seed(seed) would give there.

What it is not: the reader of lines (jsonl.py), the file format (binidx.py), the prime (magic_prime.py), the printed
report (make_data_report.py).
Source: RWKV-LM RWKV-v5/make_data.py, December 2023.
"""

from __future__ import annotations

import argparse
import errno
import operator
import os
import random
import secrets
import shutil
import tempfile
import threading
import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import numpy as np

from rwkv_nb.data.binidx import BinidxError, MMapIndexedDataset, MMapIndexedDatasetBuilder
from rwkv_nb.data.encoders import Encoders
from rwkv_nb.data.jsonl import Converted, Converter, JsonlError, convert
from rwkv_nb.data.magic_prime import explain, is_prime
from rwkv_nb.data.make_data_report import MakeDataReport, preview
from rwkv_nb.data.tokenizer import WorldTokenizer

__all__ = ["JsonlError", "MakeDataReport", "epoch_order", "make_data", "preview"]

LARGE = 16_000_000  # bytes from which on the tokenizer gets a process of its own, which takes 0.3 s to start
LISTED = 5  # skipped lines named in the report
TXT_REMEDY = ("plain text is no jsonl. If each line is JSON already, rename it; if it is one document, write it as one "
              'line: json.dumps({"text": open("book.txt", encoding="utf-8").read()})')


def epoch_order(order: array, generator: random.Random) -> array:
    """Shuffle the numbers of the documents in place for the next epoch: the cumulative shuffle of the official script.

    order: array("q"), at first 0, 1, 2, ...; returned for convenience.
    """
    generator.shuffle(order)
    return order


def make_data(jsonl: str | os.PathLike, out_prefix: str | os.PathLike, n_epoch: int, ctx_len: int,
              seed: int | None = None, *, workers: int = 1, on_error: str = "stop", progress: bool = False,
              tokenizer: WorldTokenizer | None = None) -> MakeDataReport:
    """Tokenise a .jsonl file, shuffle and repeat it, write OUT_PREFIX.bin, .idx and .meta.json, and read them back.

    n_epoch: how often each document appears. ctx_len: in tokens, for the magic prime alone. seed: of the shuffle; None
    draws one, which the report names. workers: processes that tokenise, 260 MB each; with 1 the World tokenizer runs
    beside us if the input is large, everything else runs here. The files do not depend on it. on_error: "stop" at the
    first bad line, or "skip" and count them. progress: a bar on stderr if that is a terminal.

    Raises JsonlError for a bad line, ValueError for arguments, BinidxError if what was read back is wrong, OSError for
    files and disk space, ChildProcessError if a worker died. Whatever happens, a pair at OUT_PREFIX stays as it was
    until the new one is complete.
    """
    path, prefix = os.fspath(jsonl), os.fspath(out_prefix)
    n_epoch, ctx_len, workers = (_at_least_one(name, value) for name, value in
                                 (("n_epoch", n_epoch), ("ctx_len", ctx_len), ("workers", workers)))
    if on_error not in ("stop", "skip"):
        raise ValueError(f'on_error is {on_error!r}; it must be "stop" or "skip"')
    _check_paths(path, prefix)
    folder = os.path.dirname(os.path.abspath(prefix))
    size = os.path.getsize(path)
    _check_space(prefix, size // 2 * (n_epoch + 1), "by a rough estimate")  # text has some 4 bytes a token, a token 2
    seed = secrets.randbits(32) if seed is None else seed
    tokenizer = WorldTokenizer() if tokenizer is None else tokenizer
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".make_data-") as cache:
            beside = workers if workers > 1 else int(size >= LARGE and type(tokenizer) is WorldTokenizer)
            with Encoders(tokenizer, beside) as encoders:
                batches = convert(Converter(path, tokenizer), encoders)  # the vocabulary is read here and there at once
                if beside:  # imports sympy, which the report needs, while we wait for the other process
                    threading.Thread(target=is_prime, args=(2,), daemon=True).start()
                sizes, bad, problems = _collect(path, batches, on_error, cache, _Bar(progress, size, "read"))
            if not sizes:
                raise ValueError(f"{path}: no documents in it; nothing was written")
            tokens = int(np.frombuffer(sizes, np.int32).sum(dtype=np.int64)) * n_epoch
            _check_space(prefix, 2 * tokens + 42 + 20 * len(sizes) * n_epoch, "after tokenising")
            with MMapIndexedDatasetBuilder(prefix, dtype=np.uint16, tokenizer=tokenizer) as builder:
                checksum = _write(cache, sizes, n_epoch, seed, builder, _Bar(progress, 2 * tokens, "write"))
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None and error.strerror == os.strerror(errno.ENOSPC):
            raise OSError(f"{prefix}: the disk became full; nothing was changed. Free some space, use fewer epochs, "
                          "or write elsewhere with --out") from error
        raise
    items = len(sizes) * n_epoch
    dtype, first, last = _verify(prefix, items, tokens, checksum, tokenizer)
    return MakeDataReport(path, prefix, n_epoch, seed, len(sizes), items, tokens, dtype, bad, tuple(problems),
                          first, last, tokenizer.vocab_size, explain(tokens, ctx_len))


def _at_least_one(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be an integer") from None
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")
    return number


def _check_paths(path: str, prefix: str) -> None:
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: this is a folder; name the .jsonl file in it")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file (looked from {os.path.abspath(os.curdir)})")
    if path.lower().endswith(".txt"):
        raise ValueError(f"{path}: {TXT_REMEDY}")
    if os.path.isdir(prefix) or not os.path.basename(prefix):
        raise ValueError(f"output {prefix}: this is a folder; give a name in it, like {os.path.join(prefix, 'data')}")
    if prefix.endswith((".bin", ".idx")):
        raise ValueError(f"output {prefix}: give the name without {prefix[-4:]}; .bin and .idx are appended to it")
    if not os.path.isdir(os.path.dirname(os.path.abspath(prefix))):
        raise ValueError(f"output {prefix}: its folder does not exist; create it first")
    for part in (".bin", ".idx", ".meta.json"):
        for stage in ("", ".tmp", ".new"):
            if os.path.exists(prefix + part + stage) and os.path.samefile(path, prefix + part + stage):
                raise ValueError(f"output {prefix + part + stage} is the input itself; choose another --out")
        if os.path.isdir(prefix + part):
            raise ValueError(f"output {prefix + part}: there is a folder of this name; choose another --out")


def _check_space(prefix: str, needed: int, when: str) -> None:
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(prefix))).free
    if free < needed:
        raise OSError(f"{prefix}: {needed / 1e6:,.0f} MB of disk are needed {when}, {free / 1e6:,.0f} MB are free. "
                      "Free some, use fewer epochs, or write elsewhere with --out")


class _Bar:
    """A progress bar of bytes and documents on stderr, where that is a terminal; otherwise nothing."""

    def __init__(self, wanted: bool, total: int, what: str):
        self._bar, self._wanted = None, wanted
        self._options = {"total": total, "desc": what, "unit": "B", "unit_scale": True, "disable": None}

    def __enter__(self) -> _Bar:
        if self._wanted:
            from tqdm import tqdm
            self._bar = tqdm(**self._options)
        return self

    def to(self, position: int, documents: int) -> None:
        """Move on to `position` bytes, at which so many documents are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{documents} documents", refresh=False)
            self._bar.update(position - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _collect(path: str, batches: Iterable[Converted], on_error: str, cache: BinaryIO,
             bar: _Bar) -> tuple[array, int, list[str]]:
    """Tokens of all documents into `cache`. Returns their sizes, the number of bad lines, and the first of those."""
    sizes, bad, problems = array("i"), 0, []
    with bar:
        for done in batches:
            for number, problem, remedy in done.bad:
                error = JsonlError(path, number, problem, remedy)
                if on_error == "stop":
                    raise error
                bad += 1
                problems += [str(error)] if len(problems) < LISTED else []
            cache.write(done.tokens)
            sizes.extend(done.sizes)
            bar.to(done.position, len(sizes))
    return sizes, bad, problems


def _write(cache: BinaryIO, sizes: array, n_epoch: int, seed: int, builder: MMapIndexedDatasetBuilder,
           bar: _Bar) -> int:
    """The documents of every epoch in shuffled order into the builder. Returns the CRC-32 of what was written."""
    ends = 2 * np.cumsum(np.frombuffer(sizes, np.int32), dtype=np.int64)  # in bytes
    order, generator = array("q", range(len(sizes))), random.Random(seed)
    checksum = written = items = 0
    cache.flush()
    with bar:
        for _ in range(n_epoch):
            for document in epoch_order(order, generator):
                length = 2 * sizes[document]
                data = _read(cache, int(ends[document]) - length, length)
                checksum = zlib.crc32(data, checksum)
                builder.add_item(np.frombuffer(data, np.uint16))
                builder.end_document()
                written, items = written + length, items + 1
                if items % 256 == 0:
                    bar.to(written, items)
        bar.to(written, items)
    return checksum


def _read(file: BinaryIO, position: int, length: int) -> bytes:
    if not hasattr(os, "pread"):  # Windows
        file.seek(position)
        return file.read(length)
    return os.pread(file.fileno(), length, position)  # one call to the system, not three


def _verify(prefix: str, items: int, tokens: int, checksum: int, tokenizer: WorldTokenizer) -> tuple[str, str, str]:
    """Read the pair back. Returns dtype and the previews of first and last item. Raises BinidxError."""
    found = 0
    with open(prefix + ".bin", "rb") as file:  # plain reads: mapped pages would count as our memory
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    with MMapIndexedDataset(prefix) as data:
        for field, value, expected in (("items", len(data), items), ("tokens", data.n_tokens, tokens),
                                       ("checksum", found, checksum)):
            if value != expected:
                raise BinidxError(prefix + ".bin", field, value, f"{expected}, as was written",
                                  "The disk, or another program, changed it: run make_data again.")
        first, last = (preview(tokenizer, data[index][:-1].tolist()) for index in (0, -1))
        return data.dtype.name, first, last


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m rwkv_nb make_data`. Returns the exit code; errors are raised."""
    parser = argparse.ArgumentParser("python -m rwkv_nb make_data", description="Tokenise a .jsonl file, shuffle and "
                                     "repeat it, and write the .bin/.idx pair that the trainer reads.")
    parser.add_argument("jsonl", metavar="IN.jsonl", help='one document a line: {"text": "..."}')
    parser.add_argument("n_epoch", metavar="N_EPOCH", type=int, help="how often each document appears")
    parser.add_argument("ctx_len", metavar="CTX_LEN", type=int, help="context length that the magic prime is for")
    parser.add_argument("--out", metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx; default: the input's name, "
                                                        "in the current folder")
    parser.add_argument("--seed", type=int, help="of the shuffle; default: drawn, and printed")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise (default 1)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what a bad line does")
    args = parser.parse_args(argv)
    out = args.out if args.out is not None else os.path.splitext(os.path.basename(args.jsonl))[0]
    print(make_data(args.jsonl, out, args.n_epoch, args.ctx_len, args.seed, workers=args.workers,
                    on_error=args.on_error, progress=True))
    return 0

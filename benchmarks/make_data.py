"""How fast is make_data, and in how much memory? Against the same steps with the tokenizer of the `rwkv` package.

    python benchmarks/make_data.py                                  50 MB, 1 and 3 epochs
    python benchmarks/make_data.py --mb 500 --only ours             memory does not grow with the input

The text is the installed standard library in pieces of 0.5 to 8 KB, repeated where that is less than --mb, written into
a temporary folder with what both programs write. They take turns, and the best run of each counts: on a machine that
does other things too, that is the one least disturbed. Time is that of the whole process; memory the largest sum of the
resident sets of the process and its children, looked at 50 times a second. Given the same seed, both must write the
same tokens, byte for byte. What it is not: a benchmark of tokenizers alone.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import psutil

SEED, CTX_LEN = 1, 4096


def pieces(generator: random.Random) -> Iterator[str]:
    """Pieces of the standard library's sources, file by file, again and again."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in cycle(sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # test data on purpose in other encodings
            continue
        start = 0
        while start < len(text):
            end = start + generator.randint(500, 8000)
            yield text[start:end]
            start = end


def write_corpus(path: Path, megabytes: float) -> int:
    """Write a .jsonl file of about that size; returns the number of documents."""
    size = documents = 0
    with open(path, "wb") as file:
        for text in pieces(random.Random(7)):
            size += file.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            documents += 1
            if size >= megabytes * 1e6:
                return documents
    return documents


def same_steps(source: str, n_epoch: int) -> None:
    """The steps of the official script with the Python tokenizer of the `rwkv` package; writes theirs.bin."""
    import numpy as np
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    tokenizer = TRIE_TOKENIZER(str(Path(rwkv.__path__[0]) / "rwkv_vocab_v20230424.txt"))
    random.seed(SEED)
    lines = [line.strip() for line in open(source, encoding="utf-8") if line.strip()]  # noqa: SIM115
    with open("temp.jsonl", "w", encoding="utf-8") as file:
        for _ in range(n_epoch):
            random.shuffle(lines)
            file.writelines(line + "\n" for line in lines)
    with open("temp.jsonl", encoding="utf-8") as file, open("theirs.bin", "wb") as out:
        for line in file:
            text = json.loads(line)["text"]
            ids = tokenizer.encode(text)
            if tokenizer.decode(ids) != text:
                raise ValueError(f"round trip: {text[:80]!r}")
            out.write(np.array([*ids, 0], dtype=np.uint16).tobytes())


def resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and all its children; pages that they share count for each."""
    total = 0
    with suppress(psutil.Error):  # it may end while we look
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of a command."""
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while True:
        try:
            code = process.wait(timeout=0.02)
            break
        except psutil.TimeoutExpired:
            peak = max(peak, resident(process))
    seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"failed with exit code {code}: {' '.join(command)}")
    return seconds, peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=float, default=50, help="size of the .jsonl file (default 50)")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, of which the best counts (default 3)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=["ours"], help="leave out the comparison")
    parser.add_argument("--input", type=Path, help="a .jsonl file of your own in place of the standard library")
    parser.add_argument("--same-steps", nargs=2, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()
    if args.same_steps:
        same_steps(args.same_steps[0], int(args.same_steps[1]))
        return
    with tempfile.TemporaryDirectory(prefix="make_data-") as name:
        folder = Path(name)
        source = args.input.resolve() if args.input else folder / "in.jsonl"
        documents = f"{write_corpus(source, args.mb)} documents, " if not args.input else ""
        print(f"{documents}{source.stat().st_size / 1e6:.1f} MB")
        for n in args.epochs:
            commands = {"make_data": [sys.executable, "-m", "rwkv_nb", "make_data", str(source), str(n), str(CTX_LEN),
                                      "--seed", str(SEED), "--out", "ours", "--workers", str(args.workers)]}
            if not args.only:
                commands["same steps"] = [sys.executable, __file__, "--same-steps", str(source), str(n)]
            runs = [{label: measure(command, folder) for label, command in commands.items()}
                    for _ in range(args.repeat)]
            best = {label: min(run[label][0] for run in runs) for label in commands}
            for label in commands:
                peak, times = max(run[label][1] for run in runs), best[label] / best["make_data"]
                ratio = f"   make_data is {times:.1f} times as fast" if label != "make_data" else ""
                print(f"epochs {n}: {label:10} {best[label]:6.2f} s  {peak:5.0f} MB{ratio}", flush=True)
            if not args.only and (folder / "ours.bin").read_bytes() != (folder / "theirs.bin").read_bytes():
                raise SystemExit("the two wrote different tokens")


if __name__ == "__main__":
    main()

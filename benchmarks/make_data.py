"""How fast is make_data, and in how much memory? Against the same steps with the tokenizer of the `rwkv` package.

    python benchmarks/make_data.py                                  50 MB, 1 and 3 epochs
    python benchmarks/make_data.py --mb 500 --only ours             memory does not grow with the input
    python benchmarks/make_data.py --official ~/RWKV-LM/RWKV-v5     the official script too, from your own clone

The text is the installed standard library in pieces of 0.5 to 8 KB, repeated where that is less than --mb, written into
a temporary folder with what all programs write. Each program runs in a process of its own; time is that of the whole
process, memory the largest resident set that the system saw (ru_maxrss, so not for Windows). Given the same seed, both
must write the same tokens, byte for byte. What it is not: a benchmark of tokenizers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

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


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with exit code {process.returncode}: {' '.join(command)}")
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=float, default=50, help="size of the .jsonl file (default 50)")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--repeat", type=int, default=3, help="runs of ours, of which the median counts (default 3)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=["ours"], help="leave out the comparison")
    parser.add_argument("--input", type=Path, help="a .jsonl file of your own in place of the standard library")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="RWKV-v5 in a clone of RWKV-LM")
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
            ours = [sys.executable, "-m", "rwkv_nb", "make_data", str(source), str(n), str(CTX_LEN), "--seed",
                    str(SEED), "--out", "ours", "--workers", str(args.workers)]
            runs = [measure(ours, folder) for _ in range(args.repeat)]
            seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
            print(f"epochs {n}: make_data      {seconds:6.2f} s  {peak:5.0f} MB", flush=True)
            others = {}
            if not args.only:
                others["same steps"] = [sys.executable, __file__, "--same-steps", str(source), str(n)]
            if args.official:
                if not (folder / "tokenizer").exists():  # the script looks for its vocabulary in the current folder
                    (folder / "tokenizer").symlink_to(args.official.resolve() / "tokenizer")
                others["official"] = [sys.executable, str(args.official.resolve() / "make_data.py"), str(source),
                                      str(n), str(CTX_LEN)]
            for label, command in others.items():
                their_seconds, their_peak = measure(command, folder)
                print(f"epochs {n}: {label:14} {their_seconds:6.2f} s  {their_peak:5.0f} MB   "
                      f"make_data is {their_seconds / seconds:.1f} times as fast", flush=True)
            if not args.only and (folder / "ours.bin").read_bytes() != (folder / "theirs.bin").read_bytes():
                raise SystemExit("the two wrote different tokens")


if __name__ == "__main__":
    main()

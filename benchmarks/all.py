"""One table: ours against the peers, part by part, in one run. `make bench` calls it.

    python benchmarks/all.py                           about four minutes on two cores, 4 GB
    python benchmarks/all.py --only tokenizer decode
    python benchmarks/all.py --tests                   and the time of the whole test run, a quarter of an hour more

Short settings of the other scripts of this folder, which tell more: each part runs in a process of its own, and within
a part ours and the peer's take turns. Only the ratios carry over to other machines.

    tokenizer   the trie of the `rwkv` package (the official one, in Python), and pyrwkv-tokenizer, which ours calls
    make_data   the official steps with the package's tokenizer (make_data.py)
    WKV         the loop under autograd, and the official kernel's loops in C++ (wkv.py)
    training    a transformer in nanoGPT's form and sizes, and our model by its definitions (training.py)
    decode      the `rwkv` package in float32 and in its quickest format here; reading a prompt likewise (decode.py)
    start-up    notebook 00 to its first picture, against a notebook that only imports torch and Lightning

What it is not: a test; nothing here fails because it is slow.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from wkv import print_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Row = list[str]  # what, peer, ours, peer's, times


def script(*words: str) -> str:
    """What another script of this folder prints."""
    done = subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-1000:]}")
    return done.stdout


def tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Title -> first cell of a row -> head of a column -> cell, of what print_table has printed."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for block in re.findall(r"^(\S[^\n]*)\n\n((?:\|[^\n]*\n)+)", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines())
        found[block[0]] = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    return found


def table(text: str, title: str) -> dict[str, dict[str, str]]:
    """The first table whose title begins so."""
    return next(rows for name, rows in tables(text).items() if name.startswith(title))


def ratio(what: str, peer: str, ours: float, theirs: float, unit: str, larger_is_better: bool = True) -> Row:
    times = ours / theirs if larger_is_better else theirs / ours
    shown = (f"{value:,.{0 if value >= 100 else 1}f} {unit}" for value in (ours, theirs))
    return [what, peer, *shown, f"{times:.2f}"]


def tokenizer() -> Iterable[Row]:
    """MB/s of encode and decode on 3 MB of the standard library and 1 MB in other writings."""
    import random

    import pyrwkv_tokenizer
    from make_data import pieces
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    from rwkv_nb.data.tokenizer import WorldTokenizer

    texts, size = [], 0
    for piece in pieces(random.Random(7)):
        texts.append(piece)
        size += len(piece.encode())
        if size > 3e6:
            break
    texts += ["今天是美好的一天。 Привет, мир! 🙂 Ελληνικά " * 40] * 270
    size = sum(len(text.encode()) for text in texts) / 1e6
    ours = WorldTokenizer()
    path = str(ours.vocab_path)
    peers = {"rwkv package's trie": TRIE_TOKENIZER(path), "pyrwkv-tokenizer": pyrwkv_tokenizer.WorldTokenizer(path)}
    ids = [ours.encode(text) for text in texts]
    jobs: dict[str, Callable[[], object]] = {}
    for name, one in {"ours": ours, **peers}.items():
        jobs[f"{name} encode"] = lambda one=one: [one.encode(text) for text in texts]
        jobs[f"{name} decode"] = lambda one=one: [one.decode(i) for i in ids]
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(3):
        for name, job in jobs.items():
            start = time.perf_counter()
            result = job()
            best[name] = min(best[name], time.perf_counter() - start)
            if result != (ids if name.endswith("encode") else texts):
                raise RuntimeError(f"{name} gives another result")
    for what in ("encode", "decode"):
        for name in peers:
            yield ratio(f"tokenizer, {what}", name, size / best[f"ours {what}"], size / best[f"{name} {what}"], "MB/s")


def make_data() -> Iterable[Row]:
    text = script("make_data.py", "--mb", "20", "--epochs", "1", "--repeat", "2")
    took = {m[1].strip(): (float(m[2]), float(m[3]))
            for m in re.finditer(r"epochs 1: (.{10}) +([\d.]+) s +([\d.]+) MB", text)}  # fmt: skip
    (ours, memory), (theirs, more) = took["make_data"], took["same steps"]
    yield ratio("make_data, 20 MB, 1 epoch", "official steps", ours, theirs, "s", False)
    yield ratio("make_data, memory", "official steps", memory, more, "MB", False)


def wkv() -> Iterable[Row]:
    from wkv import WAYS, speed

    from rwkv_nb.training.machine import keep_freed_memory

    keep_freed_memory()
    rows = {row[0]: row for row in speed((4, 512, 4, 64), WAYS, 3)}
    for name in ("loop", "plain C++"):
        peer = "loop under autograd" if name == "loop" else "the official kernel's loops in C++"
        ours, theirs = float(rows["cpu"][4]), float(rows[name][4])
        yield ratio("WKV-5, forward + backward, (4, 512, 4, 64)", peer, ours, theirs, "ms", False)


def training() -> Iterable[Row]:
    rows = table(script("training.py", "--only", "speed", "--turns", "3"), "Speed")
    ours = float(rows["RWKV-5"]["tokens/s"])
    for name in ("transformer", "straightforward RWKV-5"):
        yield ratio("training, L6 D256, 8 x 256", name, ours, float(rows[name]["tokens/s"]), "tokens/s")
    yield ratio("training, peak memory", "transformer", float(rows["RWKV-5"]["peak GB"]),
                float(rows["transformer"]["peak GB"]), "GB", False)  # fmt: skip


def decode() -> Iterable[Row]:
    text = script("decode.py", "--only", "speed", "--turns", "4")
    for title, what in (("Writing", "decode, L12 D768 V65536"), ("A prompt", "prefill of 256 tokens")):
        speeds = {name: float(row["tokens/s"]) for name, row in table(text, title).items()}
        theirs = {name: speed for name, speed in speeds.items() if name.startswith("package")}
        ours = {name: speed for name, speed in speeds.items() if name.startswith("ours")}
        exact = max(speed for name, speed in ours.items() if "float32" in name and "bfloat16" not in name)
        speed, name = max((speed, name) for name, speed in ours.items())
        best, peer = max((speed, name) for name, speed in theirs.items())
        yield ratio(what, "package cpu fp32", exact, theirs["package cpu fp32"], "tokens/s")
        yield ratio(f"{what}, {name.removeprefix('ours ')}", peer, speed, best, "tokens/s")


def startup() -> Iterable[Row]:
    """Seconds from nothing to the end of some cells, kernel included; the best of three, in turn."""
    import nbformat
    from nbclient import NotebookClient

    def seconds(sources: list[str]) -> float:
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        start = time.perf_counter()
        NotebookClient(nb, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
        return time.perf_counter() - start

    cells = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", 4).cells
    first = [cell.source for cell in cells if cell.cell_type == "code"][:2]
    bare = ["import torch, pytorch_lightning"]
    best = {"ours": float("inf"), "bare": float("inf")}
    for _ in range(3):
        best = {"ours": min(best["ours"], seconds(first)), "bare": min(best["bare"], seconds(bare))}
    yield ratio("notebook 00 to its first picture", "bare import of Lightning", best["ours"], best["bare"], "s", False)


def tests() -> Iterable[Row]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "tests", "notebooks", "--nbval", "--nbval-current-env",
               "--nbval-cell-timeout=300"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()[-1].strip("= ")
    yield ["the whole test run", "", f"{(time.perf_counter() - start) / 60:.1f} min", "", said]


PARTS = {"tokenizer": tokenizer, "make_data": make_data, "WKV": wkv, "training": training, "decode": decode,
         "start-up": startup, "tests": tests}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="some parts")
    parser.add_argument("--tests", action="store_true", help="the whole test run too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(list(PARTS[options.part]())))
        return 0
    wanted = options.only or [name for name in PARTS if name != "tests" or options.tests]
    rows, failed = [], 0
    for name in wanted:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--part", name], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            failed += 1
            rows.append([name, "", "failed", "", done.stderr.strip().splitlines()[-1][:80]])
        else:
            rows += json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print_table("Ours and the peers, one run", ["", "peer", "ours", "the peer's", "times as good"], rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

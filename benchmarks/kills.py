"""Is anything lost when a program is killed (SIGKILL) at any moment, and does the next call repair it?

    python benchmarks/kills.py                         make_data, training, download, set-up: 50 kills each
    python benchmarks/kills.py --only set-up --kills 10
    python benchmarks/kills.py --only real-set-up      of the real set-up, in a copy (1.3 GB; a quarter of an hour)

Each attempt is a process that is killed after a random while, or (make_data, download, training) by itself at the n-th
call of a kind that matters: write, fsync, rename, removal. After each kill the files must be the old or the new ones,
whole; the call after the last one must end well and leave nothing over. The hub of the downloads is a slow server on
this machine. The set-up is the real script with small packages of our own in place of JupyterLab and torch; half of the
kills hit it alone, so that its pip goes on without a parent, half the whole group of processes.

What it is not: a loss of power; a kill leaves what the system has not yet written to the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from killing import hub, small_world

from rwkv_nb.data import download as downloads
from rwkv_nb.data.binidx import MMapIndexedDataset
from rwkv_nb.data.make_data import make_data as convert
from rwkv_nb.data.tokenizer import WorldTokenizer

ROOT = Path(__file__).resolve().parents[1]


class Lost(Exception):
    """Something that was there is not, or the next call did not repair it."""


def demand(condition: object, what: str) -> None:
    if not condition:
        raise Lost(what)


def die_at(name: str, count: int) -> None:
    """From now on the count-th call of os.NAME is the last thing that this process does."""
    function, left = getattr(os, name), [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(os, name, counted)


def attempt(work: Callable[[], object], kind: str = "", count: float = 0) -> bool:
    """Do the work in a fork; True if it was killed before its end. Raises Lost if it fails by itself."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if kind and kind != "after":
                die_at(kind, int(count))
            work()
            code = 0
        finally:
            os._exit(code)
    if kind == "after":
        time.sleep(count)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    demand(os.WEXITSTATUS(status) == 0, f"the call fails ({kind} {count})")
    return False


def a_moment(draw: random.Random, seconds: float) -> tuple[str, float]:
    """Half of the kills by the clock, half at a call: fsync, rename, removal."""
    kind = draw.choice(("after", "after", "after", "fsync", "replace", "remove"))
    return kind, draw.uniform(0, seconds) if kind == "after" else draw.randint(1, 4)


def make_data(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Two seeds in turn over the same pair: it is always one of the two, and complete."""
    draw, source, tokenizer = random.Random(seed), folder / "in.jsonl", WorldTokenizer()
    tokenizer.encode("loaded once, before the forks")
    texts = [f"document {i} " + "some words 今天 " * draw.randint(1, 80) for i in range(1500)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    truth = []
    for n in (1, 2):
        start = time.perf_counter()
        convert(source, folder / "out", 4, 64, n, tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        truth.append((folder / "out.bin").read_bytes())
    moments: dict[str, int] = {}
    while sum(moments.values()) < kills:
        kind, count = a_moment(draw, seconds)
        number = draw.choice((1, 2))
        if attempt(lambda n=number: convert(source, folder / "out", 4, 64, n, tokenizer=tokenizer), kind, count):
            moments[kind] = moments.get(kind, 0) + 1
        with MMapIndexedDataset(folder / "out") as data:  # its checks pass
            demand(data.tokens.tobytes() in truth and data.sizes.sum() == data.meta["n_tokens"], "another pair")
    demand(not attempt(lambda: convert(source, folder / "out", 4, 64, 1, tokenizer=tokenizer)), "?")
    demand((folder / "out.bin").read_bytes() == truth[0], "the last call wrote something else")
    demand({p.name for p in folder.iterdir()} == {"in.jsonl", "out.bin", "out.idx", "out.meta.json"}, "leftovers")
    return moments


def training(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """tests/training/killed_runs.py, run after run, until there were enough: weights, losses and log as if unharmed."""
    moments: dict[str, int] = {}
    script, alone = ROOT / "tests" / "training" / "killed_runs.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    while sum(moments.values()) < kills:
        seed += 1
        place = folder / str(seed)
        place.mkdir()
        wanted = min(25, kills - sum(moments.values()))
        command = [sys.executable, str(script), str(place), str(wanted), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        demand(done.returncode == 0, f"seed {seed}: {done.stderr[-1000:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        demand(told["last"] == [0, 0], f"seed {seed}: the last run failed")
        whole, broken = place / "whole", place / "broken"
        demand(sorted(os.listdir(whole)) == sorted(os.listdir(broken)), f"seed {seed}: other files")
        for path in whole.glob("rwkv-*.pth"):
            demand(path.read_bytes() == (broken / path.name).read_bytes(), f"seed {seed}: {path.name} differs")
        truth = dict(line.split() for line in (place / "whole.txt").read_text().splitlines())
        again = [line.split() for line in (place / "broken.txt").read_text().splitlines()]
        same = {step for step, _ in again} == set(truth) and all(truth[step] == loss for step, loss in again)
        demand(same, f"seed {seed}: other losses")
        for kind, _ in told["moments"]:
            moments[kind] = moments.get(kind, 0) + 1
    return moments


def download(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Two files from a slow hub: a proper name is a whole file, a .part is its beginning, nothing comes twice."""
    from huggingface_hub import constants, file_download  # noqa: F401  loaded before the forks

    draw = random.Random(seed)
    files = {"minipile.idx": draw.randbytes(10_000), "minipile.bin": draw.randbytes(400_000)}
    server, address = hub.start({name: (data, hashlib.sha256(data).hexdigest()) for name, data in files.items()})
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants.DOWNLOAD_CHUNK_SIZE = 5_000
    moments: dict[str, int] = {}
    target = folder / "data"

    def look() -> None:
        for path in target.iterdir() if target.is_dir() else ():
            whole = files[path.name.removesuffix(".part")]
            content = path.read_bytes()
            demand(content == whole if path.suffix != ".part" else whole.startswith(content), f"{path.name} is wrong")

    try:
        while sum(moments.values()) < kills:
            kind, count = a_moment(draw, 0.6)
            if attempt(lambda: downloads.download("minipile", target, progress=False), kind, min(count, 2)):
                moments[kind] = moments.get(kind, 0) + 1
            else:
                look()
                shutil.rmtree(target)
            look()
        demand(not attempt(lambda: downloads.download("minipile", target, progress=False)), "?")
        look()
        demand({p.name for p in target.iterdir()} == set(files), "leftovers")
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    return moments


def setup(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """scripts/setup_env.py in a small world: after the last kill one call is enough, the next one has nothing to do."""
    draw, world = random.Random(seed), folder / "course"
    environment = small_world.build(world, ROOT / "scripts" / "setup_env.py")
    command = [sys.executable, str(world / "scripts" / "setup_env.py")]
    quiet = {"cwd": world, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}

    def whole_call() -> float:
        start = time.perf_counter()
        done = subprocess.run(command, **quiet)
        demand(done.returncode == 0, f"the next call fails: {done.stderr.decode()[-1500:]}")
        demand(small_world.works(world), "an environment that does not work passes for complete")
        return time.perf_counter() - start

    first = seconds = whole_call()
    shutil.rmtree(world / ".venv", ignore_errors=True)
    moments: dict[str, int] = {}
    while sum(moments.values()) < kills:
        start = time.perf_counter()
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        try:
            _, error = process.communicate(timeout=draw.uniform(0, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            kind = draw.choice(("alone", "group"))
            (os.kill if kind == "alone" else os.killpg)(process.pid, signal.SIGKILL)
            process.stderr.close()
            process.wait()
            moments[kind] = moments.get(kind, 0) + 1
            continue
        demand(process.returncode == 0, f"a call fails: {error.decode()[-1500:]}")
        demand(small_world.works(world), "an environment that does not work passes for complete")
        seconds = 0.5 * seconds + 0.5 * (time.perf_counter() - start)
        (world / "constraints.txt").write_text(f"# {draw.random()}\n")  # other pins: everything is looked at again
        if draw.random() < 0.25:
            shutil.rmtree(world / ".venv")
        elif draw.random() < 0.7:
            small_world.uninstall(world)
    whole_call()
    start = time.perf_counter()
    whole_call()
    demand(time.perf_counter() - start < max(2.0, 0.7 * first), "the call after that works again")
    return moments


def real_setup(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """The real set-up, from the package index, in a clone of this repository."""
    draw, course, moments = random.Random(seed), folder / "course", {}
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(course)], check=True)
    shutil.copy(ROOT / "scripts" / "setup_env.py", course / "scripts")
    command = [sys.executable, str(course / "scripts" / "setup_env.py")]
    while sum(moments.values()) < kills:
        process = subprocess.Popen(command, start_new_session=True, cwd=course)
        try:
            demand(process.wait(draw.uniform(2, 30)) == 0, "the call after a kill fails")
            shutil.rmtree(course / ".venv")  # it was over before it could be killed: all of it once more
        except subprocess.TimeoutExpired:
            kind = draw.choice(("alone", "group"))
            (os.killpg if kind == "group" else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
            moments[kind] = moments.get(kind, 0) + 1
    subprocess.run(command, cwd=course, check=True)
    check = "import torch, jupyterlab, numpy, rwkv_nb.teaching.doctor as d; d.main([])"
    subprocess.run([str(course / ".venv/bin/python"), "-c", check], cwd=course, check=True)
    subprocess.run([str(course / ".venv/bin/python"), "-m", "pip", "check"], cwd=course, check=True)
    return moments


PARTS = {"make_data": make_data, "training": training, "download": download, "set-up": setup, "real-set-up": real_setup}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS)[:4])
    parser.add_argument("--kills", type=int, default=50, help="of each part (default 50)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print("| | kills | moments | lost or not repaired | seconds |\n|---|--:|---|--:|--:|", flush=True)
    failed = 0
    for name in args.only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            try:
                moments, lost = PARTS[name](Path(folder), args.kills, args.seed), ""
            except Lost as error:
                moments, lost = {}, str(error)
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(moments.items()))
        seconds = time.perf_counter() - start
        print(f"| {name} | {sum(moments.values())} | {said} | {lost or 0} | {seconds:.0f} |", flush=True)
        failed += bool(lost)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

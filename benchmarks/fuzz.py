"""Does anything crash, hang, answer wrongly or fail without a message on input that nobody meant to give it?

    python benchmarks/fuzz.py                              all subjects, over 100,000 cases; three minutes on two cores
    python benchmarks/fuzz.py --only binidx --cases 500    some
    python benchmarks/fuzz.py --replay binidx:1:77         one case again, with its traceback

Each subject of `fuzzers/` says which outcomes are allowed: the right result, compared with an independent path, or the
module's own error that names file, field or flag. Everything else is a finding: a wrong result, another exception, a
silent refusal, more than 20 seconds, the death of the process. A case is made from its name alone, SUBJECT:SEED:NUMBER,
and each subject runs in a process of its own.

What it is not: guided by coverage; the damage is drawn blindly, in ways that suit the subject.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fuzzers import Wrong, checkpoints, data, flags, strategies, text

SUBJECTS: dict[str, tuple[Callable, int, int]] = {  # name: (fuzzer, cases of a benchmark, cases of a test)
    "tokenizer": (text.tokenizer, 20_000, 300),
    "vocabulary file": (text.vocabulary, 1_000, 30),
    "vocab.json": (text.characters, 20_000, 200),
    "binidx": (data.binidx, 15_000, 200),
    "jsonl": (data.jsonl, 3_000, 60),
    "checkpoints": (checkpoints.damaged_files, 8_000, 60),
    "other checkpoints": (checkpoints.other_content, 2_000, 60),
    "hostile pickles": (checkpoints.hostile, 4_000, 60),
    "strategies": (strategies.strategies, 30_000, 300),
    "flags of train": (flags.train, 4_000, 60),
    "flags of generate": (flags.generate, 800, 20),
    "flags of make_data": (flags.make_data, 800, 40),
}
TOO_LONG = 20  # seconds
MEMORY = 16 << 30  # bytes of addresses that a subject may ask for: a size out of a damaged file must not be believed


class Hang(Exception):
    """A case that has not ended in time."""


@dataclass
class Result:
    """What the cases of a subject came to."""

    outcomes: collections.Counter = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _alarm(*_: object) -> None:
    raise Hang(f"more than {TOO_LONG} s")


def run(subject: str, cases: int, seed: int, folder: Path, first: int = 0, at: int | None = None) -> Result:
    """So many cases of a subject. at: a file that holds the number of the case at hand, for those left behind."""
    result, start = Result(), time.perf_counter()
    case = SUBJECTS[subject][0](folder)
    before = signal.signal(signal.SIGALRM, _alarm)
    try:
        for number in range(first, first + cases):
            if at is not None:
                os.pwrite(at, b"%12d" % number, 0)
            signal.alarm(TOO_LONG)
            try:
                result.outcomes[case(random.Random(f"{subject}:{seed}:{number}"))] += 1
            except Exception as error:  # noqa: BLE001  everything that comes out of a case is a finding
                what = str(error) if isinstance(error, Wrong) else "".join(traceback.format_exception(error))
                result.findings.append(f"{subject}:{seed}:{number}: {what}")
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    result.seconds = time.perf_counter() - start
    return result


def child(subject: str, cases: int, seed: int, folder: str) -> None:
    """One subject in this process; the result as JSON on the descriptor that was stdout."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what the subjects print is not our answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    at = os.open(Path(folder) / "at", os.O_RDWR | os.O_CREAT)
    (Path(folder) / "files").mkdir()
    result = run(subject, cases, seed, Path(folder) / "files", at=at)
    os.write(answers, json.dumps([result.outcomes, result.findings, result.seconds]).encode())


def in_a_process(subject: str, cases: int, seed: int) -> Result:
    """`run` in a process of its own, whose death is a finding."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        command = [sys.executable, __file__, "--child", subject, str(cases), str(seed), folder]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny products: threads would wait for each other
        done = subprocess.run(command, capture_output=True, timeout=3600, env=alone)
        if done.returncode == 0:
            outcomes, findings, seconds = json.loads(done.stdout)
            return Result(collections.Counter(outcomes), findings, seconds)
        at = (Path(folder) / "at").read_bytes().strip().decode() if (Path(folder) / "at").exists() else "?"
        said = done.stderr.decode(errors="replace")[-1500:]
        return Result(findings=[f"{subject}:{seed}:{at}: the process died with code {done.returncode}: {said}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(SUBJECTS),
        choices=list(SUBJECTS),
        metavar="SUBJECT",
        help=f"some of: {', '.join(SUBJECTS)}",
    )
    parser.add_argument("--cases", type=int, default=0, help="of each subject; default: its own number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", type=int, default=2, help="subjects at a time (default 2)")
    parser.add_argument("--replay", metavar="SUBJECT:SEED:NUMBER", help="one case again")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        subject, cases, seed, folder = args.child
        child(subject, int(cases), int(seed), folder)
        return 0
    if args.replay:
        subject, seed, number = args.replay.rsplit(":", 2)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            result = run(subject, 1, int(seed), Path(folder), first=int(number))
        print(*result.findings, *result.outcomes, sep="\n")
        return len(result.findings)
    findings, total = [], collections.Counter()
    print("| subject | cases | right | refused | findings | seconds |\n|---|--:|--:|--:|--:|--:|", flush=True)
    with ThreadPoolExecutor(args.together) as pool:
        results = pool.map(lambda s: in_a_process(s, args.cases or SUBJECTS[s][1], args.seed), args.only)
        for subject, result in zip(args.only, results, strict=True):
            findings += result.findings
            right, refused, found = result.outcomes["right"], result.outcomes["refused"], len(result.findings)
            cases = right + refused + found
            total.update(cases=cases, right=right, refused=refused, found=found, seconds=result.seconds)
            row = f"{cases:,} | {right:,} | {refused:,} | {found} | {result.seconds:.0f}"
            print(f"| {subject} | {row} |", flush=True)
    print("| all | {cases:,} | {right:,} | {refused:,} | {found} | {seconds:.0f} |\n".format(**total))
    print(*(finding[:3000] for finding in findings[:20]), sep="\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a run on the emulator leaves behind: arrays, races, problems, counts; and why a source does not compile.

Everything prints as a sentence, `str(report)` all that is wrong. See `emulator.py` for how to get one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

FILE = "kernel.cu"  # the name that compiler messages and reports give to the reader's source


class KernelError(ValueError):
    """The source does not compile: the compiler's first message, and the line of the source (None: no line of it)."""

    def __init__(self, message: str, line: int | None, text: str, log: Path):
        where = f"line {line}: {text.strip()}" if line else "where it is launched"
        super().__init__(f"the kernel does not compile, {where}\n  {message}\n  full log: {log}")
        self.message, self.line, self.text, self.log = message, line, text, log


def explain(log: Path, source: str) -> KernelError:
    """The first error of a compiler's log, with the line of the reader's source that it, or its cause, points to."""
    text = log.read_text(errors="replace")
    place = rf"^{re.escape(FILE)}:(\d+):\d+: +"
    first = re.search(r"(?:fatal )?error: (.*)", text)
    mine = re.search(place + r"(?:fatal )?error: (.*)", text, re.MULTILINE)
    cause = re.search(place + r"(?:required from|note:)", text, re.MULTILINE)
    message = (mine.group(2) if mine else first.group(1)) if first else "the compiler failed"
    if not mine and re.search(r"expected .\}. at end of input|expected '\}'", text):
        message = "this brace is never closed"
    found = mine or cause
    line = int(found.group(1)) if found else None
    lines = source.splitlines()
    return KernelError(message, line, lines[line - 1] if line and line <= len(lines) else "", log)


def _place(file: str, line: int) -> str:
    return f"line {line}" if file in (FILE, "") else f"line {line} of {Path(file).name}"


@dataclass(frozen=True)
class Race:
    """Two accesses to one element, at least one a write, by two threads with no barrier between."""

    kernel: str
    array: str
    space: str  # "shared" or "global"
    element: int  # the first one met
    count: int  # how many more accesses had the same lines and kinds, this one included
    blocks: tuple[int, int]
    threads: tuple[int, int]
    kinds: tuple[str, str]  # "read" or "write"
    lines: tuple[int, int]
    files: tuple[str, str]  # "kernel.cu" is the source given

    def __str__(self) -> str:
        (a, b), (p, q), (x, y) = self.threads, self.blocks, self.kinds
        m, n = (_place(*where) for where in zip(self.files, self.lines, strict=True))
        who = (f"thread {a}", f"thread {b}") if p == q else (f"thread {a} of block {p}", f"thread {b} of block {q}")
        return (
            f"race in {self.space} array {self.array}, element {self.element}: {who[0]} {x}s ({m}), "
            f"{who[1]} {y}s ({n}), no barrier between"
        )


@dataclass(frozen=True)
class Problem:
    """Why a launch stopped; or a read of shared memory that nobody wrote ("uninitialised", which stops nothing)."""

    kernel: str
    kind: str
    message: str
    file: str
    line: int  # 0: unknown
    block: int
    thread: int

    def __str__(self) -> str:
        where = f"{_place(self.file, self.line)}, " if self.line else ""
        return f"{self.kind}: {where}block {self.block}, thread {self.thread}: {self.message}"


@dataclass(frozen=True)
class Count:
    """What a kernel did with one array: elements read and written, by all threads together."""

    space: str
    size: int
    element_bytes: int
    reads: int
    writes: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return (self.reads + self.writes) * self.element_bytes


@dataclass(frozen=True)
class Report:
    """What the launches left behind. `report["y"]` is array y afterwards; the tensors given are unchanged."""

    arrays: dict[str, Tensor]
    races: list[Race] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, dict[str, Count]] = field(default_factory=dict)  # kernel -> array -> count
    barriers: dict[str, int] = field(default_factory=dict)  # kernel -> barriers passed, all blocks together
    printed: str = ""  # by printf

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def ok(self) -> bool:
        return not self.races and not self.problems

    def moved(self, space: str = "global", kernel: str | None = None) -> int:
        """Bytes read and written in one kind of memory, by one kernel or all."""
        chosen = [c for name, c in self.counts.items() if kernel in (None, name)]
        return sum(c.bytes for arrays in chosen for c in arrays.values() if c.space == space)

    def __str__(self) -> str:
        lines = [str(x) for x in (*self.races, *self.problems)]
        return "\n".join(lines) if lines else "no race, no problem"


def build_report(arrays: dict[str, Tensor], found: list[dict], printed: str) -> Report:
    races, problems, counts, barriers = [], [], {}, {}
    for one in found:
        kernel = one["kernel"]
        problems += [Problem(kernel, **p) for p in one["problems"]]
        barriers[kernel] = barriers.get(kernel, 0) + one["barriers"]
        for race in one.get("races", ()):
            races.append(Race(kernel, **{n: tuple(x) if isinstance(x, list) else x for n, x in race.items()}))
        for a in one.get("arrays", ()):
            old = counts.setdefault(kernel, {}).get(a["name"])
            reads, writes = a["reads"] + (old.reads if old else 0), a["writes"] + (old.writes if old else 0)
            counts[kernel][a["name"]] = Count(a["space"], a["size"], a["element_bytes"], reads, writes)
    return Report(arrays, races, problems, counts, barriers, printed)


def lost(kernel: str, message: str) -> list[dict]:
    """Stands for the report of a process that died without one."""
    problem = {"kind": "crash", "message": message, "file": "", "line": 0, "block": 0, "thread": 0}
    return [{"kernel": kernel, "barriers": 0, "problems": [problem]}]

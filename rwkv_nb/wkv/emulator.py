"""Run CUDA kernel source on the processor, watch every access, and report what went wrong and what was moved.

    source = '''
    __global__ void double_it(int n, Global<const float> x, Global<float> y) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) y[i] = 2 * x[i];
    }'''
    report = launch(source, [Launch("double_it", grid=2, block=32, arguments={"n": 50, "x": x, "y": torch.zeros(50)})])
    report["y"], report.races, report.problems, report.counts["double_it"]["x"].reads

The source is compiled by the C++ compiler together with `kernels/emulate.h`, whose head lists the words it may use, and
runs as a process of its own: a kernel that crashes or never ends becomes a line of the report, not a dead notebook.

What it is not: a GPU's timing, or a proof. It sees the accesses of this run; but a race between two of them is found
whatever order the threads ran in.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import build

SCHEDULES = ("in order", "reversed", "random")
TYPES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.int32: "int",
    torch.int64: "int64_t",
}
FLAGS = ("-std=c++17", "-Og", "-g0", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
# Arrays that a kernel declares for a thread alone are plain C++: an index outside of them ends the process.
CHECKED = ("-DEMULATE_CHECKED", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error")
FILE = "kernel.cu"  # the name that compiler messages and reports give to the source


class KernelError(ValueError):
    """The source does not compile: the compiler's first message, and the line of the source (None: no line of it)."""

    def __init__(self, message: str, line: int | None, text: str, log: Path):
        where = f"line {line}: {text.strip()}" if line else "where it is launched"
        super().__init__(f"the kernel does not compile, {where}\n  {message}\n  full log: {log}")
        self.message, self.line, self.text, self.log = message, line, text, log


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `kernel` with its template arguments; grid and block as a number or up to three; the
    arguments in the order of the kernel's parameters, tensors by the names that the report shall use."""

    kernel: str
    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    arguments: dict[str, Tensor | int | float]

    @property
    def name(self) -> str:
        return self.kernel.split("<")[0]


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


def why_not() -> str | None:
    """None if kernels can be emulated here, else what is missing and the remedy."""
    if sys.platform == "win32":
        return "needs Linux or macOS (threads are fibres of <ucontext.h>); on Windows use WSL"
    return None if build.find_cxx() else f"needs a C++ compiler: {build.CXX_REMEDY}"


def launch(
    source: str,
    launches: list[Launch],
    *,
    schedule: str = "in order",
    seed: int = 0,
    checked: bool = True,
    switch_often: bool = False,
    limit: int = 300_000_000,
    seconds: int = 60,
) -> Report:
    """Compile `source` unless that was done before, run the launches one after the other, report.

    Args:
        schedule: "in order", "reversed" or "random" (by `seed`): which thread goes first between two barriers.
        checked: watch every access. Without, the kernel runs some ten times faster and the report has only the arrays.
        switch_often: with "random", another thread may run at one access in four: races show in the numbers too.
        limit: accesses and barriers of one launch; seconds: of the whole run. More is taken for an endless loop.

    Raises:
        KernelError: the source does not compile. BuildError: there is no compiler. ValueError: a bad argument.
    """
    if (reason := why_not()) is not None:
        raise build.BuildError(f"emulated: {reason}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule = {schedule!r}: choose from {', '.join(SCHEDULES)}")
    tensors, offsets, job = _job(launches)
    program = _compile(source, _driver(launches), checked)
    settings = f"{SCHEDULES.index(schedule)} {seed} {int(switch_often)} {limit} {seconds}\n"
    with tempfile.TemporaryDirectory(prefix="rwkv-nb-") as name:
        folder = Path(name)
        (folder / "job").write_text(settings + job)
        (folder / "arrays").write_bytes(b"".join(_bytes(x).ljust(_room(x), b"\0") for x in tensors.values()))
        try:
            done = subprocess.run(
                [program, name], capture_output=True, text=True, errors="replace", timeout=seconds + 10, check=False
            )
            printed, died = done.stdout, f"the process ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            printed, died = "", f"killed after {seconds + 10} seconds"
        report = folder / "report.json"
        found = json.loads(report.read_text()) if report.exists() else _lost(launches[0].name, died)
        data = bytearray((folder / "arrays").read_bytes())
    arrays = {name: _tensor(data, offsets[name], x) for name, x in tensors.items()}
    return _report(arrays, found, printed)


def _place(file: str, line: int) -> str:
    return f"line {line}" if file in (FILE, "") else f"line {line} of {Path(file).name}"


def _report(arrays: dict[str, Tensor], found: list[dict], printed: str) -> Report:
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


def _lost(kernel: str, message: str) -> list[dict]:
    """Stands for the report of a process that died without one."""
    problem = {"kind": "crash", "message": message, "file": "", "line": 0, "block": 0, "thread": 0}
    return [{"kernel": kernel, "barriers": 0, "problems": [problem]}]


def _room(x: Tensor) -> int:
    """Bytes of an array in the file: whole units of 16, and never none."""
    return (x.numel() * x.element_size() // 16 + 1) * 16


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def _tensor(data: bytearray, offset: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty_like(like)
    return torch.frombuffer(data, dtype=like.dtype, count=like.numel(), offset=offset).clone().view(like.shape)


def _job(launches: list[Launch]) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """The tensors by name, where each lies in the file of arrays, and the text that describes the launches."""
    tensors, offsets, lines, end = {}, {}, [], 0
    for one in launches:
        sizes = [(*((x,) if isinstance(x, int) else x), 1, 1)[:3] for x in (one.grid, one.block)]
        lines.append(" ".join(str(n) for size in sizes for n in size) + f" {len(one.arguments)}")
        for name, value in one.arguments.items():
            if not name.isidentifier():
                raise ValueError(f"argument name {name!r} is no name; use letters, digits and _")
            if not isinstance(value, (Tensor, int, float)):
                raise ValueError(f"argument {name} is a {type(value).__name__}; give a tensor, an int or a float")
            if not isinstance(value, Tensor):
                lines.append(f"number {name} {int(value) if isinstance(value, bool) else value}")
                continue
            if value.dtype not in TYPES or value.device.type != "cpu":
                kinds = ", ".join(map(str, TYPES))
                raise ValueError(f"{name} is {value.dtype} on {value.device}; give a CPU tensor of {kinds}")
            if name not in tensors:
                tensors[name], offsets[name] = value, end
                end += _room(value)
            elif tensors[name] is not value:
                raise ValueError(f"two different tensors are called {name}; give each array of a run its own name")
            lines.append(f"array {name} {offsets[name]} {value.numel()} {value.element_size()}")
    return tensors, offsets, "\n".join(lines) + "\n"


def _driver(launches: list[Launch]) -> str:
    """The function that the program around the kernel calls: one line a launch."""

    def argument(i: int, value: Tensor | int | float) -> str:
        if isinstance(value, Tensor):
            return f"job.array<{TYPES[value.dtype]}>({i})"
        return f"job.{'integer' if isinstance(value, int) else 'number'}({i})"

    lines = []
    for one in launches:
        values = ", ".join(argument(i, value) for i, value in enumerate(one.arguments.values()))
        lines.append(f'    job.launch("{one.name}", [&] {{ {one.kernel}({values}); }});')
    return "void emulate_launches(emulate::Job& job) {\n" + "\n".join(lines) + "\n}\n"


@functools.lru_cache(maxsize=256)
def _compile(source: str, driver: str, checked: bool) -> Path:
    text = f'#include "emulate_driver.h"\n#line 1 "{FILE}"\n{source}\n#line 1 "the launch"\n{driver}'
    folder = build.cache_folder() / "sources"
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.replace(temporary, file)
    flags = [*FLAGS, f"-I{build.kernels_folder()}"]
    flags += CHECKED if checked else []
    try:
        return build.build("emulated_kernel", (str(file),), tuple(flags))
    except build.BuildError as error:
        if error.log is None:
            raise
        raise _explain(error.log, source) from None


def _explain(log: Path, source: str) -> KernelError:
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

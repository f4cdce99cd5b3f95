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
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import build
from .emulator_report import FILE, Count, KernelError, Problem, Race, Report, build_report, explain, lost

__all__ = ["Count", "KernelError", "Launch", "Problem", "Race", "Report", "launch", "why_not"]

SCHEDULES = ("in order", "reversed", "random")
TYPES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.int32: "int",
    torch.int64: "int64_t",
}
FLAGS = ("-std=c++17", "-Og", "-ffp-contract=off", "-g0", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
# Arrays that a kernel declares for a thread alone are plain C++: an index outside of them ends the process.
CHECKED = ("-DEMULATE_CHECKED", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error")


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
        found = json.loads(report.read_text()) if report.exists() else lost(launches[0].name, died)
        data = bytearray((folder / "arrays").read_bytes())
    arrays = {name: _tensor(data, offsets[name], x) for name, x in tensors.items()}
    return build_report(arrays, found, printed)


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
        raise explain(error.log, source) from None

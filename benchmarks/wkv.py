"""How fast, how exact and how big is each way to compute WKV-5? All in one run, so that ratios hold.

    python benchmarks/wkv.py                       three shapes; about two minutes on two cores
    python benchmarks/wkv.py --shape 4,512,4,64    one shape (B,T,H,N); may be repeated
    python benchmarks/wkv.py --quick               one small shape: does everything run?

Ways: the loop under autograd, chunks in plain PyTorch, a plain C++ form with the loops of the official kernel
(`kernels/wkv5_plain.cpp`), and the C++ backend; chunks and backend are called through `wkv5`. They take turns, with a
matrix product in between as in a model, and the best of the turns counts: it is the one that other programs disturbed
least. The allocator keeps what is freed (`keep_freed_memory`), since pages fresh from the system would cost more than
the arithmetic. Nominal work: 4 B T H N^2 operations forward, three times that with the backward; "of matmul" is that
rate over the best float32 matrix product of the same run.

What it is not: a benchmark of a model.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from rwkv_nb.training.machine import keep_freed_memory
from rwkv_nb.wkv import backends, build, cpu, wkv5, wkv5_reference

SHAPES = [(4, 512, 4, 64), (8, 512, 12, 64), (1, 4096, 32, 64)]
QUICK = [(1, 128, 2, 64)]
WAYS = ("loop", "chunked", "plain C++", "cpu")
GRADIENTS = ("r", "k", "v", "w", "u")
LOOP_STATES = 6  # tensors of B T H N N numbers that autograd keeps for the loop, and a margin


def inputs(shape: tuple[int, int, int, int], dtype=torch.float32, low=-6.0, high=-1.0) -> list[Tensor]:
    """r, k, v, w, u and a gradient of y."""
    B, T, H, N = shape
    g = torch.Generator().manual_seed(1)
    r, k, v, gy = (torch.randn(B, T, H, N, generator=g).to(dtype) for _ in range(4))
    w = torch.empty(H, N).uniform_(low, high, generator=g)
    return [r, k, v, w, torch.randn(H, N, generator=g), gy]


# ---- the ways


class PlainCall(ctypes.Structure):
    """`struct Call` of kernels/wkv5_plain.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "threads")),
        *((name, ctypes.c_void_p) for name in ("parallel", "r", "k", "v", "w", "u", "gy")),
        *((name, ctypes.c_void_p) for name in ("y", "gr", "gk", "gv", "gw_parts", "gu_parts")),
    ]


@functools.cache
def plain_library(N: int) -> ctypes.CDLL:
    return build.load("wkv5_plain", ["wkv5_plain.cpp"], [*build.cxx_flags(), f"-DHEAD_SIZE={N}"])


def plain(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor | None = None) -> list[Tensor]:
    """y, or with gy the gradients of r, k, v, w, u."""
    B, T, H, N = r.shape
    call = PlainCall(B, T, H, torch.get_num_threads(), cpu.openmp()[0])
    results = {"y": torch.empty_like(r)}
    if gy is not None:
        results = {name: torch.empty_like(r) for name in ("gr", "gk", "gv")}
        results |= {name: r.new_empty(B, H, N) for name in ("gw_parts", "gu_parts")}
    for name, x in {"r": r, "k": k, "v": v, "w": w, "u": u, "gy": gy, **results}.items():
        setattr(call, name, None if x is None else x.data_ptr())
    plain_library(N).wkv5_plain(ctypes.byref(call))
    return [x.sum(0) if x.dim() == 3 else x for x in results.values()]


def run(way: str, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    return wkv5_reference(*tensors) if way == "loop" else wkv5(*tensors, backend=way)


def forward(way: str, tensors: list[Tensor]) -> Tensor:
    if way == "plain C++":
        return plain(*tensors)[0]
    with torch.no_grad():
        return run(way, tensors)[0]


def both(way: str, tensors: list[Tensor], gy: Tensor) -> list[Tensor]:
    """Forward and backward: y and the gradients of r, k, v, w, u."""
    if way == "plain C++":
        return [*plain(*tensors), *plain(*tensors, gy)]
    leaves = [x.detach().requires_grad_() for x in tensors]
    y, _ = run(way, leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


# ---- what is measured


def seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def take_turns(jobs: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Best seconds of each job, and of a large matrix product under "matmul"."""
    small, large = torch.randn(512, 512), torch.randn(2048, 2048)
    jobs = {**jobs, "matmul": lambda: large @ large}
    best = dict.fromkeys(jobs, float("inf"))
    for turn in range(turns):
        for name, job in jobs.items():
            if (turn > 0 and best[name] > 10) or (turn > 1 and best[name] > 1):  # longer than all the others together
                continue
            for _ in range(max(1, min(20, int(0.2 / best[name])))):  # what is quick is tried more often
                _ = small @ small
                best[name] = min(best[name], seconds(job))
    return best


def affordable(way: str, shape: tuple[int, int, int, int]) -> bool:
    B, T, H, N = shape
    return way != "loop" or psutil.virtual_memory().available > LOOP_STATES * 4 * B * T * H * N * N


def speed(shape: tuple[int, int, int, int], ways: Iterable[str], turns: int) -> list[list[str]]:
    """Rows: way, ms forward, ms both, times faster than the loop, share of the matmul rate."""
    *tensors, gy = inputs(shape)
    jobs: dict[str, Callable[[], object]] = {}
    for way in ways:
        jobs[f"{way} forward"] = functools.partial(forward, way, tensors)
        if affordable(way, shape):
            jobs[f"{way} both"] = functools.partial(both, way, tensors, gy)
    best = take_turns(jobs, turns)
    B, T, H, N = shape
    work, rate = 4 * B * T * H * N * N, 2 * 2048**3 / best["matmul"]
    rows = []
    for way in ways:
        row = [way]
        for part, operations in (("forward", work), ("both", 3 * work)):
            took, loop = best.get(f"{way} {part}"), best.get(f"loop {part}")
            row += ["-"] * 3 if took is None else [
                f"{took * 1e3:.1f}", f"{loop / took:.1f}" if loop else "-", f"{operations / took / rate:.1%}"
            ]  # fmt: skip
        rows.append(row)
    rows.append(["float32 matmul", f"{rate / 1e9:.0f} GFLOP/s", *[""] * 5])
    return rows


def accuracy(ways: Iterable[str], low: float, high: float) -> list[list[str]]:
    """Rows: way, largest error of y and of each gradient over its largest number; truth: the loop in float64."""
    *tensors, gy = inputs((1, 512, 2, 64), low=low, high=high)
    leaves = [x.double().requires_grad_() for x in tensors]
    y, _ = wkv5_reference(*leaves)
    truth = [y.detach(), *torch.autograd.grad(y, leaves, gy.double())]
    rows = []
    for way in ways:
        got = both(way, tensors, gy)
        errors = (float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, truth, strict=True))
        rows.append([way, *(f"{error:.1e}" for error in errors)])
    return rows


def peak_memory(way: str, shape: tuple[int, int, int, int]) -> tuple[float, float]:
    """Megabytes of inputs and outputs, and of the most that the process took beyond its start. Linux; in a process that
    does nothing else (`--memory`), with the allocator as it is."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    *small, gy = inputs((1, 20, 2, shape[-1]))
    both(way, small, gy)  # libraries are loaded, kernels built
    before = status("VmRSS")
    *tensors, gy = inputs(shape)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    results = both(way, tensors, gy)
    size = sum(x.numel() * x.element_size() for x in (*tensors, gy, *results)) / 2**20
    return size, status("VmHWM") - before


def memory(shape: tuple[int, int, int, int], ways: Iterable[str]) -> list[list[str]]:
    """Rows: way, MiB of inputs and outputs, MiB at the peak, their ratio."""
    rows = []
    for way in ways:
        if not affordable(way, shape):
            rows.append([way, "-", "-", "-"])
            continue
        command = [sys.executable, __file__, "--memory", way, "--shape", ",".join(map(str, shape))]
        size, peak = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        rows.append([way, f"{size:.0f}", f"{peak:.0f}", f"{peak / size:.2f}"])
    return rows


FIRST_USE = """
import time, torch
from rwkv_nb.wkv import {module}
B, T, H, N = 1, 20, 1, {N}
x = [torch.randn(B, T, H, N) for _ in range(3)] + [torch.zeros(H, N), torch.zeros(H, N), torch.zeros(B, H, N, N)]
start = time.perf_counter()
{module}.forward(*x, None)
print(time.perf_counter() - start)
"""


def first_use() -> list[list[str]]:
    """Rows: backend, seconds of the first call with an empty cache folder, of the first call in the next process."""
    rows = []
    for module, N in (("cpu", 64), ("cpu", 32), ("emulated", 64)):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "XDG_CACHE_HOME": folder}
            command = [sys.executable, "-c", FIRST_USE.format(module=module, N=N)]
            times = [
                float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
                for _ in range(2)
            ]
        rows.append([f"{module}, N = {N}", *(f"{t:.2f} s" for t in times)])
    return rows


# ---- printing


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Markdown, in columns that also read well as they are."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}\n")
    print("| " + " | ".join(x.ljust(n) for x, n in zip(head, widths, strict=True)) + " |")
    print("|" + "|".join("-" * (n + 1) + (":" if i else "-") for i, n in enumerate(widths)) + "|")
    for row in rows:
        print(
            "| "
            + " | ".join(x.rjust(n) if i else x.ljust(n) for i, (x, n) in enumerate(zip(row, widths, strict=True)))
            + " |"
        )
    sys.stdout.flush()


def cpu_tables(shapes: list[tuple[int, int, int, int]], wanted: Iterable[str], turns: int) -> None:
    missing = {way: why for way, why in backends().items() if way in WAYS and why != "available"}
    if build.find_cxx() is None:
        missing["plain C++"] = build.CXX_REMEDY
    ways = [way for way in wanted if way not in missing]
    for way, why in missing.items():
        print(f"{way}: not measured: {why}")
    machine = f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    print(f"{torch.get_num_threads()} threads, float32, {machine}")
    head = ["", "forward ms", "x loop", "of matmul", "+ backward ms", "x loop", "of matmul"]
    for shape in shapes:
        print_table(f"(B, T, H, N) = {shape}", head, speed(shape, ways, turns))
    if Path("/proc/self/clear_refs").exists():
        head = ["", "inputs + outputs MiB", "at the peak MiB", "ratio"]
        print_table(f"Memory, forward + backward, {shapes[0]}", head, memory(shapes[0], ways))
    for low, high in ((-6.0, -1.0), (-10.0, 4.0)):
        title = f"Largest error over largest number, against float64, time_decay from {low:g} to {high:g}"
        print_table(title, ["", "y", *GRADIENTS], accuracy(ways, low, high))
    print_table("First use", ["", "empty cache folder", "next process"], first_use())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="B,T,H,N", help="a shape to measure; may be repeated")
    parser.add_argument("--ways", help=f"only some of {', '.join(WAYS)}, as in --ways 'chunked,cpu'")
    parser.add_argument("--quick", action="store_true", help="one small shape, few turns")
    parser.add_argument("--turns", type=int, default=8, help="rounds in which each way is tried once or more")
    parser.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    parser.add_argument("--memory", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, text.split(","))) for text in options.shape or ()]
    if any(len(shape) != 4 for shape in shapes):
        parser.error(f"--shape {options.shape}: expected four numbers B,T,H,N, as in 8,512,12,64")
    ways = options.ways.split(",") if options.ways else WAYS
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways {options.ways}: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    if options.memory:
        print(*peak_memory(options.memory, shapes[0]))
        return
    keep_freed_memory()
    shapes = shapes or (QUICK if options.quick else SHAPES)
    cpu_tables(shapes, ways, 2 if options.quick else options.turns)


if __name__ == "__main__":
    main()

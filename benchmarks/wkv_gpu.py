"""How exact and how fast are the CUDA kernels? One command on a machine with an NVIDIA GPU and nvcc.

    python benchmarks/wkv_gpu.py              check, then time: about two minutes
    python benchmarks/wkv_gpu.py --emulate    without a GPU: the same steps by emulation, tiny but for the second

1. Every kernel, head size and number format against the loop in float64; the exit code tells whether all are right.
2. Errors in bfloat16 at head size 64, beside the peer if it is there.
3. Milliseconds in bfloat16: medians by CUDA events, warmed up, with a cold cache. "Of copy": the bytes that must move
   (4 tensors forward, 11 with the backward) over the time, as a share of the bandwidth of a copy in the same run.

The peer: flash-linear-attention's `chunk_rwkv6` (`pip install flash-linear-attention`), which is fed the decay of every
step. What it is not: a benchmark of a model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_nb.wkv import cuda, emulated, wkv5_reference

SHAPES = [(8, 4096, 64, 64), (1, 4096, 32, 64), (8, 512, 12, 64)]
NAMES = ("y", "last", "gr", "gk", "gv", "gw", "gu", "gstate")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
KERNELS = ("plain", "chunked")

Way = Callable[..., list[Tensor]]  # (r, k, v, w, u, state, gy, glast, backward) -> y and last, and the gradients


def inputs(B: int, T: int, H: int, N: int, dtype: torch.dtype, device: str, state: bool = True) -> list[Tensor]:
    """r, k, v, w, u, state, gy, glast; without `state` the two states are zero, as in training."""
    g = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    r, k, v, gy = (normal(B, T, H, N).to(dtype) for _ in range(4))
    w = torch.empty(H, N, device=device).uniform_(-6, -1, generator=g)  # as a model begins
    u = normal(H, N).bfloat16().float()  # so that who takes it in bfloat16 has the same numbers
    states = [normal(B, H, N, N) if state else torch.zeros(B, H, N, N, device=device) for _ in range(2)]
    return [r, k, v, w, u, states[0], gy, states[1]]


# ---- the ways


def ours(module, kernel: str) -> Way:
    def way(r, k, v, w, u, state, gy, glast, backward: bool) -> list[Tensor]:
        out = list(module.forward(r, k, v, w, u, state, None, kernel=kernel))
        return out + list(module.backward(r, k, v, w, u, state, None, gy, glast, kernel=kernel)) if backward else out

    return way


def flash_linear_attention() -> Way | None:
    """`chunk_rwkv6`; it takes the logarithm of the decay for every step, which is made before the clock starts."""
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
    except ImportError:
        return None
    made: dict[tuple, Tensor] = {}

    def way(r, k, v, w, u, state, gy, glast, backward: bool) -> list[Tensor]:
        if (key := (w.data_ptr(), r.shape)) not in made:
            made.clear()
            made[key] = (-torch.exp(w)).expand_as(r).contiguous()
        log_d = made[key]
        if not backward:
            return list(chunk_rwkv6(r, k, v, log_d, u, scale=1.0, initial_state=state, output_final_state=True))
        leaves = [x.detach().requires_grad_() for x in (r, k, v, log_d, u, state)]
        *rkv, log_d, u, state = leaves
        y, last = chunk_rwkv6(*rkv, log_d, u, scale=1.0, initial_state=state, output_final_state=True)
        gr, gk, gv, glog, gu, gstate = torch.autograd.grad([y, last], leaves, [gy, glast])
        return [y, last, gr, gk, gv, glog.sum((0, 1)) * -torch.exp(w), gu, gstate]

    return way


# ---- exact?


def errors(way: Way, tensors: list[Tensor]) -> list[float]:
    """Of each result: the largest difference from float64 over the largest number."""
    *x, gy, glast = (t.double().cpu() for t in tensors)
    leaves = [t.requires_grad_() for t in x]
    y, last = wkv5_reference(*leaves)
    truth = [y, last, *torch.autograd.grad([y, last], leaves, [gy, glast])]
    pairs = zip(way(*tensors, True), (x.detach() for x in truth), strict=True)
    return [float((a.double().cpu() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs]


def allowed(name: str, dtype: torch.dtype, kernel: str) -> float:
    """float32: sums in float32. Half precision: the rounding of what comes out; if chunked of factors to tf32 as well,
    but not for the gradients in bfloat16."""
    if dtype == torch.float32:
        return 2e-5 if name == "gw" else 5e-6
    rounding = torch.finfo(dtype).eps / 2 if name in ("y", "gr", "gk", "gv") else 1e-5
    tf32 = kernel == "chunked" and (dtype == torch.float16 or name in ("y", "last"))
    return rounding + (1e-3 if tf32 else 5e-5 if kernel == "chunked" else 1e-5)


def check(module, device: str, sizes: list[int], lengths: list[int], kernels: list[str]) -> bool:
    print("\nLargest error over largest number, against the loop in float64 (worst of all lengths)\n")
    print(f"| kernel, head size, format | {' | '.join(NAMES)} | |\n|---|{'--:|' * len(NAMES)}---|")
    good = True
    for kernel in kernels:
        for N in sizes:
            for dtype, title in DTYPES.items():
                found = [errors(ours(module, kernel), inputs(2, T, 2, N, dtype, device)) for T in lengths]
                worst = [max(column) for column in zip(*found, strict=True)]
                bad = [n for n, e in zip(NAMES, worst, strict=True) if not e <= allowed(n, dtype, kernel)]
                good = good and not bad
                cells = [f"{kernel}, {N}, {title}", *(f"{e:.1e}" for e in worst), f"WRONG: {bad}" if bad else "right"]
                print(f"| {' | '.join(cells)} |", flush=True)
    return good


def rounding_errors(ways: dict[str, Way], device: str, steps: int, heads: int) -> bool:
    """One row a way: bfloat16 at head size 64, no states, as in training. Are the gradients of r, k and v in chunks as
    exact as the plain kernels'?"""
    print(f"\nErrors in bfloat16, head size 64, {steps} steps, no states\n")
    shown = [n for n in NAMES if n not in ("last", "gstate")]
    print(f"| | {' | '.join(shown)} |\n|---|{'--:|' * len(shown)}")
    tensors = inputs(1, steps, heads, 64, torch.bfloat16, device, state=False)
    found = {name: dict(zip(NAMES, errors(way, tensors), strict=True)) for name, way in ways.items()}
    for name, row in found.items():
        print(f"| {name}, error | {' | '.join(f'{row[n]:.2e}' for n in shown)} |", flush=True)
    chunked = found.get("chunked", found["plain"])
    return all(chunked[n] <= 1.05 * found["plain"][n] for n in ("gr", "gk", "gv"))


# ---- fast?


def gpu_seconds(job: Callable[[], object], turns: int = 20) -> float:
    """Median of `turns` runs by CUDA events, each after 2 GB of other numbers went through the cache. They also keep
    the GPU busy until the processor has asked for the whole job, so that its speed is not measured."""
    flush = torch.empty(2**29, device="cuda")
    times = []
    for turn in range(turns + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        job()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes read and written a second while a GB is copied."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / gpu_seconds(lambda: target.copy_(source))


def cpu_seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def table(shape: tuple[int, int, int, int], ways: dict[str, Way], device: str, seconds, bandwidth: float) -> None:
    """One row a way; times as milliseconds, times plain, share of the bandwidth of a copy."""
    tensors = inputs(*shape, torch.bfloat16, device, state=False)
    size = tensors[0].numel() * 2
    print(f"\n(B, T, H, N) = {shape}, bfloat16\n")
    print("| | forward ms | x plain | of copy | + backward ms | x plain | of copy |\n|---|--:|--:|--:|--:|--:|--:|")
    base: dict[bool, float] = {}
    for name, way in ways.items():
        cells = []
        for backward, tensors_moved in ((False, 4), (True, 11)):
            took = seconds(lambda way=way, backward=backward: way(*tensors, backward))
            base.setdefault(backward, took)
            share = tensors_moved * size / took / bandwidth
            cells += [f"{took * 1e3:.3f}", f"{base[backward] / took:.2f}", f"{share:.0%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def peers() -> dict[str, Way]:
    found: dict[str, Way] = {}
    if (way := flash_linear_attention()) is not None:
        found["chunk_rwkv6"] = way
    else:
        print("chunk_rwkv6: not measured: `pip install flash-linear-attention` brings it")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emulate", action="store_true", help="the same steps without a GPU, at tiny shapes")
    options = parser.parse_args(arguments)
    if options.emulate:
        if reason := emulated.why_not():
            print(f"Nothing to emulate with: {reason}")
            return 1
        print("By emulation: the errors are those of the kernels' source; the times say nothing about a GPU.")
        good = check(emulated, "cpu", [16], [18], list(KERNELS))
        ways = {name: ours(emulated, name) for name in KERNELS}
        good = rounding_errors(ways, "cpu", 1024, 4) and good
        table((1, 16, 1, 16), ways, "cpu", cpu_seconds, bandwidth=10e9)
        return int(not good)
    if reason := cuda.why_not():
        print(f"No measurement on a GPU: {reason}. (--emulate checks the kernels' source on the processor.)")
        return 0
    major, minor = torch.cuda.get_device_capability()
    kernels = list(KERNELS) if (major, minor) >= cuda.TENSOR_CORES else ["plain"]
    print(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, torch {torch.__version__}")
    good = check(cuda, "cuda", list(cuda.HEAD_SIZES), [1, 17, 77, 300], kernels)
    ways = {name: ours(cuda, name) for name in kernels} | peers()
    good = rounding_errors(ways, "cuda", 1024, 4) and good
    bandwidth = copy_bandwidth()
    print(f"\nCopy: {bandwidth / 1e9:.0f} GB/s")
    for shape in SHAPES:
        table(shape, ways, "cuda", gpu_seconds, bandwidth)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

"""How fast does a model train on a CPU, how much memory does that take, and where does the time go?

    python benchmarks/training.py                      all tables; about six minutes on two cores
    python benchmarks/training.py --only speed,world   some of them: speed, compile, loading, world, parts, memory
    python benchmarks/training.py --quick              small models, few steps: does everything run?

A step is what the trainer does: forward, loss, backward, clipping, fused Adam; the batch is random. Ways take turns of
three steps, so that ratios hold, and the best step counts: it is the one that other programs disturbed least. The
allocator keeps what is freed, as in the trainer. On a busy machine --processor-time counts, on one thread, what the
processor gave to this program. Peaks are those of a process of its own, everything in it included.

The models are in training_ways.py: ours, a transformer in nanoGPT's form, and ours by its definitions.

What it is not: a comparison of how well models learn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training_ways import (
    NOTEBOOK,
    QUICK,
    QUICK_SCRIPTS,
    QUICK_WORLD,
    SCRIPTS,
    SMALL,
    WORLD,
    LightningSteps,
    Size,
    Step,
    by_parts,
)  # fmt: skip
from wkv import print_table

from rwkv_nb.training.compiling import compiled as compiled_blocks
from rwkv_nb.training.compiling import why_not
from rwkv_nb.training.machine import keep_freed_memory
from rwkv_nb.training.optimizer import build_optimizer

# ---- what is measured


def take_turns(ways: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Best seconds of each way; the first turn warms up."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(turns + 1):
        for name, seconds in ways.items():
            took = seconds()
            best[name] = min(best[name], took) if turn else best[name]
    return best


def rates(turns: int) -> None:
    """Rates of the matrix products of a layer, which bound everything else."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(2048, 256, dtype=dtype), torch.randn(896, 256, dtype=dtype)
        for _ in range(10 * turns):
            start = time.perf_counter()
            x @ w.T
            best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - start)
    single, half = (2 * 2048 * 256 * 896 / best[dtype] / 1e9 for dtype in best)
    found = f"float32 {single:.0f} GFLOP/s, bfloat16 {half:.0f}, {half / single:.2f} times"
    print(f"matrix products, 2048 x 256 x 896: {found}")


def own_process(*arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def peak_of(way: str, size: Size, steps: int = 3) -> tuple[float, float]:
    """GB of the process at its peak, and seconds of the quickest step; in a process that does nothing else. Linux."""
    keep_freed_memory()
    step = Step(way, size)
    took = step.seconds(steps)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM")), took


def peak(way: str, size: Size) -> str:
    if not Path("/proc/self/status").exists():
        return "-"
    sizes = ",".join(map(str, (size.L, size.D, size.V, size.T, size.B)))
    return f"{own_process('--peak', way, '--size', sizes)[0]:.2f}"


def speed(size: Size, turns: int) -> None:
    names = ["transformer", "straightforward RWKV-5", "RWKV-5", "transformer, bf16", "RWKV-5, bf16"]
    steps = {name: Step(name, size) for name in names}
    loop = "RWKV-5, Lightning's loop"
    with tempfile.TemporaryDirectory() as folder:
        ways = {name: step.seconds for name, step in steps.items()}
        best = take_turns({**ways, loop: LightningSteps(size, folder).seconds}, turns)
    rows = []
    for name, took in best.items():
        parameters = sum(p.numel() for p in steps[name if name != loop else "RWKV-5"].model.parameters()) / 1e6
        rows.append([
            name, f"{parameters:.2f}", f"{took * 1e3:.0f}", f"{size.B * size.T / took:.0f}",
            f"{best['transformer'] / took:.2f}", f"{best['straightforward RWKV-5'] / took:.2f}",
            peak(name, size) if name != loop else "",
        ])  # fmt: skip
    head = ["", "M parameters", "ms a step", "tokens/s", "x transformer", "x straightforward", "peak GB"]
    print_table(f"Speed, {size}", head, rows)


def compiled(size: Size, turns: int) -> None:
    """The flag compile: what torch.compile makes of a step."""
    if reason := why_not(on_cpu=True):
        print(f"\nNo table of torch.compile: {reason}")
        return
    rows = []
    for name in ("RWKV-5", "RWKV-5, bf16"):
        ours, theirs = Step(name, size), Step(name, size)
        with compiled_blocks(theirs.model, True):
            start = time.perf_counter()
            theirs.run()
            first = time.perf_counter() - start
            best = take_turns({"ours": ours.seconds, "compiled": theirs.seconds}, turns)
        ours, compiled = best["ours"], best["compiled"]
        rows.append([name, f"{ours * 1e3:.0f}", f"{compiled * 1e3:.0f}", f"{ours / compiled:.2f}", f"{first:.0f}"])
    head = ["", "ms a step", "compiled", "times as quick", "seconds of the first step"]
    print_table(f"torch.compile, {size}", head, rows)


def loading(sizes: list[Size], steps: int) -> None:
    """How long a step waits for its batch: all that passes between the end of one step and the start of the next."""
    rows = []
    for size in sizes:
        for data_type in ("utf-8", "binidx"):
            with tempfile.TemporaryDirectory() as folder:
                clock = LightningSteps(size, folder, steps, data_type).clock()
            wait = statistics.median(clock.between)
            took = [str(size), data_type, f"{clock.best * 1e3:.1f}", f"{wait * 1e3:.2f}", f"{wait / clock.best:.2%}"]
            rows.append(took)
    print_table("Waiting for data", ["", "data", "ms a step", "ms between two", "share"], rows)


def world(size: Size, turns: int) -> None:
    names = ["plain head", "sliced head", "plain head, bf16", "sliced head, bf16"]
    steps = {name: Step(name, size) for name in names}
    best = take_turns({name: step.seconds for name, step in steps.items()}, max(2, turns // 3))
    rows = []
    for name, took in best.items():
        ratio = f"{best['plain head'] / took:.2f}"
        rows.append([name, f"{took * 1e3:.0f}", f"{size.B * size.T / took:.0f}", ratio, peak(name, size)])
    print_table(f"Large vocabulary, {size}", ["", "ms a step", "tokens/s", "x plain head", "peak GB"], rows)


GROUPS = {  # words in the name of an operation -> part of the step
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "_linear_pointwise"),
    "WKV or attention": ("wkv5", "scaled_dot_product"),
    "optimizer and clipping": ("fused_adam", "vector_norm", "foreach", "Optimizer"),
    "loss": ("HeadLoss", "L2Wrap", "softmax", "logsumexp", "nll_loss"),
    "layers, fused": ("_Mix", "_NormedGate", "_Relu2", "_Gate"),
    "layer norms": ("layer_norm", "LayerNorm"),
}


def shares(step: Step, steps: int) -> dict[str, float]:
    """Part of the step -> its share of the time; what fits no group is "everything else"."""
    with by_parts():  # of a layer that is one node the profiler would see the products alone
        step.run()
        with profile(activities=[ProfilerActivity.CPU]) as record:
            for _ in range(steps):
                step.run()
    found = dict.fromkeys([*GROUPS, "everything else"], 0.0)
    for event in record.key_averages():
        part = next((g for g, words in GROUPS.items() if any(w in event.key for w in words)), "everything else")
        found[part] += event.self_cpu_time_total
    total = sum(found.values())
    return {part: took / total for part, took in found.items()}


def parts(small: Size, large: Size, steps: int) -> None:
    columns = [
        ("transformer", small), ("straightforward RWKV-5", small), ("RWKV-5", small), ("RWKV-5, bf16", small),
        ("sliced head", large),
    ]  # fmt: skip
    found = [shares(Step(name, size), steps) for name, size in columns]
    rows = [[part, *(f"{column[part]:.1%}" for column in found)] for part in found[0]]
    title = f"Shares of a step, its layers by their parts, by torch's profiler ({small}; {large})"
    print_table(title, ["", *(name for name, _ in columns)], rows)


def adam(size: Size, turns: int) -> None:
    """What the optimizer's step costs with a large vocabulary, and what its embedding does."""
    step = Step("sliced head", size)
    step.run()
    alone = build_optimizer(nn.ModuleDict({"emb": step.model.emb}), step.cfg)
    alone.step()

    def timed(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    ways = {"step": step.seconds}
    best = take_turns({**ways, "all": lambda: timed(step.optimizer.step), "emb": lambda: timed(alone.step)}, turns)
    seen = len(torch.unique(step.idx)) / size.V
    whole = f"{best['all'] * 1e3:.0f} ms of a step of {best['step'] * 1e3:.0f} ms ({best['all'] / best['step']:.1%})"
    emb = f"{best['emb'] * 1e3:.0f} ms ({best['emb'] / best['step']:.1%})"
    print(f"\nAdam: {whole}, for emb alone {emb}; a batch has {seen:.1%} of its rows")


def memory(size: Size) -> None:
    rows = []
    for name in ("sliced head", "plain head"):
        sizes = ",".join(map(str, (size.L, size.D, size.V, size.T, size.B)))
        gigabytes, took = own_process("--peak", name, "--size", sizes)
        rows.append([name, f"{gigabytes:.2f}", f"{took:.1f}"])
    print_table(f"Memory, {size}", ["", "peak GB", "seconds a step"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = ("speed", "compile", "loading", "world", "parts", "memory")
    parser.add_argument("--only", default=",".join(tables), help=f"some of {', '.join(tables)}, as in speed,world")
    parser.add_argument("--memory", action="store_true", help="the same as --only memory")
    parser.add_argument("--quick", action="store_true", help="small models, few steps")
    parser.add_argument("--turns", type=int, default=10, help="how often each way has its turn")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the kernels")
    parser.add_argument("--processor-time", action="store_true", help="what the processor did, not the clock; 1 thread")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.processor_time else options.threads)
    if options.processor_time:
        Step.clock = staticmethod(time.process_time)
    if options.peak:
        print(*peak_of(options.peak, Size(*map(int, options.size.split(",")))))
        return
    wanted = ["memory"] if options.memory else options.only.split(",")
    if unknown := set(wanted) - set(tables):
        parser.error(f"--only {options.only}: {', '.join(sorted(unknown))} is none of {', '.join(tables)}")
    keep_freed_memory()
    turns = 1 if options.quick else options.turns
    small, large, scripts = (QUICK, QUICK_WORLD, QUICK_SCRIPTS) if options.quick else (SMALL, WORLD, SCRIPTS)
    machine = f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    print(f"{torch.get_num_threads()} threads, {machine}")
    rates(turns)
    if "speed" in wanted:
        speed(small, turns)
    if "compile" in wanted:
        compiled(small, turns)
    if "loading" in wanted:
        loading([small] if options.quick else [small, NOTEBOOK], 4 if options.quick else 20)
    if "world" in wanted:
        world(large, turns)
        adam(large, max(1, turns // 3))
    if "parts" in wanted:
        parts(small, large, 1 if options.quick else 3)
    if "memory" in wanted:
        memory(scripts)


if __name__ == "__main__":
    main()

"""The devices of this machine, as the planner of strategies needs them: free memory, and how fast it is read.

    best_strategy(config, this_machine())

What it is not: exact. Bandwidth is the best of a few sums over a block that no cache holds, a tenth of a second in all.
"""

from __future__ import annotations

import time

import psutil
import torch

from .memory import Device

BLOCK = 2**26  # numbers: 256 MiB of float32


def this_machine() -> dict[str, Device]:
    """"cpu" and each CUDA GPU ("cuda" for the only one, else "cuda:0", "cuda:1", …), free memory at this moment."""
    machine = {"cpu": Device(psutil.virtual_memory().available, read_bandwidth("cpu"))}
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(n):
        free, _ = torch.cuda.mem_get_info(i)
        name = "cuda" if n == 1 else f"cuda:{i}"
        machine[name] = Device(free, read_bandwidth(f"cuda:{i}"), bus_bandwidth(f"cuda:{i}"))
    return machine


def read_bandwidth(device: str, numbers: int = BLOCK, tries: int = 4) -> float:
    """Bytes a second at which a device reads its own memory."""
    block = torch.ones(numbers, device=device)
    return block.nbytes / _best(block.sum, device, tries)


def bus_bandwidth(device: str, numbers: int = BLOCK // 4, tries: int = 4) -> float:
    """Bytes a second from the computer's memory to a GPU, from pages that stay where they are (pinned)."""
    here, there = torch.ones(numbers).pin_memory(), torch.empty(numbers, device=device)
    return here.nbytes / _best(lambda: there.copy_(here, non_blocking=True), device, tries)


def _best(function, device: str, tries: int) -> float:
    """The least seconds of a few calls; a GPU is waited for."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best

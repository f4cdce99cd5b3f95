"""The devices of this machine, as the planner of strategies needs them: free memory, and how fast it is read.

    best_strategy(config, this_machine())

What it is not: exact. Bandwidth is the best of a few sums over a block that no cache holds, a tenth of a second in all;
where little memory is free the block is smaller, and a cache may make it look faster.
"""

from __future__ import annotations

import time
import warnings

import psutil
import torch
from torch import Tensor

from .memory import Device

BLOCK = 2**26  # numbers: 256 MiB of float32
LEAST = 2**18  # numbers of the smallest block that is tried: 1 MiB
SHARE = 4  # a block takes at most this part of what is free


def this_machine() -> dict[str, Device]:
    """"cpu" and each CUDA GPU ("cuda" for the only one, else "cuda:0", "cuda:1", …), free memory at this moment.

    A GPU without room for even the smallest block is left out, with a warning: no strategy could use it. A processor in
    that state stays, with no free memory.
    """
    available = psutil.virtual_memory().available
    try:
        machine = {"cpu": Device(available, read_bandwidth("cpu", _block_size(available)))}
    except RuntimeError as error:
        warnings.warn(f"cpu counts as full: {_first_line(error)}; end other programs", stacklevel=2)
        machine = {"cpu": Device(0, 1.0)}
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(n):
        name = "cuda" if n == 1 else f"cuda:{i}"
        try:
            free, _ = torch.cuda.mem_get_info(i)
            machine[name] = Device(free, read_bandwidth(f"cuda:{i}", _block_size(free)), **_bus(i, free))
        except RuntimeError as error:  # out of memory, maybe already for what CUDA itself needs
            remedy = "end what fills its memory (`nvidia-smi` shows it)"
            warnings.warn(f"{name} is left out: {_first_line(error)}; {remedy}", stacklevel=2)
    return machine


def read_bandwidth(device: str, numbers: int = BLOCK, tries: int = 4) -> float:
    """Bytes a second at which a device reads its own memory. Raises RuntimeError if not even 1 MiB can be had."""
    block = _largest(lambda numbers: torch.ones(numbers, device=device), numbers)
    return block.nbytes / _best(block.sum, device, tries)


def bus_bandwidth(device: str, numbers: int = BLOCK // 4, tries: int = 4) -> float:
    """Bytes a second from the computer's memory to a GPU, from pages that stay where they are (pinned)."""
    here = _largest(lambda numbers: torch.ones(numbers).pin_memory(), numbers)
    there = _largest(lambda numbers: torch.empty(numbers, device=device), len(here))
    here = here[: len(there)]
    return here.nbytes / _best(lambda: there.copy_(here, non_blocking=True), device, tries)


def _bus(i: int, free: int) -> dict[str, float]:
    """The bus of GPU i; nothing, that is what most have, where no memory can be pinned."""
    try:
        return {"bus": bus_bandwidth(f"cuda:{i}", min(BLOCK // 4, _block_size(free)))}
    except RuntimeError:
        return {}


def _block_size(free: int) -> int:
    """Numbers of a block to measure with where so many bytes are free."""
    return max(LEAST, min(BLOCK, free // (4 * SHARE)))


def _largest(make, numbers: int) -> Tensor:
    """make(numbers), or of fewer if there is no room: the last try is made with LEAST."""
    while True:
        try:
            return make(numbers)
        except RuntimeError:  # torch.OutOfMemoryError is one
            if numbers <= LEAST:
                raise
            numbers = max(LEAST, numbers // 4)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


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

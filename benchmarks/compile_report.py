"""What nvcc makes of the CUDA kernels: registers, shared memory and spills of every instance, for every architecture.

    python benchmarks/compile_report.py                          everything: five minutes on two cores
    python benchmarks/compile_report.py --arch sm_90 --size 64   one row a kernel

Prints the table of `RESULTS.md` (numbers of the worst number format) and ends with an error if any kernel spills
registers to memory. Needs nvcc (CUDA 12 or newer), no GPU. What it is not: a measurement of speed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rwkv_nb.wkv import build

SOURCE = "launch.cu"
SIZES = (16, 32, 64, 128)
DTYPES = ("float", "__half", "__nv_bfloat16")  # in the order of launch.h
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Use:
    """What one kernel needs on one architecture: registers of a thread; bytes of shared memory, stack and spills."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def architectures(nvcc: str, low: int = 75, high: int = 90) -> list[str]:
    """What this nvcc can compile for, from sm_75 to sm_90."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [a for a in dict.fromkeys(listed.split()) if re.fullmatch(r"sm_\d+", a) and low <= int(a[3:]) <= high]


def all_kernels(arch: str) -> list[str]:
    """What tells launch.cu to compile the fast kernels too, where there are tensor cores for them (from sm_80)."""
    return ["-DWKV5_CHUNKED"] if int(arch.removeprefix("sm_")) >= 80 else []


def parse(log: str) -> list[Use]:
    """The lines of `nvcc -Xptxas -v`, one Use for each kernel in it. ValueError if one has no numbers."""
    uses = []
    parts = ENTRY.split(log)
    for name, arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        spills, used = SPILLS.search(text), USED.search(text)
        if not spills or not used:
            raise ValueError(f"nvcc says nothing on the registers of {name}; is -Xptxas -v still its word for that?")
        stack, stores, loads = map(int, spills.groups())
        length, rest = re.match(r"_Z(\d+)(.*)", name).groups()  # the compiler's spelling: length, name, types
        shared = int(used.group(2) or 0)
        uses.append(Use(rest[: int(length)], arch, int(used.group(1)), shared, stack, stores + loads))
    return uses


def compile_for(nvcc: str, arch: str, defines: Iterable[str] = (), source: str | Path = SOURCE) -> list[Use]:
    """Compile the device code of one file of `kernels/`. RuntimeError with nvcc's words if it does not compile."""
    folder = build.kernels_folder()
    with tempfile.TemporaryDirectory() as out:
        options = ["-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-I{folder}", *defines]
        command = [nvcc, *options, str(folder / source), "-o", str(Path(out) / "kernels.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr)


def table(rows: dict[tuple[str, int], dict[str, list[Use]]], archs: list[str]) -> str:
    """Markdown: a row a kernel and head size, registers on each architecture; shared memory is the same on all."""
    head = f"| kernel | head size | shared memory | {' | '.join(archs)} |"
    lines = [head, "|---|--:|--:|" + "--:|" * len(archs)]
    for (kernel, size), by_arch in sorted(rows.items(), key=lambda item: (item[0][0], item[0][1])):
        shared = max(u.shared for uses in by_arch.values() for u in uses)
        registers = (str(max((u.registers for u in by_arch.get(a, [])), default="")) for a in archs)
        lines.append(f"| `{kernel}` | {size or 'any'} | {shared} B | {' | '.join(registers)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="such as sm_90; default: all from sm_75 to sm_90")
    parser.add_argument("--size", type=int, action="append", choices=SIZES, help="head size; default: all")
    arguments = parser.parse_args()
    nvcc = build.find_nvcc()
    if nvcc is None:
        print(f"No nvcc here: {build.NVCC_REMEDY}. RESULTS.md has the last report.")
        return 0
    archs = arguments.arch or architectures(nvcc)
    jobs = list(product(archs, arguments.size or SIZES, range(len(DTYPES))))
    with ThreadPoolExecutor(2) as pool:
        only = ((f"-DWKV5_HEAD_SIZE={size}", f"-DWKV5_DTYPE={dtype}", *all_kernels(arch)) for arch, size, dtype in jobs)
        found = pool.map(lambda job, defines: compile_for(nvcc, job[0], defines), jobs, only)
    rows: dict[tuple[str, int], dict[str, list[Use]]] = {}
    spilled = []
    for (arch, size, dtype), uses in zip(jobs, found, strict=True):
        for use in uses:
            key = (use.kernel, 0 if use.kernel == "wkv5_sum_over_batch" else size)
            rows.setdefault(key, {}).setdefault(arch, []).append(use)
            if use.spills or use.stack:
                spilled.append(f"{use.kernel}, head size {size}, {DTYPES[dtype]}, {arch}: {use.spills} bytes spilled")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.split()
    print(
        f"nvcc {version[version.index('release') + 1].rstrip(',')}: registers a thread, the most of any number format\n"
    )
    print(table(rows, archs))
    print(f"\n{len(spilled)} kernels spill." if spilled else "\nNo kernel spills, none needs stack.")
    print("\n".join(spilled))
    return int(bool(spilled))


if __name__ == "__main__":
    sys.exit(main())

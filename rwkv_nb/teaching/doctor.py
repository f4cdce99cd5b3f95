"""The self-check: one line a part, [OK], [--] (optional, absent) or [FAIL], with the remedy.

    python -m rwkv_nb doctor            exit code 1 if any part that the course needs has failed

What it is not: an installer. It changes nothing (the write test removes its file) and starts no compiler.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

NEEDED_MEMORY_GB, NEEDED_DISK_GB = 3.0, 2.0  # notebook 00 peaks below 2 GB; runs/ and built data below 1 GB


@dataclass(frozen=True)
class Finding:
    """One line of the report. status: "ok", "absent" (optional) or "fail"."""

    part: str
    status: str
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {"ok": "[OK]  ", "absent": "[--]  ", "fail": "[FAIL]"}[self.status]
        return f"{mark} {self.part:<20} {self.detail}" + (f"  ->  {self.remedy}" if self.remedy else "")


def check_python() -> Finding:
    """CPython 3.11 to 3.13: the range that every pinned package has wheels for."""
    detail = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "ok", detail)
    return Finding("Python", "fail", detail, "use Python 3.11 to 3.13: make clean; make setup PYTHON=python3.12")


def check_packages() -> Iterator[Finding]:
    """Each run-time dependency of this package against its lower bound in pyproject.toml."""
    for text in requires("rwkv-nb") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "fail", "not installed", f"pip install '{text}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding(requirement.name, "ok", f"{found} (needs {requirement.specifier})")
        else:
            yield Finding(requirement.name, "fail", f"{found} is not {requirement.specifier}", f"pip install '{text}'")


def check_extras() -> Iterator[Finding]:
    """Packages that only some runs ask for, by a flag of `train`."""
    for package, flag in (("deepspeed", "--strategy deepspeed_…"), ("tensorboard", "--logger tensorboard"),
                          ("wandb", "--wandb NAME")):  # fmt: skip
        try:
            yield Finding(package, "ok", f"{version(package)}, for {flag}")
        except PackageNotFoundError:
            yield Finding(package, "absent", f"not installed; only for {flag}", "optional; pip install -e '.[gpu]'")


def check_torch() -> Iterator[Finding]:
    """What torch computes on, and whether bfloat16 products are quick on this processor."""
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch device", "fail", "torch is not installed", "pip install torch")
        return
    import torch

    from rwkv_nb.training.trainer import fast_bf16

    yield Finding(
        "torch device",
        "ok",
        f"cpu, {torch.get_num_threads()} threads, capability {torch.backends.cpu.get_cpu_capability()}",
    )
    if fast_bf16():
        yield Finding("bfloat16 products", "ok", "in hardware: training uses them")
    else:
        yield Finding("bfloat16 products", "absent", "no quicker than float32 here", "training uses float32")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        yield Finding("GPU", "ok", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}")
    else:
        why = "torch sees no CUDA device" if torch.version.cuda else "this torch is a CPU build"
        yield Finding("GPU", "absent", why, "none is needed; README, 'With a GPU', says how to use one")


def first_line(*command: str, having: str = "") -> str:
    """The first line with `having` in it that a tool prints about itself, or "" if it does not answer."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = [line for line in answer.stdout.strip().splitlines() if having in line]
    return lines[0] if answer.returncode == 0 and lines else ""


def check_compilers() -> Iterator[Finding]:
    """Optional tools: without them the operator of plain PyTorch is used; and what they make possible here."""
    from rwkv_nb.wkv import backends, build

    for part, path, having, remedy in (
        ("C++ compiler", build.find_cxx(), "", f"optional; {build.CXX_REMEDY}"),
        ("nvcc", build.find_nvcc(), "release", "optional; only to compile the CUDA kernels yourself"),
    ):
        if path:
            yield Finding(part, "ok", first_line(path, "--version", having=having) or Path(path).name)
        else:
            yield Finding(part, "absent", "none found", remedy)
    found = [name for name, text in backends().items() if text == "available"]
    yield Finding("wkv5 operator", "ok", ", ".join(found))


def check_machine(folder: Path) -> Iterator[Finding]:
    """Free memory, free disk and the right to write where the notebooks write."""
    import psutil

    memory = psutil.virtual_memory().available / 2**30
    yield Finding(
        "free memory",
        *(
            ("ok", f"{memory:.1f} GiB")
            if memory >= NEEDED_MEMORY_GB
            else ("fail", f"{memory:.1f} GiB", f"close programs: notebook 00 wants {NEEDED_MEMORY_GB:.0f} GiB")
        ),
    )
    disk = shutil.disk_usage(folder).free / 2**30
    yield Finding(
        "free disk",
        *(
            ("ok", f"{disk:.0f} GiB")
            if disk >= NEEDED_DISK_GB
            else ("fail", f"{disk:.1f} GiB", f"make room: {NEEDED_DISK_GB:.0f} GiB are enough")
        ),
    )
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-"):
            pass
    except OSError as error:
        yield Finding(
            "write permission", "fail", f"{error.strerror} here", "start the course from a folder of your own"
        )
    else:
        yield Finding("write permission", "ok", "this folder can be written to")


def check_jupyter() -> Iterator[Finding]:
    """The kernel that the notebooks name, whether it is this Python, and the browser side of ipywidgets."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        executable = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        yield Finding("Jupyter kernel", "fail", "no kernel 'python3'", "python -m ipykernel install --sys-prefix")
    else:
        # A kernelspec may say just "python": Jupyter then starts the interpreter it runs in.
        same = not os.path.isabs(executable) or os.path.realpath(executable) == os.path.realpath(sys.executable)
        if same:
            yield Finding("Jupyter kernel", "ok", "python3 is this Python")
        else:
            yield Finding(
                "Jupyter kernel", "fail", "python3 is another Python", "python -m ipykernel install --sys-prefix"
            )
    manager = Path(
        sys.prefix, "share", "jupyter", "labextensions", "@jupyter-widgets", "jupyterlab-manager", "package.json"
    )
    if manager.is_file():
        yield Finding("widgets front end", "ok", "jupyterlab-manager is installed")
    else:
        yield Finding("widgets front end", "fail", "JupyterLab cannot draw widgets", "pip install jupyterlab-widgets")


def examine(folder: str | Path = ".") -> list[Finding]:
    """All findings, in the order of the report. folder: where the course will write."""
    return [
        check_python(),
        *check_packages(),
        *check_extras(),
        *check_torch(),
        *check_compilers(),
        *check_machine(Path(folder)),
        *check_jupyter(),
    ]


def report(folder: str | Path = ".") -> bool:
    """Print every finding; returns whether everything that the course needs is there."""
    findings = examine(folder)
    for finding in findings:
        print(finding)
    failed = [finding.part for finding in findings if finding.status == "fail"]
    print(f"\n{len(failed)} to mend: {', '.join(failed)}" if failed else "\nEverything that the course needs is here.")
    return not failed


def main(argv: list[str] | None = None) -> int:
    """Entry of `python -m rwkv_nb doctor`; returns the exit code."""
    import argparse

    argparse.ArgumentParser(
        prog="python -m rwkv_nb doctor", description="Check this machine for the course."
    ).parse_args(argv)
    return 0 if report() else 1

"""Compile a file of `kernels/` once, keep the result, load it.

    library = build.load("wkv5_cpu", ["wkv5_cpu.cpp"], build.cxx_flags())      a ctypes.CDLL

The sources know nothing of torch: they take plain pointers, so a build takes about a second. Results lie in the
reader's cache folder under a name that is a hash of everything they depend on (sources, headers, flags, the compiler's
version), so a change of any of them makes a new file and an old one never runs on the wrong processor.

What it is not: a build system. One call of one compiler, one shared library. Nothing is compiled at import.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CXX_REMEDY = (
    "install a C++ compiler (Debian: `apt install g++`, macOS: `xcode-select --install`, conda: `cxx-compiler`)"
)
NVCC_REMEDY = "install the CUDA toolkit, or add its bin folder to PATH"
# What torch finds this processor capable of -> the level of the x86-64 instruction set that we may use.
X86_LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3", "DEFAULT": "x86-64-v2"}


class BuildError(RuntimeError):
    """The one readable line that says which tool is missing or failed, with the remedy; a log is in `log`."""

    def __init__(self, message: str, log: Path | None = None):
        super().__init__(message)
        self.log = log


def kernels_folder() -> Path:
    """`kernels/` of a clone, or its copy inside the installed package."""
    inside = Path(__file__).resolve().parents[1] / "kernels"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "kernels"


def cache_folder() -> Path:
    """Where built libraries are kept: `rwkv_nb` in the user's cache folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rwkv_nb"


def find_cxx() -> str | None:
    """The C++ compiler: the usual variable CXX if set, else the first of c++, g++, clang++ on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    return next((path for name in (*named[:1], "c++", "g++", "clang++") if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """CUDA's compiler: on PATH, or below CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def cxx_flags(fast_math: bool = True) -> list[str]:
    """Flags for a shared library that may use what this very processor can do, chosen now, not when torch was built.

    fast_math: sums may be taken in any order, so that the compiler can do many at a time. Never -ffast-math itself: it
    would let the compiler ignore infinity and NaN, and its linker switches subnormal numbers off for the whole process.
    """
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast"]
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    if fast_math:
        flags += ["-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags.append(f"-march={X86_LEVELS.get(torch.backends.cpu.get_cpu_capability(), 'x86-64-v2')}")
    return flags


def load(name: str, sources: list[str], flags: list[str], compiler: str | None = None) -> ctypes.CDLL:
    """Build `sources` (names in `kernels/`, compiled together) unless that was done before, and load the library.

    compiler: path of the compiler; None: `find_cxx()`. Headers of `kernels/` count as inputs of everything.
    Raises BuildError, whose message is one line.
    """
    return ctypes.CDLL(str(build(name, tuple(sources), tuple(flags), compiler)))


@functools.cache
def build(name: str, sources: tuple[str, ...], flags: tuple[str, ...], compiler: str | None = None) -> Path:
    """The path of the built library; see `load`."""
    compiler = compiler or find_cxx()
    if compiler is None:
        raise BuildError(f"{name} needs a C++ compiler and none was found: {CXX_REMEDY}")
    folder = kernels_folder()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join([compiler, version, *flags]).encode())
    headers = sorted(p.name for p in folder.iterdir() if p.suffix in (".h", ".cuh", ".cu"))  # a .cu may be included
    for file in (*sources, *headers):
        key.update(file.encode() + b"\0" + (folder / file).read_bytes())
    target = cache_folder() / f"{name}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", prefix=f"{name}-", dir=target.parent)
    except OSError as error:
        raise BuildError(
            f"{name}: cannot write to the cache folder ({error}); make it writable or set XDG_CACHE_HOME"
        ) from error
    os.close(handle)
    command = [compiler, *flags, *(str(folder / s) for s in sources), "-o", temporary]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            log = target.with_suffix(".log")
            log.write_text(shlex.join(command) + "\n" + done.stdout + done.stderr, encoding="utf-8")
            raise BuildError(f"{name}: {Path(compiler).name} failed with exit code {done.returncode}; see {log}", log)
        os.replace(temporary, target)  # two processes that build at once: the last one wins, both are whole
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target

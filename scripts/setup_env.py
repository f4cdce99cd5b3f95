"""Make `.venv` beside the README: pinned packages, this package, a Jupyter kernel, the embedded data.

    python3 scripts/setup_env.py            what `make setup` calls; on Windows call it yourself

Uses the standard library only. A second call compares the pins with those of the last complete set-up and does nothing
if they agree. Interrupted at any moment, even by SIGKILL, the next call finishes the work: the record is written last,
what pip had installed by half is installed again, and a pip that goes on without its parent is waited for.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
RECORD = ENVIRONMENT / "pins.sha256"
LOCK = ROOT / ".venv.lock"
PINS = ("pyproject.toml", "constraints.txt")
# JupyterLab asks the network for news and updates unless told otherwise; this course works without one.
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
OLDEST, NEWEST = (3, 11), (3, 13)


def python_of(environment: Path) -> Path:
    """The interpreter inside a virtual environment, on this system."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint() -> str:
    """Hash of the pins and of the Python that the environment is made with."""
    digest = hashlib.sha256(".".join(map(str, sys.version_info[:2])).encode())
    for name in PINS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def up_to_date() -> bool:
    """Whether the last complete set-up was made from the same pins and can still be started."""
    return RECORD.is_file() and RECORD.read_text().strip() == fingerprint() and python_of(ENVIRONMENT).exists()


@contextlib.contextmanager
def alone() -> Iterator[dict]:
    """Wait until no other set-up is at work here. Within: options for subprocess.run, by which a child that outlives us
    keeps the next call waiting."""
    if fcntl is None:
        yield {}
        return
    with open(LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is still at work here; waiting for it ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield {"pass_fds": (lock.fileno(),)}


def is_whole(info: Path) -> bool:
    """Whether pip came to the end with this package: its list is the last thing that it writes, and names INSTALLER."""
    try:
        with open(info / "RECORD", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3]
        sizes = {row[0]: row[2] for row in rows}
        there = all(os.path.getsize(info.parent / name) == int(size) for name, size in sizes.items() if size)
    except (OSError, ValueError):
        return False
    return there and f"{info.name}/INSTALLER" in sizes


def forget_halves() -> None:
    """pip takes a package for installed as soon as its folder of metadata is there: remove those of broken ones."""
    for info in [*ENVIRONMENT.glob("lib/python*/site-packages/*.dist-info"),
                 *ENVIRONMENT.glob("Lib/site-packages/*.dist-info")]:  # fmt: skip
        if not is_whole(info):
            shutil.rmtree(info)


def install(options: dict) -> None:
    """Create the environment where it is missing or broken, and install what the pins say into it."""
    python = python_of(ENVIRONMENT)
    works = python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    RECORD.unlink(missing_ok=True)
    if not works:
        print("Making .venv ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True, **options)
    forget_halves()
    print("Installing pinned packages (one to several minutes, once) ...", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt"]
    # Editable: a reader who changes a module sees the change in the notebooks.
    subprocess.run([*pip, "--editable", ".[test,docs]"], cwd=ROOT, check=True, **options)
    settings = ENVIRONMENT / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "overrides.json").write_text(json.dumps(QUIET) + "\n")
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(fingerprint() + "\n")
    os.replace(temporary, RECORD)


def main() -> int:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"This course needs Python 3.11, 3.12 or 3.13; this is {found} ({sys.executable}).\n"
            f"Install one and name it: make setup PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    try:
        with alone() as options:
            if not up_to_date():
                install(options)
            build = [python_of(ENVIRONMENT), "-m", "rwkv_nb", "build_data"]
            subprocess.run(build, cwd=ROOT, check=True, **options)
    except subprocess.CalledProcessError as error:
        print(
            f"Set-up stopped: {' '.join(map(str, error.cmd[1:4]))} ... ended with code {error.returncode}; its own "
            f"message stands above.\nMend that (network? disk space?) and call the same command again.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"Set-up stopped: {error}. Mend that and call the same command again.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

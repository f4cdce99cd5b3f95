"""A small sample of benchmarks/kills.py, and what scripts/setup_env.py does about packages that pip left by half.

Of make_data and training samples stand beside their tests (tests/data/test_make_data_trouble.py, tests/training).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL: Linux or macOS")


@pytest.fixture
def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("part", "kills"), [("download", 6), ("set-up", 1)])
def test_killed_and_called_again(part, kills):
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--only", part, "--kills", str(kills)]
    done = subprocess.run([*command, "--seed", "3"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    row = done.stdout.splitlines()[-1].split("|")
    assert (row[1].strip(), int(row[2]), row[4].strip()) == (part, kills, "0")


@pytest.fixture
def installed(tmp_path, monkeypatch, setup_env):
    """An environment with one package in it, as pip leaves it; the folder of its metadata."""
    monkeypatch.setattr(setup_env, "ENVIRONMENT", tmp_path)
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    info = site / "alpha-1.0.dist-info"
    for folder in (info, site / "alpha"):
        folder.mkdir(parents=True)
    (site / "alpha" / "__init__.py").write_text("number = 1\n")
    (info / "METADATA").write_text("Name: alpha\n")
    (info / "INSTALLER").write_text("pip\n")
    rows = ("alpha/__init__.py,sha256=x,11", "alpha/__pycache__/__init__.pyc,,",
            "alpha-1.0.dist-info/INSTALLER,sha256=x,4", "alpha-1.0.dist-info/RECORD,,")  # fmt: skip
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    return info


def test_a_whole_package_stays(installed, setup_env):
    setup_env.forget_halves()
    assert installed.is_dir()


@pytest.mark.parametrize("damage", ["no list", "a file is missing", "a file is cut short", "the list of the wheel"])
def test_half_a_package_is_forgotten(installed, setup_env, damage):
    """pip would take each of these for installed, and the course would stop somewhere else."""
    module, record = installed.parent / "alpha" / "__init__.py", installed / "RECORD"
    if damage == "no list":
        record.unlink()
    elif damage == "a file is missing":
        module.unlink()
    elif damage == "a file is cut short":
        module.write_text("number")
    else:  # pip has copied the files, but not made the commands yet: its own list, with INSTALLER, is the last thing
        record.write_text("alpha/__init__.py,sha256=x,11\nalpha-1.0.dist-info/RECORD,,\n")
    setup_env.forget_halves()
    assert not installed.exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs the command flock")
def test_a_pip_without_its_parent_is_waited_for(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup_env.py", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("[")  # no project: pip would refuse at once
    holder = subprocess.Popen(["flock", str(tmp_path / ".venv.lock"), "sleep", "60"], start_new_session=True)
    while subprocess.run(["flock", "--nonblock", str(tmp_path / ".venv.lock"), "true"]).returncode == 0:
        time.sleep(0.05)
    command = [sys.executable, str(tmp_path / "scripts" / "setup_env.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout.readline() == "Another set-up is still at work here; waiting for it ...\n"
        assert process.poll() is None and not (tmp_path / ".venv").exists()
        process.kill()
    os.killpg(holder.pid, signal.SIGKILL)
    holder.wait()

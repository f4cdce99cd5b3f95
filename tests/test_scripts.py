"""The article's two scripts, shortened, on embedded text in a temporary folder, without internet."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_nb.data.magic_prime import magic_prime
from rwkv_nb.data.make_data import make_data

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")


def run(name, *arguments, **variables):
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME") if key in os.environ}
    given = {key: str(value) for key, value in variables.items()}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **given}
    script = ["sh", str(ROOT / "scripts" / f"demo-training-{name}.sh"), *arguments]
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=False, cwd="/")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = (ROOT / "data" / "demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:12]
    (folder / "demo.jsonl").write_text("".join(lines), encoding="utf-8")
    return make_data(folder / "demo.jsonl", folder / "demo", 1, 16, seed=0)


@pytest.mark.slow
def test_prepare_then_run(data, tmp_path):
    sizes = {"DATA": data.prefix, "BASE_NAME": tmp_path / "m", "N_LAYER": 2, "N_EMBD": 64, "CTX_LEN": 16}
    prepared = run("prepare", **sizes)
    assert prepared.returncode == 0, prepared.stderr
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"rwkv-init.pth"}
    assert f"magic_prime = {magic_prime(data.tokens, 16)} for ctx_len 16" in prepared.stderr
    assert "blocks.*.att.time_decay" in prepared.stdout and "RWKV-5 BF16 on 1x1 CPU" in prepared.stdout
    trained = run("run", "--logger", "csv", **sizes, M_BSZ=2, EXIT_TOKENS=12 * 32, ACCELERATOR="cpu")
    assert trained.returncode == 0, trained.stderr
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"rwkv-init.pth", "rwkv-final.pth", "train_log.txt", "csv"} <= names
    log = (tmp_path / "m" / "train_log.txt").read_text(encoding="utf-8")
    prime = magic_prime(data.tokens, 16)
    assert f"'magic_prime': {prime}" in log and "'my_exit_tokens': 384" in log and "'my_pile_stage': 3" in log
    assert re.search(r"^0 \d+\.\d{6} \d+\.\d{4} 0\.000", log, re.MULTILINE)
    assert "strategy auto" in trained.stdout and "in place of" not in trained.stdout and "12/12" in trained.stderr
    assert "rwkv-0.12.state" in names, "one device goes on from where it stopped, exactly"
    steps = (tmp_path / "m" / "csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(steps) == 1 + 12


def test_run_before_prepare_says_what_is_missing(data, tmp_path):
    done = run("run", DATA=data.prefix, BASE_NAME=tmp_path / "m", CTX_LEN=16, M_BSZ=2, ACCELERATOR="cpu")
    assert done.returncode == 2 and not (tmp_path / "m").exists()
    assert "no rwkv-init.pth or rwkv-N.pth to start from" in done.stderr and "--my_pile_stage 1" in done.stderr


def test_missing_data_and_a_missing_connection_end_the_script(tmp_path):
    done = run("prepare", DATA=tmp_path / "none", BASE_NAME=tmp_path / "m")
    assert done.returncode == 1 and "none.idx: file is missing" in done.stderr
    done = run("prepare", DATA=tmp_path / "minipile", BASE_NAME=tmp_path / "m", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1 and "minipile.idx: no connection" in done.stderr
    assert list(tmp_path.iterdir()) == []

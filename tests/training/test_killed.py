"""SIGKILL at twenty moments, also in the middle of a save; two processes that are stopped: the same end each time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.training.checkpoint import save_checkpoint


def log_lines(folder):
    """{mini-epoch: what the last line about it says, without its time}."""
    text = Path(folder, "train_log.txt").read_text(encoding="utf-8")
    return {m[1]: (m[2], m[3]) for m in re.finditer(r"^(\d+) (\S+ \S+ \S+) \S+ \S+ (\d+)$", text, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: Linux or macOS")
def test_twenty_kills_change_nothing(tmp_path):
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(tmp_path), "20", "1"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["moments"]) == 20 and told["last"] == [0, 0], told
    assert {"write", "fsync", "replace", "after"} <= {kind for kind, _ in told["moments"]}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert sorted(os.listdir(whole)) == sorted(os.listdir(broken)), "nothing is missing, nothing is left over"
    for path in whole.glob("rwkv-*.pth"):
        assert path.read_bytes() == (broken / path.name).read_bytes(), path.name
    assert log_lines(whole) == log_lines(broken) and len(log_lines(whole)) == 17
    truth = dict(line.split() for line in (tmp_path / "whole.txt").read_text().splitlines())
    again = [line.split() for line in (tmp_path / "broken.txt").read_text().splitlines()]
    assert {step for step, _ in again} == set(truth) and len(truth) == 100
    assert all(truth[step] == loss for step, loss in again), "a step that was done again gave the same loss again"


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
)
def test_two_processes_go_on_together(tmp_path):
    """Each process is stopped once by a signal to it alone; dropout makes the random numbers of both matter."""
    script = Path(__file__).with_name("resumed_together.py")
    (tmp_path / "text.txt").write_text("the eagle writes cell by cell. " * 40, encoding="utf-8")
    first = save_checkpoint(init_weights(ModelConfig(2, 32, 15, head_size_a=32), seed=1), tmp_path / "rwkv-init.pth")
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        shutil.copy(first, tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert [len(part) for part in found["broken"]] == [3, 5, 8]
        assert sum(found["broken"], []) == found["whole"][0]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert sorted(os.listdir(whole)) == sorted(os.listdir(broken))
    for path in whole.glob("rwkv-*.pth"):
        assert path.read_bytes() == (broken / path.name).read_bytes(), path.name
    assert log_lines(whole) == log_lines(broken)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM to hear on Windows")
def test_the_command_line_says_by_its_exit_code_what_ended_it(tmp_path):
    (tmp_path / "text.txt").write_text("the eagle writes cell by cell. " * 40, encoding="utf-8")
    flags = {"proj_dir": tmp_path / "run", "data_file": tmp_path / "text.txt", "accelerator": "cpu", "ctx_len": 8,
             "precision": "fp32", "n_layer": 2, "n_embd": 32, "head_size_a": 32, "micro_bsz": 2, "epoch_steps": 10**6}
    command = [sys.executable, "-m", "rwkv_nb", "train"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    for number in (signal.SIGTERM, signal.SIGINT):
        log = tmp_path / "run" / "train_log.txt"
        log.unlink(missing_ok=True)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            while process.poll() is None and not log.exists():
                time.sleep(0.05)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number, said
        assert f"{number.name}: the run has stopped after a step" in said and "Traceback" not in said
        assert list(log.parent.glob("rwkv-0.*.state")) and (log.parent / "rwkv-final.pth").exists()

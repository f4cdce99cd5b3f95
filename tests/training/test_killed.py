"""SIGKILL at twenty moments, also in the middle of a save: the run ends with the weights of the uninterrupted one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


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

"""A small sample of benchmarks/long_runs.py: panels used again and again keep nothing; what is kept is found."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path

import ipywidgets
import pytest

from rwkv_nb.teaching import plots
from rwkv_nb.teaching.widgets import Panel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def long_runs():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("long_runs")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def short_warm_up(long_runs, monkeypatch):
    monkeypatch.setattr(long_runs, "WARM_UP", 3)


def test_panels_keep_nothing(long_runs, tmp_path):
    made = long_runs.panels(tmp_path)
    assert len(made) == 9
    for name in ("01 tokens", "07 schedule", "08 sampling"):
        grown = long_runs.use_often(made[name], 12)
        assert (grown["threads"], grown["figures"], grown["widgets"]) == (0, 0, 0), name


def leaking(kind: str) -> Panel:
    box = ipywidgets.IntText(description="n")
    panel, stop = Panel("leaks", [box]), threading.Event()

    def keep(_change):
        if kind == "threads":
            threading.Thread(target=stop.wait, args=(60,), daemon=True).start()
        elif kind == "widgets":
            ipywidgets.HTML("one more")
        else:
            plots.plt.figure()

    box.observe(keep, names="value")
    panel.stop = stop
    return panel


@pytest.mark.parametrize("kind", ["threads", "widgets", "figures"])
def test_what_is_kept_is_found(long_runs, kind):
    panel = leaking(kind)
    try:
        assert long_runs.use_often(lambda: panel, 10)[kind] >= 8
    finally:
        panel.stop.set()
        plots.plt.close("all")


@pytest.mark.slow
def test_ten_pieces_of_a_run(long_runs):
    import argparse

    import torch

    before = torch.get_num_threads()
    try:
        assert long_runs.resume(argparse.Namespace(steps=60))
    finally:
        torch.set_num_threads(before)

"""The devices that are found are those that are there."""

import psutil
import torch

from rwkv_nb.inference.devices import read_bandwidth, this_machine
from rwkv_nb.inference.memory import best_strategy
from rwkv_nb.model.config import ModelConfig


def test_this_machine_has_a_processor_and_its_gpus():
    machine = this_machine()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert len(machine) == 1 + gpus and next(iter(machine)) == "cpu"
    total = psutil.virtual_memory().total
    assert 0 < machine["cpu"].memory <= total
    assert 1e8 < machine["cpu"].bandwidth < 1e13  # from a very slow machine to one that does not exist


def test_bandwidth_counts_bytes(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 1.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert read_bandwidth("cpu", numbers=1000, tries=2) == 4000 / 0.25  # the better try


def test_a_small_model_fits_here():
    assert best_strategy(ModelConfig(2, 64, 100), this_machine()) is not None

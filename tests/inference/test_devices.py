"""The devices that are found are those that are there."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from rwkv_nb.inference import devices
from rwkv_nb.inference.devices import read_bandwidth, this_machine
from rwkv_nb.inference.memory import Device, best_strategy
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


# ---- where memory is short

MIB = 2**20


def crowded(monkeypatch, room, cards=2, free=8 * 2**30):
    """GPUs that live on the processor; room: device -> bytes that one block can get there. Returns the sizes asked."""
    asked, ones, empty = [], torch.ones, torch.empty

    def make(real):
        def function(numbers, device="cpu"):
            asked.append((device, 4 * numbers))
            if 4 * numbers > room.get(device, 2**40):
                kind = RuntimeError if device == "cpu" else torch.OutOfMemoryError
                raise kind(f"{device} is out of memory.\nTried to allocate {4 * numbers} bytes")
            return real(numbers)

        return function

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free, 2**40))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "ones", make(ones))
    monkeypatch.setattr(torch, "empty", make(empty))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(devices, "BLOCK", 4 * MIB)  # numbers: 16 MiB
    return asked


def test_a_block_takes_a_quarter_of_what_is_free(monkeypatch):
    asked = crowded(monkeypatch, {}, cards=1, free=20 * MIB)
    assert this_machine()["cuda"].memory == 20 * MIB
    assert max(size for device, size in asked if device == "cuda:0") == 5 * MIB
    assert max(size for device, size in asked if device == "cpu") == 16 * MIB  # of the whole machine's memory
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * MIB))
    asked.clear()
    this_machine()
    assert asked[0] == ("cpu", 2 * MIB)


def test_smaller_blocks_are_tried_where_there_is_less_than_was_said(monkeypatch):
    asked = crowded(monkeypatch, {"cuda:0": 3 * MIB, "cpu": 5 * MIB}, cards=1)
    machine = this_machine()
    assert machine["cuda"].memory == 8 * 2**30 and machine["cuda"].bandwidth > 0 and machine["cuda"].bus > 0
    assert [size // MIB for device, size in asked if device == "cuda:0"] == [16, 4, 1, 4, 1]


def test_a_full_card_is_left_out_and_the_others_stay(monkeypatch):
    crowded(monkeypatch, {"cuda:1": 0}, cards=3)
    with pytest.warns(UserWarning, match="cuda:1 is left out: cuda:1 is out of memory; end what fills its memory"):
        machine = this_machine()
    assert list(machine) == ["cpu", "cuda:0", "cuda:2"]
    small = {name: replace(device, memory=300_000, bandwidth=1e9) for name, device in machine.items()}
    both = best_strategy(ModelConfig(4, 64, 100), small)
    assert both.plan.devices[:2] == ("cuda:0", "cuda:2")  # a card of no memory that stayed would forbid to share


def test_a_card_whose_driver_has_no_room_is_left_out(monkeypatch):
    def refuse(i):
        raise RuntimeError("CUDA error: out of memory")

    crowded(monkeypatch, {}, cards=1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    with pytest.warns(UserWarning, match="cuda is left out: CUDA error: out of memory; end"):
        assert list(this_machine()) == ["cpu"]


def test_a_full_machine_fits_nothing(monkeypatch):
    crowded(monkeypatch, {"cpu": 0}, cards=1)
    with pytest.warns(UserWarning, match="cpu counts as full: cpu is out of memory; end other programs"):
        machine = this_machine()
    assert machine["cpu"].memory == 0 and machine["cuda"].bus == Device(1, 1).bus  # nothing to pin either
    assert best_strategy(ModelConfig(2, 64, 100), machine) is None

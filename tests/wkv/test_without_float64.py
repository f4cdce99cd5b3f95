"""Chunks on a device that has no float64, as Apple's GPUs: nothing of that format is made there, results are as exact.

No such device is needed: PyTorch's fake tensors claim to be on another one, and say where two devices would meet; and
the numbers are computed on the processor as if it had none.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_nb.wkv import chunked, powers, wkv5, wkv5_reference

DECAYS = [(-6.0, -1.0), (0.0, 1.0), (-10.0, 4.0)]  # worked off around the middles of chunks, or halved


class Driver(TorchDispatchMode):
    """That of the device "meta", which takes the part of one without float64: refuses it, counts what runs there."""

    def __init__(self):
        super().__init__()
        self.there = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for x in tree_leaves((arguments, out)):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                self.there += 1
                if x.dtype == torch.float64:
                    raise TypeError(f"{function}: no float64 here")
        return out


@pytest.fixture
def driver(monkeypatch):
    for module in (powers, chunked):
        monkeypatch.setattr(module, "has_float64", lambda device: device.type != "meta")
    with FakeTensorMode(), Driver() as driver:
        yield driver


def test_which_devices_have_no_float64():
    assert not powers.has_float64(torch.device("mps"))
    assert all(powers.has_float64(torch.device(name)) for name in ("cpu", "cuda:1"))


def test_the_driver_refuses_what_it_should(driver):
    x = torch.zeros(2, device="meta")
    assert driver.there > 0
    with pytest.raises(TypeError, match="no float64 here"):
        x.double()
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.zeros(2)
    wide = powers.in_float64(x)
    assert wide.dtype == torch.float64 and wide.device.type == "cpu"


@pytest.mark.parametrize("T", [0, 1, 37, 128])
@pytest.mark.parametrize(("low", "high"), DECAYS)
def test_float64_stays_on_the_processor(low, high, T, monkeypatch, driver):
    B, H, N = 2, 3, 8
    strongest = [math.exp(low), math.exp((low + high) / 2), math.exp(high)]  # fakes have no numbers
    monkeypatch.setattr(chunked, "_strongest", lambda w: strongest)
    r, k, v, gy = (torch.zeros(B, T, H, N, device="meta") for _ in range(4))
    w, u = (torch.zeros(H, N, device="meta") for _ in range(2))
    state, glast = (torch.zeros(B, H, N, N, device="meta") for _ in range(2))
    saved = state.new_empty(chunked.saved_shape(B, T, H, N))
    before = driver.there
    y, last = chunked.forward(r, k, v, w, u, state, saved)
    grads = chunked.backward(r, k, v, w, u, state, saved, gy, glast)
    assert driver.there > before
    for x, like in zip((y, last, *grads), (r, state, r, k, v, w, u, state), strict=True):
        assert x.shape == like.shape and x.dtype == torch.float32 and x.device.type == "meta"


@pytest.mark.parametrize(("low", "high"), DECAYS)
def test_numbers_are_as_exact(low, high, monkeypatch):
    monkeypatch.setattr(powers, "has_float64", lambda device: False)
    monkeypatch.setattr(chunked, "has_float64", lambda device: False)
    g = torch.Generator().manual_seed(2)
    r, k, v, gy = (torch.randn(2, 200, 2, 16, generator=g) for _ in range(4))
    w = torch.empty(2, 16).uniform_(low, high, generator=g)
    u, state, glast = (torch.randn(*shape, generator=g) for shape in ((2, 16), (2, 2, 16, 16), (2, 2, 16, 16)))
    found = []
    for function, double in ((lambda *x: wkv5(*x, backend="chunked"), False), (wkv5_reference, True)):
        tensors = [(x.double() if double else x).detach().requires_grad_() for x in (r, k, v, w, u, state)]
        y, last = function(*tensors)
        found.append([y.detach(), last.detach(), *torch.autograd.grad([y, last], tensors, [gy.to(y), glast.to(last)])])
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        tolerance = 1e-5 if i == 5 else 2e-6  # as test_backends.py asks of a device with float64
        assert float((got.double() - want).abs().max() / want.abs().max()) < tolerance

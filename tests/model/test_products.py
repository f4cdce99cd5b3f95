"""The products of a training step: against float64, and where which library does them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rwkv_nb.model import products
from rwkv_nb.model.products import Linear

HAS = {"cpu_name": "AMD EPYC", "avx512_f": True}
runs_here = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN for every processor; the list of what it multiplied."""
    calls, multiply = [], products._multiply
    monkeypatch.setattr(products, "onednn", lambda: True)
    monkeypatch.setattr(products, "_multiply", lambda x, w: calls.append(tuple(x.shape)) or multiply(x, w))
    return calls


def layer_and_input(K=24, N=40, rows=(3, 50), dtype=torch.float32):
    g = torch.Generator().manual_seed(K + N)
    layer = Linear(K, N).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(N, K, generator=g))
    return layer, torch.randn(*rows, K, generator=g).to(dtype).requires_grad_()


def results(layer, x, dtype=None):
    """Output, gradient by x and by the weight; what comes from above is no constant."""
    x, weight = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, layer.weight))
    y = torch.func.functional_call(layer, {"weight": weight}, x)
    above = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), above)]


@runs_here
@pytest.mark.parametrize("rows", [(70,), (3, 50), (2, 4, 16)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_equals_the_product_in_float64(rows, turned, onednn):
    layer, x = layer_and_input(rows=rows)
    if turned and len(rows) > 1:
        x = x.detach().transpose(0, 1).contiguous().transpose(0, 1)  # does not lie in order
    got = results(layer, x)
    assert len(onednn) == 2  # forward, and the gradient by x
    for a, b in zip(got, results(layer, x, torch.float64), strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert float((a - b).abs().max()) < 2e-6 * float(b.abs().max())


@runs_here
def test_only_the_gradients_that_are_asked_for(onednn):
    layer, x = layer_and_input()
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None and len(onednn) == 1
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None and len(onednn) == 3


@runs_here
def test_what_follows_may_work_in_its_place(onednn):
    layer, x = layer_and_input()
    y = layer(x).relu_().square()
    y.sum().backward()
    exact = torch.relu(F.linear(x.detach().double(), layer.weight.detach().double())).square()
    torch.testing.assert_close(y.detach().double(), exact, rtol=1e-5, atol=1e-5)


@runs_here
def test_everywhere_else_it_is_nn_linear(onednn):
    layer, x = layer_and_input()
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer(x[0, :20])  # few rows, as in generation
    double, wide = layer_and_input(dtype=torch.float64)
    double(wide)
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    layer.to("meta")(x.to("meta"))
    assert onednn == []


@pytest.mark.parametrize(
    "has, expected",
    [(HAS, True), (HAS | {"cpu_name": "Intel(R) Xeon(R)"}, False), (HAS | {"avx512_f": False}, False), ({}, False)],
    ids=["AMD", "Intel", "without AVX-512", "unknown"],
)
@runs_here
def test_the_processor_decides(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert products.onednn.__wrapped__() is expected

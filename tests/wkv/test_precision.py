"""Products of the operator are of float32 numbers in float32, whatever switch allows less; the switches stay."""

from __future__ import annotations

import pytest
import torch

from rwkv_nb.wkv import wkv5, wkv5_chunked
from rwkv_nb.wkv.precision import exact_products

NEWER = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="not run: older torch")


def older(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def library(module, precision):
    return lambda: setattr(module, "fp32_precision", precision)


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


SWITCHES = {
    "high": older("high"),
    "medium": older("medium"),
    "allow_tf32": allow_tf32,
    **({} if NEWER.args[0] else {
        "one library": library(torch.backends.cuda.matmul, "tf32"),
        "a processor's": library(torch.backends.mkldnn.matmul, "bf16"),
        "all libraries": library(torch.backends, "tf32"),
    }),
}  # fmt: skip


def switches():
    """Everything that can be read; the older way refuses to be read where it does not agree with the newer one."""
    try:
        found = [torch.get_float32_matmul_precision()]
    except RuntimeError:
        found = ["disagrees"]
    if not NEWER.args[0]:
        backends = torch.backends
        found += [x.fp32_precision for x in (backends, backends.cuda.matmul, backends.mkldnn.matmul)]
    return found


@pytest.fixture(autouse=True)
def as_before():
    """Nothing of all this stays."""
    yield
    torch.set_float32_matmul_precision("highest")
    if not NEWER.args[0]:
        for module in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            module.fp32_precision = "none"


@pytest.fixture
def products(monkeypatch):
    """What every product finds allowed."""
    seen = []
    for name in ("__matmul__", "baddbmm_"):
        real = getattr(torch.Tensor, name)

        def spy(*arguments, real=real, **named):
            seen.append(switches())
            return real(*arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, spy)
    return seen


def exact(found):
    return all(each[0] == "highest" and not {"tf32", "bf16"} & set(each[2:]) for each in found)


@pytest.mark.parametrize("switch", SWITCHES)
def test_within_products_are_exact_and_after_all_is_as_it_was(switch):
    SWITCHES[switch]()
    before = switches()
    with exact_products():
        assert exact([switches()])
    assert switches() == before
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert switches() == before
    with exact_products(), exact_products():
        assert exact([switches()])
    assert switches() == before


def test_where_nothing_is_allowed_nothing_is_touched():
    before = switches()
    with exact_products():
        assert switches() == before
    assert switches() == before


@NEWER
def test_what_holds_for_all_libraries_can_still_be_changed_after():
    torch.backends.fp32_precision = "tf32"
    with exact_products():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def inputs(T, low):
    g = torch.Generator().manual_seed(T)
    r, k, v = (torch.randn(2, T, 2, 8, generator=g) for _ in range(3))
    w = torch.empty(2, 8).uniform_(low, low + 2, generator=g)
    tensors = [r, k, v, w, torch.randn(2, 8, generator=g), torch.randn(2, 2, 8, 8, generator=g)]
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("low", [-6.0, 0.0])  # both ways through a chunk
@pytest.mark.parametrize("way", ["chunked", "reference", "one step", "wkv5_chunked"])
def test_every_product_of_the_operator_is_exact(way, low, switch, products):
    function = {
        "one step": wkv5,
        "wkv5_chunked": wkv5_chunked,
        "chunked": lambda *x: wkv5(*x, backend="chunked"),
        "reference": lambda *x: wkv5(*x, backend="reference"),
    }[way]
    tensors = inputs(1 if way == "one step" else 70, low)
    SWITCHES[switch]()
    before = switches()
    y, last = function(*tensors)
    forward = len(products)
    if way != "one step":  # whose derivatives are autograd's own
        torch.autograd.grad(y.sum() + last.sum(), tensors)
        assert len(products) > forward
    assert forward > 0 and exact(products)
    assert switches() == before


@pytest.mark.parametrize("way", ["chunked", "auto"])
def test_numbers_are_the_same_with_every_switch(way):
    """Heads of 256, whose products a processor with bfloat16 instructions rounds if it may."""
    g = torch.Generator().manual_seed(1)
    T = 512 if way == "chunked" else 1
    r, k, v = (torch.randn(1, T, 1, 256, generator=g) for _ in range(3))
    tensors = [r, k, v, torch.full((1, 256), -3.0), torch.zeros(1, 256), torch.randn(1, 1, 256, 256, generator=g)]
    want = wkv5(*tensors, backend=way)
    for switch in SWITCHES.values():
        switch()
        assert all(torch.equal(a, b) for a, b in zip(wkv5(*tensors, backend=way), want, strict=True))

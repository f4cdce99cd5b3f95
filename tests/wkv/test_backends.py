"""Every backend that this machine has against float64, through `wkv5` itself: random and adversarial input.

Tolerances, relative to the largest number of each tensor: TOLERANCE for float32; for half precision the rounding of
what comes out is added. The gradient of w is a sum of terms larger than itself, hence wider.
"""

from __future__ import annotations

import pytest
import torch

from rwkv_nb.wkv import backends, wkv5, wkv5_chunked, wkv5_reference
from rwkv_nb.wkv.operator import BACKENDS

NAMES = ("y", "last", "r", "k", "v", "w", "u", "state")
TOLERANCE = dict.fromkeys(NAMES, 2e-6) | {"w": 1e-5}
NATIVE = ("cpu", "emulated", "cuda")
FLOAT32 = ["reference", "chunked", *(pytest.param(n, marks=pytest.mark.gpu) if n == "cuda" else n for n in NATIVE)]


def device_of(backend):
    return getattr(BACKENDS[backend], "DEVICE", "cpu")


@pytest.fixture(params=FLOAT32)
def backend(request):
    found = backends().get(request.param, "not built yet")
    if found != "available":
        pytest.skip(f"backend {request.param}: {found}")
    return request.param


def inputs(B, T, H, N, low=-6.0, high=-1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(T * N + B)
    r, k, v = (torch.randn(B, T, H, N, generator=g).to(dtype) for _ in range(3))
    w = torch.empty(H, N).uniform_(low, high, generator=g)
    u, state = torch.randn(H, N, generator=g), torch.randn(B, H, N, N, generator=g)
    return [r, k, v, w, u, state]


def everything(function, tensors):
    """y, last and the six gradients in one fixed direction, as float64 on the CPU."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    y, last = function(*tensors)
    g = torch.Generator().manual_seed(3)
    directions = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in (y, last)]  # bfloat16: the same for all
    grads = torch.autograd.grad([y, last], tensors, directions, allow_unused=True, materialize_grads=True)
    return {name: x.detach().double().cpu() for name, x in zip(NAMES, (y, last, *grads), strict=True)}


def worst(backend, tensors, exact=wkv5_reference):
    """Per tensor: the largest error over the largest number."""
    device = device_of(backend)
    got = everything(lambda *x: wkv5(*x, backend=backend), [x.to(device) for x in tensors])
    want = everything(exact, [x.double() for x in tensors])
    assert all(torch.isfinite(x).all() for x in got.values())
    tiny = torch.finfo(torch.float32).tiny
    return {n: float((got[n] - want[n]).abs().max() / want[n].abs().max().clamp_min(tiny)) if want[n].numel() else 0.0
            for n in NAMES}  # fmt: skip


def agree(backend, tensors, tolerance=TOLERANCE, **kwargs):
    found = worst(backend, tensors, **kwargs)
    assert all(found[name] <= tolerance[name] for name in NAMES), found


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 31, 32, 33, 65])
def test_any_length(backend, T):
    agree(backend, inputs(2, T, 2, 16))


@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_head_sizes(backend, N):
    agree(backend, inputs(1, 19, 1, N))


@pytest.mark.parametrize(("low", "high"), [(-10, -10), (-10, 4), (-1, 1.5), (1.5, 3), (4, 4)])
def test_every_decay(backend, low, high):
    agree(backend, inputs(1, 50, 2, 16, low, high))


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("huge", [10.0, 89.0, 800.0, 3e38])  # exp(w) ends with float32 at 88.7, with float64 at 709
def test_a_channel_that_forgets_at_once(backend, huge, T):
    tensors = inputs(1, T, 2, 16)
    tensors[3][0, 3] = huge

    def exact(r, k, v, w, *others):
        return wkv5_reference(r, k, v, w.clamp(max=50.0), *others)  # exp(-exp(50)) = 0, and so is its derivative

    agree(backend, tensors, exact=exact)
    got = everything(lambda *x: wkv5(*x, backend=backend), [x.to(device_of(backend)) for x in tensors])
    assert got["w"][0, 3] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 37])
def test_half_precision_rounds_only_what_comes_out(backend, dtype, T):
    # The float64 truth starts from the same rounded inputs, so only the rounding of results is left.
    half = torch.finfo(dtype).eps / 2
    tolerance = TOLERANCE | {name: half + 2e-6 for name in ("y", "r", "k", "v")}
    if backend == "cuda":  # factors of the tensor cores' products are rounded too, to 10 binary digits
        tolerance = {name: largest + 1e-3 for name, largest in tolerance.items()}
    agree(backend, inputs(2, T, 2, 16, dtype=dtype), tolerance)


@pytest.mark.parametrize("zero", range(6))
def test_zeros(backend, zero):
    tensors = inputs(1, 33, 1, 16)
    tensors[zero] = torch.zeros_like(tensors[zero])
    agree(backend, tensors)


def test_everything_zero(backend):
    device = device_of(backend)
    nothing = [torch.zeros_like(x).to(device) for x in inputs(1, 20, 1, 16)]
    got = everything(lambda *x: wkv5(*x, backend=backend), nothing)
    assert all(not x.any() for name, x in got.items() if name in ("y", "last", "w", "u"))


def test_denormal_numbers(backend):
    r, k, v, w, u, state = inputs(1, 33, 1, 16)
    # The numbers themselves have few bits left: 1e-40 is 71,000 times the smallest float32. On a GPU they are split in
    # two for the tensor cores, and the smaller half ends earlier.
    small = 1e-36 if backend == "cuda" else 1e-40
    found = worst(backend, [r, k * small, v, w, u, state * small])
    assert all(found[name] < 1e-4 for name in ("y", "last", "k", "state")), found


def test_a_large_range_of_numbers(backend):
    r, k, v, w, u, state = inputs(1, 40, 1, 16)
    scale = torch.logspace(-12, 12, 16)
    agree(backend, [r, k * scale, v, w, u, state])


@pytest.mark.parametrize("low", [-10.0, -3.0])
def test_a_hundred_thousand_steps(backend, low):
    if backend == "emulated":
        pytest.skip("the emulator runs thread by thread: 10,000 steps are tested in test_emulated.py")
    if backend == "reference":
        pytest.skip("the loop itself keeps 100,000 states for its gradients")
    # float64 chunks, equal to the loop to 1e-12 (test_wkv5.py), stand in for the loop.
    tolerance = dict.fromkeys(NAMES, 2e-5) | {"w": 1e-4}
    agree(backend, inputs(1, 100_000, 1, 16, low, low + 4), tolerance, exact=wkv5_chunked)


def test_inputs_are_never_changed(backend):
    tensors = [x.to(device_of(backend)) for x in inputs(1, 20, 2, 16)]
    copies = [x.clone() for x in tensors]
    everything(lambda *x: wkv5(*x, backend=backend), tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("T", [0, 1, 40, 300])  # 300: more than one stretch between kept states
def test_no_state_is_a_state_of_zeros_and_an_unused_last_state_has_no_gradient(backend, T):
    if backend == "emulated" and T > 40:
        pytest.skip("the emulator runs thread by thread; it keeps no states, so length changes nothing")
    *tensors, state = [x.to(device_of(backend)) for x in inputs(2, T, 2, 16)]
    found = []
    for zeros, weight in ((None, None), (torch.zeros_like(state), torch.zeros_like(state))):
        leaves = [x.detach().requires_grad_() for x in tensors]
        y, last = wkv5(*leaves, zeros, backend=backend)
        loss = y.square().sum() + (0 if weight is None else (last * weight).sum())
        found.append([y, last, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_what_a_kernel_cannot_do_is_said(name):
    if backends().get(name) != "available":
        pytest.skip(f"backend {name} is not available here")
    device = device_of(name)
    tensors = [x.to(device) for x in inputs(1, 3, 1, 16)]
    with pytest.raises(ValueError, match="float64.*use reference or chunked"):
        wkv5(*(x.double() for x in tensors), backend=name)
    with pytest.raises(ValueError, match="r is on meta; expected"):
        wkv5(*(x.to("meta") for x in tensors), backend=name)
    if name != "cpu":  # it takes any
        with pytest.raises(ValueError, match="head size 24 is none of 16, 32, 64, 128; use chunked"):
            wkv5(*(x.to(device) for x in inputs(1, 3, 1, 24)), backend=name)

"""The WKV-5 operator: chunks against the loop in float64, the loop against its definition written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.wkv import chunked as chunked_module
from rwkv_nb.wkv import halving, middle, wkv5, wkv5_chunked, wkv5_reference

NAMES = ("y", "state", "r", "k", "v", "w", "u", "state_in")


def inputs(B, T, H, N, w_low=-6.0, w_high=-1.0, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    r, k, v = (torch.randn(B, T, H, N, generator=g, dtype=torch.float64) for _ in range(3))
    w = torch.empty(H, N, dtype=torch.float64).uniform_(w_low, w_high, generator=g)
    u = torch.randn(H, N, generator=g, dtype=torch.float64)
    state = torch.randn(B, H, N, N, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (r, k, v, w, u, state)]


def results(operator, tensors):
    """y, last state, and the six gradients for one fixed random direction."""
    y, state = operator(*tensors)
    g = torch.Generator().manual_seed(99)
    directions = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in (y, state)]
    grads = torch.autograd.grad([y, state], tensors, directions, allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True))
    return [x.detach() for x in (y, state, *filled)]


def errors(got, want):
    """Largest difference of each tensor, relative to its largest number."""
    return {
        name: float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0
        for name, a, b in zip(NAMES, got, want, strict=True)
    }


def by_sums(r, k, v, w, u, state):
    """The definition without any recurrence: every pair of steps s < t by its own power of the decay."""
    B, T, H, N = r.shape
    d = torch.exp(-torch.exp(w))[:, :, None]  # (H, N, 1)
    kv = [k[:, t, :, :, None] * v[:, t, :, None, :] for t in range(T)]
    ys = []
    for t in range(T):
        S = d**t * state + sum((d ** (t - 1 - s) * kv[s] for s in range(t)), torch.zeros_like(state))
        ys.append(torch.einsum("bhj,bhji->bhi", r[:, t], S + u[:, :, None] * kv[t]))
    last = d**T * state + sum(d ** (T - 1 - s) * kv[s] for s in range(T))
    return torch.stack(ys, 1), last


def test_loop_is_the_definition():
    tensors = inputs(2, 7, 3, 4, -4, 1)
    assert max(errors(results(wkv5_reference, tensors), results(by_sums, tensors)).values()) < 1e-13


def test_state_is_key_by_value():
    r, k, v, w, u, _ = inputs(1, 1, 1, 4)
    _, state = wkv5(r, k, v, w, u)
    torch.testing.assert_close(state[0, 0].detach(), torch.outer(k[0, 0, 0], v[0, 0, 0]).detach())


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 77])
def test_chunks_equal_loop_in_float64(T):
    tensors = inputs(2, T, 2, 8, -6, 1.5, seed=T)
    assert max(errors(results(wkv5_chunked, tensors), results(wkv5_reference, tensors)).values()) < 1e-13


DECAYS = [(-10, -10), (-10, 4), (-6, -1), (-0.48, -0.48), (-0.46, -0.46), (-1, 1.5), (0.5, 1), (1.5, 3), (4, 4)]


@pytest.mark.parametrize(("low", "high"), DECAYS)
def test_chunks_in_float32_for_every_decay(low, high):
    tensors = inputs(2, 100, 2, 16, low, high, dtype=torch.float32)
    exact = results(wkv5_reference, [x.detach().double().requires_grad_() for x in tensors])
    # The gradient of a fast decay is small beside the terms that it is the sum of: hence its wider tolerance.
    tolerance = dict.fromkeys(NAMES, 1e-6) | {"w": 2e-5}
    found = errors(results(wkv5_chunked, tensors), exact)
    assert all(found[name] < tolerance[name] for name in NAMES), found


@pytest.mark.parametrize("chunk", [1, 2, 4, 16, 64])
def test_both_ways_through_a_chunk_are_equal(chunk):
    r, k, v, w, u, state = (x.detach() for x in inputs(2, 128, 3, 5, -3, -0.5))
    _, _, gy, _, _, glast = (x.detach() for x in inputs(2, 128, 3, 5, seed=1))
    found = []
    for kind, more in ((middle.Middle, ()), (halving.Halving, (float(w.exp().max()),))):
        way, S = kind(w, chunk, torch.float64, *more), torch.empty(128 // chunk + 1, 2, 3, 5, 5, dtype=torch.float64)
        y, *grads = (torch.empty_like(v) for _ in range(4))
        last = way.forward(r, k, v, u, state, S, y).clone()
        found.append([y, last, *way.backward(r, k, v, u, S, gy, glast, *grads), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_which_way_depends_on_the_strongest_decay_and_the_length():
    def fits(w, chunk):
        return middle.fits(math.exp(w), chunk)

    assert fits(-0.48, 64) and not fits(-0.46, 64), "exp(w) up to 20 / 32"
    assert fits(-0.48, 2) and not fits(-0.46, 2), "no stronger ones in short chunks: gw would lose digits"
    assert fits(-2.0, 256) and not fits(-1.0, 256)
    assert not fits(math.nan, 64) and not fits(math.inf, 64)


def test_formats_may_differ():
    tensors = inputs(1, 20, 2, 4)
    mixed = [tensors[0].detach().float().requires_grad_(), *tensors[1:]]
    found, want = results(wkv5_chunked, mixed), results(wkv5_reference, tensors)
    assert found[2].dtype == torch.float32 and max(errors(found, want).values()) < 1e-6


def test_a_small_gradient_of_the_decay_is_not_lost():
    tensors = inputs(1, 128, 2, 16, -0.48, -0.48, dtype=torch.float32)
    large = torch.autograd.grad(wkv5_chunked(*tensors)[0].sum(), tensors[3])[0]
    small = torch.autograd.grad(wkv5_chunked(*tensors)[0].sum() * 2.0**-85, tensors[3])[0]
    torch.testing.assert_close(small * 2.0**85, large, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_pieces_share_their_room():
    tensors = inputs(3, 70, 4, 4)
    before, chunked_module.SLICE = chunked_module.SLICE, 70 * 4  # one head of one row at a time
    try:
        shared = wkv5(*(x.detach() for x in tensors), backend="chunked")
        kept = wkv5(*tensors, backend="chunked")
    finally:
        chunked_module.SLICE = before
    assert all(torch.equal(a, b.detach()) for a, b in zip(shared, kept, strict=True))


def test_decay_gradient_of_every_channel():
    """Each channel of w by itself, from hardly any decay to none left: no division by a decay that is zero."""
    w = torch.linspace(-10, 4, 16).view(1, 16)
    r, k, v, _, u, state = inputs(1, 48, 1, 16, dtype=torch.float32)
    tensors = [r, k, v, w.requires_grad_(), u, state]
    got = results(wkv5_chunked, tensors)[5]
    want = results(wkv5_reference, [x.detach().double().requires_grad_() for x in tensors])[5]
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("huge", [89.0, 800.0, 3e38])
@pytest.mark.parametrize("T", [1, 40])
def test_a_channel_that_forgets_at_once_has_a_gradient_of_zero(T, huge, dtype):
    """Where exp(w) is infinite, and 0 times it no number. test_backends.py asks each backend."""
    tensors = [x.detach() for x in inputs(1, T, 2, 8, dtype=dtype)]
    tensors[3][0, 3] = huge
    truth = [x.double() for x in tensors]
    truth[3] = truth[3].clamp(max=50.0)
    want = results(wkv5_reference, [x.requires_grad_() for x in truth])
    tolerance = dict.fromkeys(NAMES, 2e-6) | {"w": 2e-5}
    for operator in (wkv5, wkv5_chunked):
        got = results(operator, [x.detach().requires_grad_() for x in tensors])
        found = errors(got, want)
        assert got[5][0, 3] == 0 and all(found[name] < tolerance[name] for name in NAMES), found


@pytest.mark.parametrize(("low", "high", "fits"), [(-3, -1, True), (0, 3, False)])
def test_gradcheck(low, high, fits):
    tensors = inputs(1, 11, 2, 3, low, high)
    assert middle.fits(float(tensors[3].detach().exp().max()), 4) is fits
    assert torch.autograd.gradcheck(lambda *x: wkv5_chunked(*x, chunk=4), tensors, eps=1e-6, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(0, 40),
    H=st.integers(1, 3),
    N=st.integers(1, 9),
    chunk=st.sampled_from([1, 2, 8, 16, 64]),
    slice_size=st.sampled_from([1, 100, 1 << 18]),
    low=st.floats(-10, 4),
)
def test_any_shape_chunk_and_slice(B, T, H, N, chunk, slice_size, low):
    tensors = inputs(B, T, H, N, low, min(4.0, low + 3))
    before, chunked_module.SLICE = chunked_module.SLICE, slice_size
    try:
        got = results(lambda *x: wkv5_chunked(*x, chunk=chunk), tensors)
    finally:
        chunked_module.SLICE = before
    assert max(errors(got, results(wkv5_reference, tensors)).values()) < 1e-11


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("cut", [0, 1, 13, 32])
def test_in_two_parts_with_the_state_between(backend, cut):
    r, k, v, w, u, state = (x.detach() for x in inputs(2, 45, 2, 8))
    y, last = wkv5(r, k, v, w, u, state, backend=backend)
    y1, middle = wkv5(*(x[:, :cut].contiguous() for x in (r, k, v)), w, u, state, backend=backend)
    y2, end = wkv5(*(x[:, cut:].contiguous() for x in (r, k, v)), w, u, middle, backend=backend)
    torch.testing.assert_close(torch.cat((y1, y2), 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32_inside(T, dtype):
    r, k, v, w, u, state = inputs(1, T, 2, 8, dtype=torch.float32)
    r, k, v = (x.detach().to(dtype).requires_grad_() for x in (r, k, v))
    y, last = wkv5(r, k, v, w, u, state)
    want, want_last = wkv5_reference(*(x.double() for x in (r, k, v, w, u, state)))
    assert y.dtype == dtype and last.dtype == torch.float32
    torch.testing.assert_close(last.double(), want_last, rtol=1e-5, atol=1e-5)  # nothing was rounded on the way
    torch.testing.assert_close(y, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)
    (y.float().sum() + last.sum()).backward()
    assert r.grad.dtype == dtype and w.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_does_not_round_inside(backend):
    tensors = inputs(2, 40, 2, 8, dtype=torch.float32)
    plain = wkv5(*tensors, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = wkv5(*tensors, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_backward_called_under_autocast():
    tensors = inputs(2, 40, 2, 8, dtype=torch.float32)
    plain = results(wkv5, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(wkv5, tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_inputs_stay_as_they_were(T, backend):
    tensors = [x.detach() for x in inputs(2, T, 3, 8)]
    copies = [x.clone() for x in tensors]
    wkv5(*tensors, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_no_state_is_a_state_of_zeros():
    r, k, v, w, u, state = (x.detach() for x in inputs(2, 20, 2, 8))
    for a, b in zip(wkv5(r, k, v, w, u), wkv5(r, k, v, w, u, torch.zeros_like(state)), strict=True):
        assert torch.equal(a, b)


def test_chunk_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="chunk = 24 is not a power of two"):
        wkv5_chunked(*inputs(1, 3, 2, 4), chunk=24)

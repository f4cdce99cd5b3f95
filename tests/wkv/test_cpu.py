"""The C++ backend by itself: against the loop in float64, on shapes, decays and numbers that break kernels."""

from __future__ import annotations

import ctypes
import math
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.wkv import build, cpu, wkv5_chunked, wkv5_reference

NAMES = ("y", "last", "r", "k", "v", "w", "u", "state")
TOLERANCE = dict.fromkeys(NAMES, 1e-6) | {"w": 1e-5}

pytestmark = pytest.mark.skipif(build.find_cxx() is None, reason=f"no C++ compiler: {build.CXX_REMEDY}")


class WithCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, w, u, state):
        saved = torch.full(cpu.saved_shape(*r.shape), torch.nan)
        ctx.save_for_backward(r, k, v, w, u, state, saved)
        return cpu.forward(r, k, v, w, u, state, saved)

    @staticmethod
    def backward(ctx, gy, glast):
        return cpu.backward(*ctx.saved_tensors, gy.contiguous(), glast.contiguous())


def inputs(B, T, H, N, low=-6.0, high=-1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + 1000 * T + N)
    r, k, v = (torch.randn(B, T, H, N, generator=g).to(dtype) for _ in range(3))
    w = torch.empty(H, N).uniform_(low, high, generator=g)
    return [r, k, v, w, torch.randn(H, N, generator=g), torch.randn(B, H, N, N, generator=g)]


def everything(function, tensors, glast_scale=1.0):
    """y, last state and the six gradients in one direction."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    y, last = function(*tensors)
    g = torch.Generator().manual_seed(3)
    directions = [torch.randn(x.shape, generator=g).bfloat16().to(x.dtype) for x in (y, last)]
    directions[1] *= glast_scale
    grads = torch.autograd.grad([y, last], tensors, directions, allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, (x.detach() for x in (y, last, *grads)), strict=True))


def errors(tensors, exact=wkv5_reference, **kwargs):
    """Per tensor: the largest error over the largest number."""
    got = everything(WithCpu.apply, tensors, **kwargs)
    want = everything(exact, [x.double() for x in tensors], **kwargs)
    assert all(got[n].dtype == (tensors[0].dtype if n in ("y", "r", "k", "v") else torch.float32) for n in NAMES)
    tiny = torch.finfo(torch.float32).tiny
    pairs = ((n, got[n].double(), want[n]) for n in NAMES)
    return {n: float((a - b).abs().max() / b.abs().max().clamp_min(tiny)) if b.numel() else 0.0 for n, a, b in pairs}


def agree(tensors, tolerance=TOLERANCE, **kwargs):
    found = errors(tensors, **kwargs)
    assert all(found[name] <= tolerance[name] for name in NAMES), found


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 77, 256, 257, 300])
@pytest.mark.parametrize("N", [16, 64])
def test_any_length(T, N):
    agree(inputs(2, T, 2, N))


@pytest.mark.parametrize("N", [1, 3, 8, 15, 17, 24, 32, 48, 63, 100, 128, 256])
def test_any_head_size(N):
    agree(inputs(1, 37, 2, N))


@pytest.mark.parametrize(("low", "high"), [(-10, -10), (-10, 4), (-6, -1), (-1, 1.5), (0.5, 1), (1.5, 3), (4, 4)])
@pytest.mark.parametrize("N", [8, 64])
def test_every_decay(low, high, N):
    agree(inputs(2, 100, 2, N, low, high))


def test_decay_gradient_of_every_channel():
    """Each channel by itself, from hardly any decay to none left: small gradients must be right too."""
    tensors = inputs(1, 48, 1, 16)
    tensors[3] = torch.linspace(-10, 4, 16).view(1, 16)
    got = everything(WithCpu.apply, tensors)["w"].double()
    want = everything(wkv5_reference, [x.double() for x in tensors])["w"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "N"), [(1, 16), (37, 64), (50, 20)])
def test_half_precision_rounds_only_what_comes_out(dtype, T, N):
    half = torch.finfo(dtype).eps / 2
    tolerance = TOLERANCE | {name: half + 1e-6 for name in ("y", "r", "k", "v")}
    agree(inputs(2, T, 2, N, dtype=dtype), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_comes_in_and_goes_out(dtype):
    """v through y = r u k v with r = u = k = 1, one step: what comes out is what torch makes of the same float32."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(1024, 1, 1, 64)
    ones, w = torch.ones_like(every), torch.zeros(1, 64)
    scale = torch.zeros(1, 64)
    scale[:, 0] = 1
    state = torch.zeros(1024, 1, 64, 64)
    for factor in (1.0, 0.7, 3.3e-4):  # 0.7 and 3.3e-4: rounding, down to subnormal numbers
        y, _ = cpu.forward(ones, ones, every, w, scale * factor, state, None)
        want = (every.float() * torch.tensor(factor)).to(dtype)
        same = (y == want) | (y.isnan() & want.isnan())
        finite = ~torch.isnan(want.float()) & ~torch.isinf(every)
        assert same[finite].all() and same[every.isnan()].all()
        assert (~torch.isfinite(y[torch.isinf(every)])).all()  # 0 times infinity is part of the sum: NaN is fine


def test_many_heads_and_stretches_of_time():
    agree(inputs(2, 600, 10, 16))  # heads go through time in bundles of 8, in stretches of 256 steps


def test_tensors_that_go_past_the_cache():
    agree(inputs(1, 1025, 16, 64), exact=wkv5_chunked)  # from 4 MiB on results are stored in another way


@pytest.mark.parametrize("shape", [(3, 70, 3, 16), (1, 300, 9, 64)])
def test_one_thread_and_several_give_the_same_bits(shape):
    tensors, before = inputs(*shape), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything(WithCpu.apply, tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in NAMES)


def test_without_torchs_thread_pool(monkeypatch):
    tensors, before = inputs(2, 40, 3, 16), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        want = everything(WithCpu.apply, tensors)
        monkeypatch.setattr(cpu, "openmp", lambda: (None, None))
        got = everything(WithCpu.apply, tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[n], want[n]) for n in NAMES)


def test_nothing_kept_changes_nothing():
    tensors = inputs(2, 600, 1, 16)
    assert cpu.saved_shape(2, 600, 1, 16) == (2, 1, 2, 16, 16)
    saved = torch.empty(cpu.saved_shape(2, 600, 1, 16))
    with_states, without = cpu.forward(*tensors, saved), cpu.forward(*tensors, None)
    assert all(torch.equal(a, b) for a, b in zip(with_states, without, strict=True))
    _, at_256 = cpu.forward(*(x[:, :256].contiguous() for x in tensors[:3]), *tensors[3:], None)
    assert torch.equal(saved[:, :, 0], at_256)


@pytest.mark.parametrize("cut", [0, 1, 16, 21, 45])
def test_in_two_parts_with_the_state_between(cut):
    r, k, v, w, u, state = inputs(2, 45, 2, 16)
    y, last = cpu.forward(r, k, v, w, u, state, None)
    first, second = ([x[:, part].contiguous() for x in (r, k, v)] for part in (slice(cut), slice(cut, None)))
    y1, middle = cpu.forward(*first, w, u, state, None)
    y2, end = cpu.forward(*second, w, u, middle, None)
    torch.testing.assert_close(torch.cat((y1, y2), 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_last_state_alone():
    tensors = inputs(1, 20, 2, 16)
    r, k, v, w, u, state = tensors
    saved = torch.empty(cpu.saved_shape(*r.shape))
    glast = torch.randn(state.shape)
    got = cpu.backward(r, k, v, w, u, state, saved, torch.zeros_like(r), glast)
    exact = [x.double().requires_grad_() for x in tensors]
    want = torch.autograd.grad(
        wkv5_reference(*exact)[1], exact, glast.double(), allow_unused=True, materialize_grads=True
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-10, -10), (-10, -6), (-3, 1)])
def test_a_hundred_thousand_steps(low, high):
    # float64 chunks, equal to the loop to 1e-12 (test_wkv5.py), stand in for it. The state is multiplied by d^16 at
    # 6,250 chunks: without the correction for what rounding d^16 took away, the error at -10 is 3e-5.
    tolerance = dict.fromkeys(NAMES, 5e-6) | {"w": 2e-5}
    agree(inputs(1, 100_000, 1, 8, low, high), tolerance, exact=wkv5_chunked)


@pytest.mark.parametrize("zero", range(6))
def test_zeros(zero):
    tensors = inputs(1, 33, 1, 16)
    tensors[zero] = torch.zeros_like(tensors[zero])
    agree(tensors)


def test_subnormal_numbers():
    r, k, v, w, u, state = inputs(1, 33, 1, 16)
    found = errors([r, k * 1e-40, v, w, u, state * 1e-40])
    # 1e-40 is 71,000 times the smallest float32: so few bits are left.
    assert all(found[name] < 1e-4 for name in ("y", "last", "k", "state")), found


def test_a_large_range_of_numbers():
    r, k, v, w, u, state = inputs(1, 40, 1, 16)
    agree([r, k * torch.logspace(-12, 12, 16), v, w, u, state])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("N", [16, 64])
def test_infinity_is_seen_and_changes_no_earlier_step(bad, which, N):
    tensors = inputs(1, 40, 1, N)
    clean, _ = cpu.forward(*tensors, None)
    tensors[which][0, 21, 0, 5] = bad
    y, last = cpu.forward(*tensors, None)
    assert torch.equal(y[:, :21], clean[:, :21])
    assert not torch.isfinite(y[:, 21]).all()
    if which:
        assert not torch.isfinite(last).all()


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(0, 50),
    H=st.integers(1, 3),
    N=st.integers(1, 40),
    low=st.floats(-10, 4),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    threads=st.integers(1, 3),
)
def test_any_shape(B, T, H, N, low, dtype, threads):
    before = torch.get_num_threads()
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    try:
        torch.set_num_threads(threads)
        # One head of one channel can cancel in its few numbers: hence wider than above.
        agree(inputs(B, T, H, N, low, min(4.0, low + 3), dtype), dict.fromkeys(NAMES, 3e-5 + half))
    finally:
        torch.set_num_threads(before)


def test_inputs_are_never_changed():
    tensors = inputs(2, 40, 2, 16)
    copies = [x.clone() for x in tensors]
    everything(WithCpu.apply, tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_subnormal_numbers_still_exist_in_torch():
    """-ffast-math at link time would switch them off for the whole process."""
    cpu.forward(*inputs(1, 20, 1, 16), None)
    cpu.forward(*inputs(1, 20, 1, 64), None)
    assert not {"-ffast-math", "-Ofast"} & set(build.cxx_flags())
    x = torch.full((64,), 1e-30)
    assert float((x * 1e-10).min()) > 0 and float((x * 1e-10 * 1e10).min()) > 0


# ---- building


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not built anything, with an empty cache folder."""
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(cpu, "_failure", [])
    for cached in (cpu._library, build.build):
        cached.cache_clear()
    yield tmp_path / "cache"
    for cached in (cpu._library, build.build):
        cached.cache_clear()


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *args, **kwargs: None)
    reason = cpu.why_not()
    assert reason.startswith("no C++ compiler was found: install ") and "\n" not in reason
    with pytest.raises(
        build.BuildError, match="wkv5_cpu needs a C\\+\\+ compiler and none was found: install"
    ) as failure:
        cpu.prepare(64)
    assert "\n" not in str(failure.value) and cpu.why_not() == str(failure.value)


def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path):
    script = tmp_path / "c++"
    write_half = 'for last; do :; done\necho half > "$last"\necho broken >&2\nexit 3\n'
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\n' + write_half)
    script.chmod(0o755)
    monkeypatch.setattr(build, "find_cxx", lambda: str(script))
    assert cpu.why_not() is None
    with pytest.raises(build.BuildError, match="wkv5_cpu: c\\+\\+ failed with exit code 3; see ") as failure:
        cpu.forward(*inputs(1, 3, 1, 16), None)
    assert "\n" not in str(failure.value) and cpu.why_not() == str(failure.value)
    log = failure.value.log.read_text()
    assert log.startswith(shlex.quote(str(script))) and "wkv5_cpu.cpp" in log and log.endswith("broken\n")
    assert [p.suffix for p in fresh.iterdir()] == [".log"]  # no half-written library


def test_flags_are_of_this_processor(monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    for capability, level in {"AVX512": "v4", "AVX2": "v3", "DEFAULT": "v2", "a later one": "v2"}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert f"-march=x86-64-{level}" in build.cxx_flags()
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert not any(flag.startswith("-march") for flag in build.cxx_flags())


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_narrower_vectors(capability, monkeypatch):
    """The code for 8 and 4 floats in a register runs on every processor that has 16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu._library.cache_clear()
    try:
        for N, dtype in ((16, torch.float32), (20, torch.float32), (8, torch.bfloat16)):
            half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
            agree(inputs(2, 37, 2, N, dtype=dtype), {n: t + half for n, t in TOLERANCE.items()})
    finally:
        cpu._library.cache_clear()


def test_the_library_speaks_of_the_same_fields():
    """`_Call` and `struct Call` name the same fields in the same order."""
    source = (build.kernels_folder() / cpu.SOURCE).read_text(encoding="utf-8")
    body = source.split("struct Call {")[1].split("};")[0]
    code = "".join(line.split("//")[0] for line in body.splitlines())
    names = [name.strip(" *") for part in code.split(";") for name in part.split(",") if name.strip()]
    assert [name.split()[-1].strip("*") for name in names] == [name for name, _ in cpu._Call._fields_]
    assert ctypes.sizeof(cpu._Call) == 8 * len(cpu._Call._fields_)

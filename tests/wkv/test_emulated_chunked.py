"""The fast CUDA kernels' source on the processor: right against float64, deterministic, and no barrier too few or many.

The plain kernels, and the emulator's own faculties, are tested in test_emulated.py and test_emulator.py.
"""

import re

import pytest
import torch
from kernel_cases import inputs, truth

from rwkv_nb.wkv import emulated, emulator
from rwkv_nb.wkv.emulator import Launch

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

SOURCE = "wkv5_chunked.cu"
# Largest error, relative to the largest number. Half precision: its own rounding, and that of products to tf32.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11 + 1e-3, torch.bfloat16: 2**-8 + 1e-3}
INSTANCES = [(16, torch.float32), (64, torch.float32), (128, torch.float32), (32, torch.float16), (64, torch.bfloat16)]


def fast(*x):
    *tensors, gy, glast = x
    forward = emulated.forward(*tensors, None, kernel="chunked")
    return [*forward, *emulated.backward(*tensors, None, gy, glast, kernel="chunked")]


def check(x):
    tolerance = ROUNDING[x[0].dtype]
    for a, (name, b) in zip(fast(*x), truth(*x).items(), strict=True):
        assert a.shape == b.shape and a.dtype == (x[0].dtype if name in ("y", "gr", "gk", "gv") else torch.float32)
        if b.numel():
            error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
            allowed = tolerance * (10 if name == "gw" else 1)
            if x[0].dtype == torch.bfloat16 and name not in ("y", "last"):
                allowed = 2.0**-8 + 2e-5 if a.dtype == torch.bfloat16 else 5e-5
            assert error < allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize(("N", "dtype"), INSTANCES)
@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 33, 48])
def test_equals_float64(N, dtype, T):
    check(inputs(2 if N < 64 else 1, T, 2 if N < 64 else 1, N, dtype=dtype, seed=T))


@pytest.mark.parametrize(("N", "dtype"), INSTANCES)
@pytest.mark.parametrize("T", [5, 40])
def test_slow_decays_equal_float64(N, dtype, T):
    """All channels of a warp slow: pairs of steps are taken at once."""
    check(inputs(1, T, 2, N, w=(-6.0, -1.0), dtype=dtype, seed=T))


def test_each_warp_decides_for_its_channels():
    x = inputs(1, 40, 1, 64, dtype=torch.bfloat16, w=(-6.0, -1.0))
    x[3][0, 20] = 2.0  # in the second of four warps
    check(x)


@pytest.mark.parametrize("w", [(-6.0, -1.0), (-6.0, 1.0), (-6.0, 2.0)])
def test_gradients_in_bfloat16_are_those_of_float_sums_rounded(w):
    """As exact as the plain kernels', which add floats as the official one does: tf32 would show, 2 parts in 100."""
    x = inputs(1, 256, 2, 64, w=w, dtype=torch.bfloat16)
    if w[1] > 1.386:
        x[3][:, ::16] = 1.5  # in each warp: pairs of steps are taken in levels
    want = truth(*x)
    *tensors, gy, glast = x
    plain = dict(zip(list(want)[2:], emulated.backward(*tensors, None, gy, glast, kernel="plain"), strict=True))
    for name, got in zip(list(want)[2:], fast(*x)[2:], strict=True):
        off, off_plain = ((a.double() - want[name]).abs() for a in (got, plain[name]))
        if got.dtype == torch.bfloat16:
            assert off.square().mean() < 1.01 * off_plain.square().mean(), name
            assert off.max() <= 1.01 * off_plain.max(), name
        else:
            assert off.max() < 2e-5 * want[name].abs().max(), name


# d^-8 is at most exp(32) up to w = 1.386; at -120 d is 1
@pytest.mark.parametrize("w", [(x, x) for x in (-120.0, -18.0, -10.0, -5.0, -2.0, 0.0, 0.5, 1.0, 1.38, 1.39, 2.0, 4.0)])
def test_every_decay_alone(w):
    check(inputs(1, 70, 1, 16, w=w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_small_and_large_numbers_beside_fast_decays(scale, dtype):
    x = inputs(1, 40, 1, 64, w=(-6.0, 1.38), dtype=dtype)
    for i in (1, 5, 6, 7):  # k, the state, gy, glast: what is linear in them has this scale, or its square
        x[i] = x[i] * scale
    check(x)


def test_a_decay_of_zero_whatever_its_exponent():
    x = inputs(1, 20, 1, 16)
    x[3][0, 3] = 89.0  # exp(89) is infinite in float
    assert all(bool(torch.isfinite(t).all()) for name, t in zip(truth(*x), fast(*x), strict=True) if name != "gw")


def test_errors_do_not_pile_up_over_two_thousand_steps():
    check(inputs(1, 2005, 1, 16, w=(-10.0, -10.0)))


def test_channels_that_forget_at_once_beside_channels_that_keep():
    x = inputs(1, 40, 1, 16)
    x[3] = torch.tensor([-10.0, 4.0]).repeat(8).view(1, 16)
    check(x)


def arguments_of(N, T, x):
    """The arrays of both kernels forward in time, outputs filled with NaN."""
    r, k, v, w, u, state, gy, glast = x
    B, _, H, _ = r.shape
    inside = {"steps": T, "heads": H, "r": r, "k": k, "v": v, "w": w, "u": u, "state": state}
    empty = {n: torch.full((B, H, N), torch.nan) for n in ("gw", "gu")}
    values = {**inside, "y": torch.full_like(r, torch.nan), "last": torch.full_like(state, torch.nan)}
    return values, {**inside, "gy": gy, "glast": glast, "gr": torch.full_like(r, torch.nan), **empty}


def test_schedules_give_the_same_bits_and_nothing_is_amiss():
    N, T = 32, 37
    x = inputs(1, T, 1, N)
    values, keys = arguments_of(N, T, x)
    launches = [Launch(f"wkv5_values<{N}, float, false>", 1, 2 * N, values),
                Launch(f"wkv5_keys<{N}, float, false>", 1, 2 * N, keys)]  # fmt: skip
    source = emulated.read_source(SOURCE)
    first = emulator.launch(source, launches)
    assert first.ok, first
    for schedule, seed in (("reversed", 0), ("random", 1)):
        other = emulator.launch(source, launches, schedule=schedule, seed=seed)
        assert other.ok, other
        assert all(torch.equal(first[n], other[n]) for n in ("y", "last", "gr", "gw", "gu")), schedule
    want = truth(*x)
    for name in ("y", "last", "gr"):
        torch.testing.assert_close(first[name].double(), want[name].detach(), rtol=1e-5, atol=1e-4)


def test_a_chunk_is_read_once():
    """Global traffic: each number of r, k, v is read once by the kernel for y, and y is written once. After the last
    chunk the last step is read in place of the next chunk's 16."""
    N, T = 32, 48
    values, _ = arguments_of(N, T, inputs(1, T, 1, N))
    launch = Launch(f"wkv5_values<{N}, float, false>", 1, 2 * N, values)
    report = emulator.launch(emulated.read_source(SOURCE), [launch])
    counts = report.counts["wkv5_values"]
    assert counts["y"].writes == T * N and counts["last"].writes == N * N
    assert all(counts[n].reads == (T + 16) * N for n in "rkv") and counts["state"].reads == N * N


def without_barriers():
    """Copies of the two kernels, each with one barrier taken out: (kernel, name of the copy, text)."""
    source = emulated.read_source(SOURCE)
    for kernel in ("wkv5_values", "wkv5_keys"):
        start = source.rindex("template <int N", 0, source.index(f"\n{kernel}("))
        text = source[start : source.index("\n}\n", start) + 3]
        for i, found in enumerate(re.finditer(r"__syncthreads\(\);", text)):
            copy = text[: found.start()] + " " * len(found.group()) + text[found.end() :]
            yield kernel, f"{kernel}_without_{i}", copy.replace(f"\n{kernel}(", f"\n{kernel}_without_{i}(")


COPIES = {name: (kernel, text) for kernel, name, text in without_barriers()}


@pytest.mark.slow
def test_every_barrier_is_needed_and_missed():
    """Without any one of them there is a race, named by a shared array and two threads."""
    assert len(COPIES) == 9
    N, T = 32, 37
    values, keys = arguments_of(N, T, inputs(1, T, 1, N, dtype=torch.bfloat16))
    slow = inputs(1, T, 1, N, w=(-6.0, -1.0))[3]
    launches = {}
    assert values["w"].max() > 1 and slow.max() < 0
    for name, (kernel, _) in COPIES.items():
        arguments = {}
        for key, value in (values if kernel == "wkv5_values" else keys).items():
            fresh = key in ("y", "last", "gr", "gw", "gu")  # each copy writes into arrays of its own
            arguments[f"{name}_{key}" if fresh else key] = value.clone() if fresh else value
        # A rest or none; fast or slow; backward in time, where other factors are shared.
        cases = [(T, values["w"], "false"), (32, values["w"], "false"), (T, slow, "false"), (T, slow, "true"),
                 (32, slow, "true")]  # fmt: skip
        for case, (steps, w, backwards) in enumerate(cases):
            given = arguments | {"steps": steps, "w": w}
            launches[name, case] = [Launch(f"{name}<{N}, __nv_bfloat16, {backwards}>", 1, 2 * N, given)]
    source = emulated.read_source(SOURCE) + "\n".join(text for _, text in COPIES.values())
    for (name, _), [launch] in launches.items():
        if name.endswith("_0"):  # the kernels as they are: nothing is amiss
            arguments = {key.removeprefix(f"{name}_"): value.clone() if isinstance(value, torch.Tensor) else value
                         for key, value in launch.arguments.items()}  # fmt: skip
            kernel = launch.kernel.replace(name, COPIES[name][0])
            report = emulator.launch(source, [Launch(kernel, launch.grid, launch.block, arguments)])
            assert report.ok, report
    found, by_case = {}, {}
    for (_, case), several in launches.items():  # one by one: a race may lead a warp's lanes apart, which ends it all
        races = emulator.launch(source, several).races
        found |= {race.kernel: race for race in races}
        by_case.setdefault(case, set()).update(race.kernel for race in races)
    missing = [name for name in COPIES if name not in found]
    assert not missing, missing
    assert by_case[2] == by_case[0], "the path of slow decays needs the same barriers"
    assert by_case[3] | by_case[4] >= {name for name in COPIES if "keys" not in name}, "gv needs the barriers of y"
    assert all(race.space == "shared" and race.threads[0] != race.threads[1] for race in found.values())

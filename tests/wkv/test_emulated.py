"""The CUDA kernels' source on the processor: right against float64, deterministic, and every planted fault found."""

import re

import pytest
import torch
from kernel_cases import NAMES, inputs, truth

from rwkv_nb.wkv import emulated, emulator
from rwkv_nb.wkv.emulator import Launch

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place
FORMATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def backend(r, k, v, w, u, state, gy, glast):
    result = (*emulated.forward(r, k, v, w, u, state, None), *emulated.backward(r, k, v, w, u, state, None, gy, glast))
    return dict(zip(NAMES, result, strict=True))


def check(got, want, dtype=torch.float32, float32=1e-6):
    """Largest difference, relative to the largest number of the tensor; gw may have ten times as much."""
    for name, b in want.items():
        a = got[name]
        assert a.shape == b.shape and a.dtype == (dtype if name in ("y", "gr", "gk", "gv") else torch.float32), name
        if b.numel():
            error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-37))
            allowed = float32 * (10 if name == "gw" else 1) + (ROUNDING[dtype] if a.dtype == dtype else 0)
            assert error < allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("N", emulated.HEAD_SIZES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=FORMATS.get)
def test_equals_float64(N, dtype):
    for T in (0, 1, 2, 5, 33):
        x = inputs(2, T, 2, N, dtype=dtype, seed=T)
        check(backend(*x), truth(*x), dtype)


@pytest.mark.parametrize("w", [-10.0, -5.0, 0.0, 1.0, 2.0, 3.0, 4.0])
def test_every_decay_alone(w):
    """A decay near 1 must not lose what it forgets, one near 0 must not lose its gradient."""
    x = inputs(1, 200, 1, 16, w=(w, w))
    check(backend(*x), truth(*x), float32=2e-6)


def test_zeros_and_tiny_numbers():
    x = inputs(1, 5, 2, 16)
    for i, scale in ((0, 0), (1, 0), (2, 1e-38), (5, 0), (6, 0), (7, 1e-30)):
        changed = list(x)
        changed[i] = x[i] * scale
        check(backend(*changed), truth(*changed))


def test_nothing_to_do():
    for B, H in ((0, 2), (2, 0)):
        x = inputs(B, 3, H, 16)
        check(backend(*x), truth(*x))


def test_what_the_dispatch_asks():
    assert emulated.supports(64) is None and "48" in emulated.supports(48)
    assert emulated.saved_shape(1, 2, 3, 16) == (0,)


def test_schedules_give_the_same_bits():
    x = inputs(2, 3, 1, 16)
    first = emulated.run(None, *x, checked=False)
    check(first, truth(*x))
    for schedule, seed in (("reversed", 0), ("random", 1), ("random", 2)):
        other = emulated.run(None, *x, checked=False, schedule=schedule, seed=seed)
        assert all(torch.equal(first[n], other[n]) for n in NAMES), schedule
    watched = emulated.run(None, *x, schedule="random", switch_often=True)
    assert watched.ok, watched
    assert all(torch.equal(first[n], watched[n]) for n in NAMES)


def test_counts():
    B, T, H, N = 2, 3, 2, 16
    report = emulated.run(None, *inputs(B, T, H, N))
    counts = report.counts["wkv5_forward"]
    numbers, states, sums = B * T * H * N, B * H * N * N, B * T * H * N * N
    assert {n: (c.reads, c.writes) for n, c in counts.items() if c.space == "global"} == {
        **dict.fromkeys("rkv", (numbers, 0)),
        **dict.fromkeys("wu", (B * H * N, 0)),
        "state": (states, 0),
        "y": (0, numbers),
        "last": (0, states),
    }
    assert {n: (c.reads, c.writes) for n, c in counts.items() if c.space == "shared"} == {
        **dict.fromkeys(("r_t", "k_t"), (sums, numbers)),
        **dict.fromkeys(("d", "d_rest", "bonus"), (sums, B * H * N)),
    }
    assert report.barriers["wkv5_forward"] == B * H * 2 * T
    assert report.moved(kernel="wkv5_forward") == 4 * (4 * numbers + 2 * B * H * N + 2 * states)
    twice = report.counts["wkv5_sum_over_batch"]  # launched for gu and for gw
    assert sum(c.reads for c in twice.values()) == 2 * B * H * N and sum(c.writes for c in twice.values()) == 2 * H * N


def kernels_of(source):
    """Name of a kernel -> its text."""
    parts = re.split(r"(?=^template <int N, typename T>\n__global__)", source, flags=re.MULTILINE)
    return {re.search(r"(wkv5_\w+)\(", p).group(1): p[: p.index("\n}\n") + 3] for p in parts[1:]}


def without_barriers():
    """Copies of the kernels, each with one barrier taken out: (name of the copy, text)."""
    for name, text in kernels_of(emulated.read_source()).items():
        barriers = list(re.finditer(r"__syncthreads\(\);", text))
        for i, found in enumerate(barriers):
            copy = text[: found.start()] + " " * len(found.group()) + text[found.end() :]
            yield f"{name}_without_{i}", copy.replace(f"{name}(", f"{name}_without_{i}(")


COPIES = dict(without_barriers())


@pytest.fixture(scope="module")
def reports_without_barriers():
    """All copies compiled at once, run under each schedule."""
    x = dict(zip(("r", "k", "v", "w", "u", "state", "gy", "glast"), inputs(1, 2, 1, 16), strict=True))
    head = emulated.read_source().split("// [forward: arguments]")[0]
    launches = []
    for name, text in COPIES.items():
        parameters = re.search(r"\(int64_t steps, (.*?)\) \{", text, re.DOTALL).group(1)
        arguments = {"steps": 2}
        for kind, parameter in re.findall(r"(Global<[^>]*>|int) (\w+)", parameters):
            like = x.get(parameter[1:] if parameter in ("gr", "gk", "gv", "gstate") else parameter, x["r"])
            fresh = kind in ("Global<T>", "Global<float>")
            arguments[f"{name}_{parameter}" if fresh else parameter] = torch.zeros_like(like) if fresh else like
            if kind == "int":
                arguments[parameter] = 1
            elif parameter == "last":
                arguments[f"{name}_last"] = torch.zeros_like(x["state"])
        launches.append(Launch(f"{name}<16, float>", 1, 16, arguments))
    source = head + "\n".join(COPIES.values())
    return {schedule: emulator.launch(source, launches, schedule=schedule) for schedule in emulator.SCHEDULES}


def test_all_kernels_have_barriers():
    assert len(COPIES) == 10 and {n.rsplit("_without_")[0] for n in COPIES} == set(kernels_of(emulated.read_source()))


@pytest.mark.parametrize("name", COPIES)
def test_every_barrier_is_needed_and_missed(name, reports_without_barriers):
    """Without it there is a race, found under every schedule, named by a shared array, two threads and two lines."""
    for schedule, report in reports_without_barriers.items():
        races = [r for r in report.races if r.kernel == name]
        assert races, f"{schedule}: nothing found"
        for race in races:
            assert race.space == "shared" and race.array in ("r_t", "k_t", "v_t", "g_t")
            assert "write" in race.kinds and race.threads[0] != race.threads[1]


def test_pieces_cut_the_source_at_its_markers():
    source = emulated.read_source()
    pieces = emulated.pieces(source)
    assert "r_t[i] = to_float(r[now + i]);" in pieces["forward: one step"]
    assert "fmaf" in pieces["forward: read, then write the state"] and "forward: arguments" in pieces
    assert all(len(text.splitlines()) <= 30 for text in pieces.values())

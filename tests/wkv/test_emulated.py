"""The CUDA kernels' source on the processor: right against float64, deterministic, and every planted fault found."""

import re

import pytest
import torch

from rwkv_nb.wkv import emulated, emulator, wkv5_reference
from rwkv_nb.wkv.emulator import Launch

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

NAMES = ("y", "last", "gr", "gk", "gv", "gw", "gu", "gstate")
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place
FORMATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def inputs(B, T, H, N, w=(-10.0, 4.0), dtype=torch.float32, seed=0):
    """r, k, v, w, u, state, gy, glast."""
    g = torch.Generator().manual_seed(seed)
    r, k, v, gy = (torch.randn(B, T, H, N, generator=g).to(dtype) for _ in range(4))
    u = torch.randn(H, N, generator=g)
    state, glast = (torch.randn(B, H, N, N, generator=g) for _ in range(2))
    return [r, k, v, torch.empty(H, N).uniform_(*w, generator=g), u, state, gy, glast]


def truth(r, k, v, w, u, state, gy, glast):
    """The loop in float64, gradients by autograd."""
    tensors = [x.double().requires_grad_() for x in (r, k, v, w, u, state)]
    y, last = wkv5_reference(*tensors)
    grads = torch.autograd.grad([y, last], tensors, [gy.double(), glast.double()], allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True))
    return dict(zip(NAMES, (y.detach(), last.detach(), *filled), strict=True))


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
    x = inputs(2, 3, 1, 32)
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


def run_one(text, grid=1, block=64, size=64, **options):
    """A small kernel `f(x, y)` on two arrays of floats; x counts from 0."""
    x, y = torch.arange(float(size)), torch.full((size,), -1.0)
    source = "__global__ void f(Global<const float> x, Global<float> y) {\n    int i = threadIdx.x;\n" + text + "\n}"
    return emulator.launch(source, [Launch("f", grid, block, {"x": x, "y": y})], **options)


PLANTED = {  # name -> (text, blocks, array, kinds, lines)
    "write and read": ("SHARED(float, s, 64); s[i] = x[i];\ny[i] = s[63 - i];", 1, "s", {"write", "read"}, {3, 4}),
    "write and write": ("SHARED(float, s, 64);\ns[i / 2] = x[i];", 1, "s", {"write"}, {4}),
    "global, one block": ("y[i] = x[i];\nif (i > 0) y[i] = y[i - 1];", 1, "y", {"write", "read"}, {3, 4}),
    "across blocks": ("y[i] = x[i];", 2, "y", {"write"}, {3}),
    "across blocks, read": ("if (blockIdx.x == 0) y[i] = 1;\nelse y[i + 0] += 1;", 2, "y", {"write", "read"}, {3, 4}),
    "warps": ("SHARED(float, s, 64); s[i] = 1; __syncwarp();\ny[i] = s[63 - i];", 1, "s", {"write", "read"}, {3, 4}),
    "a shuffle orders nothing": (
        "SHARED(float, s, 64); s[i] = 1; float z = __shfl_xor_sync(0xffffffff, 1.f, 1);\ny[i] = z + s[i ^ 1];",
        *(1, "s", {"write", "read"}, {3, 4}),
    ),
    "two readers, then a writer among them": (
        "SHARED(float, s, 1); if (i == 0) s[0] = 1; __syncthreads();\nfloat z = s[0];\nif (i == 5) s[0] = z;",
        *(1, "s", {"write", "read"}, {4, 5}),
    ),
}


@pytest.mark.parametrize("schedule", emulator.SCHEDULES)
def test_planted_races(schedule, planted):
    for name, (_, _, array, kinds, lines) in PLANTED.items():
        found = [r for r in planted[schedule].races if r.kernel == name_of(name)]
        assert found, f"{name}: not found"
        assert {r.array.rsplit("__")[-1] for r in found} == {array}, name
        assert set().union(*(r.kinds for r in found)) == kinds, name
        base = 10 * list(PLANTED).index(name)
        assert set().union(*(r.lines for r in found)) == {base + n for n in lines}, name


SOUND = {
    "barrier": "SHARED(float, s, 64); s[i] = x[i]; __syncthreads(); y[i] = s[63 - i];",
    "warp barrier": "SHARED(float, s, 64); s[i] = x[i]; __syncwarp(); y[i] = s[i ^ 1];",
    "atomics": "atomicAdd(&y[0], x[i]);",
    "own element": "y[i] = x[i]; y[i] = y[i] + 1;",
    "all read": "y[i] = x[0] + x[1];",
}


def name_of(name):
    return "k_" + re.sub(r"\W", "_", name)


@pytest.fixture(scope="module")
def planted():
    """All of PLANTED, then all of SOUND, as one source: kernel n begins ten lines below kernel n - 1."""
    cases = {**{n: case[:2] for n, case in PLANTED.items()}, **{n: (text, 1) for n, text in SOUND.items()}}
    source, launches = "", []
    for n, (name, (text, blocks)) in enumerate(cases.items()):
        head = f"__global__ void {name_of(name)}(Global<const float> x, Global<float> y) {{\n    int i = threadIdx.x;\n"
        source += head + text + "\n}\n"
        source += "\n" * (10 * (n + 1) - source.count("\n"))
        arrays = {"x": torch.arange(64.0), f"{name_of(name)}__y": torch.zeros(64)}
        arrays["x"] = launches[0].arguments["x"] if launches else arrays["x"]
        launches.append(Launch(name_of(name), blocks, 64, arrays))
    return {s: emulator.launch(source, launches, schedule=s, seed=3) for s in emulator.SCHEDULES}


@pytest.mark.parametrize("name", SOUND)
def test_sound_kernels_raise_no_alarm(name, planted):
    for report in planted.values():
        assert not [str(x) for x in (*report.races, *report.problems) if x.kernel == name_of(name)]
    assert float(planted["in order"][name_of("atomics") + "__y"][0]) == 63 * 32
    assert planted["reversed"][name_of("barrier") + "__y"].tolist() == list(range(63, -1, -1))


def test_a_race_says_everything():
    report = run_one("SHARED(float, s, 64); s[i] = x[i];\ny[i] = s[63 - i];")
    assert str(report.races[0]) == (
        "race in shared array s, element 32: thread 31 reads (line 4), thread 32 writes (line 3), no barrier between"
    )
    assert report.problems[0].kind == "uninitialised" and "s[63]" in report.problems[0].message
    assert not report.ok and str(report).startswith("race in shared array s")


FAULTS = {  # kind -> (text, words of the message, line)
    "out of bounds": ("y[i + 1] = x[i];", "y[64]: the array has 64 elements", 3),
    "divergent barrier": ("if (i < 40)\n__syncthreads();", "40 of the 64 threads of the block: thread 40 has ended", 4),
    "step limit": ("while (x[0] == 0) {}", "endless loop", 3),
    "time limit": ("volatile int n = 1; while (n) {}", "endless loop", 0),
    "crash": ("float a[4]; for (int j = 0; j < 4; j++) a[j] = x[j];\ny[i] = a[i];", "a thread's own array", 3),
    "misaligned": ("y[i] = load<4>(x, i)[0];", "x[1]: an access to 4 elements at once", 3),
    "warp mask": ("__syncwarp(0xffff);", "__syncwarp needs the mask", 3),
    "exception": ("std::vector<int>().at(1);", "vector", 0),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_reported_not_suffered(kind):
    text, words, line = FAULTS[kind]
    report = run_one(text, limit=100_000, seconds=1)
    assert [p.kind for p in report.problems] == [kind], report
    assert words in report.problems[0].message and report.problems[0].line == line, report


def test_a_wild_pointer_ends_only_its_process():
    report = run_one("float* p = (float*)8; y[i] = *p;")
    assert report.problems[0].kind == "crash" and "memory" in report.problems[0].message


def test_barriers_in_two_branches_do_not_meet():
    report = run_one("if (i % 2)\n__syncthreads();\nelse\n__syncthreads();")
    assert "thread 1 waits at __syncthreads in line 4" in report.problems[0].message
    report = run_one("if (i > 40)\n__syncwarp();")
    assert "23 of the 32 lanes of a warp: thread 32 has ended" in report.problems[0].message


def test_a_launch_that_cuda_refuses():
    assert "1025 threads" in run_one("", block=1025).problems[0].message
    assert "0 blocks" in run_one("", grid=0).problems[0].message


def test_nothing_runs_after_a_fault():
    x, y = torch.zeros(4), torch.zeros(4)
    source = "__global__ void f(int n, Global<float> x) { x[n] = 1; }"
    launches = [Launch("f", 1, 1, {"n": 9, "x": x}), Launch("f", 1, 1, {"n": 0, "y": y})]
    report = emulator.launch(source, launches)
    assert len(report.problems) == 1 and float(report["y"].sum()) == 0


def test_compile_errors_point_to_the_readers_line():
    with pytest.raises(emulator.KernelError, match="line 3: float z = q;") as caught:
        run_one("float z = q;")
    assert caught.value.line == 3 and "q" in caught.value.message
    with pytest.raises(emulator.KernelError, match="line 4") as caught:
        run_one("\nauto z = x[i]; y[i] = z;")
    assert caught.value.line == 4
    with pytest.raises(emulator.KernelError, match="line 1: __global__.*\n *this brace is never closed"):
        run_one("if (i) {")
    with pytest.raises(emulator.KernelError, match="line 1: __global__.*\n *too few arguments"):
        emulator.launch("__global__ void f(int n, int m) {}", [Launch("f", 1, 1, {"n": 1})])
    with pytest.raises(emulator.KernelError, match="line 3: x\\[i\\] = 1"):
        run_one("x[i] = 1;")


def test_bad_arguments():
    with pytest.raises(ValueError, match="schedule = 'wild'"):
        run_one("", schedule="wild")
    f = "__global__ void f(Global<float> x) {}"
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        emulator.launch(f, [Launch("f", 1, 1, {"x": torch.zeros(1, dtype=torch.float64)})])
    with pytest.raises(ValueError, match="two different tensors are called x"):
        emulator.launch(f, [Launch("f", 1, 1, {"x": torch.zeros(1)}), Launch("f", 1, 1, {"x": torch.zeros(1)})])
    with pytest.raises(ValueError, match="argument n is a str"):
        emulator.launch(f, [Launch("f", 1, 1, {"n": "3"})])


WORDS = """
__global__ void warp_words(Global<float> y) {
    const int i = threadIdx.x;
    y[i] = __shfl_sync(0xffffffff, float(i), 3, 8);
    y[32 + i] = __shfl_up_sync(0xffffffff, float(i), 1);
    y[64 + i] = __shfl_down_sync(0xffffffff, float(i), 2, 16);
    float sum = i;
    for (int n = 16; n > 0; n /= 2) sum += __shfl_xor_sync(0xffffffff, sum, n);
    y[96 + i] = sum;
}
__global__ void convert(Global<const float> x, Global<__half> h, Global<__nv_bfloat16> b, Global<float> back) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    h[i] = from_float<__half>(x[i]);
    b[i] = from_float<__nv_bfloat16>(x[i]);
    back[2 * i] = to_float(h[i]);
    back[2 * i + 1] = to_float(b[i]);
}
__global__ void several(Global<const float> x, Global<float> y) {
    SHARED(float, s, 128);
    const int i = threadIdx.x;
    store(s, 4 * i, load<4>(x, 4 * i));
    __syncthreads();
    Pack<float, 2> pair = load<2>(s + 64, 2 * (31 - i));
    store(y, 2 * i, pair);
}
// D = C + A B: A (16, K) by rows, B (K, 8) by rows. The lane's part of each is copied from the PTX manual's figures.
__global__ void tf32(Global<const float> A, Global<const float> B, Global<const float> C, Global<float> D) {
    const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
    unsigned a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; i++) a[i] = to_tf32(A[(i % 2 ? group + 8 : group) * 8 + (i < 2 ? member : member + 4)]);
    for (int i = 0; i < 2; i++) b[i] = to_tf32(B[(i == 0 ? member : member + 4) * 8 + group]);
    for (int i = 0; i < 4; i++) d[i] = C[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)];
    mma_m16n8k8_tf32(d, a, b);
    for (int i = 0; i < 4; i++) D[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = d[i];
}
__global__ void bf16(Global<const float> A, Global<const float> B, Global<const float> C, Global<float> D) {
    const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
    unsigned a[4], b[2];
    float d[4], p[8], q[4];
    for (int i = 0; i < 8; i++) {
        const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
        p[i] = A[row * 16 + member * 2 + (i & 1) + (i < 4 ? 0 : 8)];
    }
    for (int i = 0; i < 4; i++) q[i] = B[(member * 2 + (i & 1) + (i < 2 ? 0 : 8)) * 8 + group];
    for (int i = 0; i < 4; i++) a[i] = pack_bf16(p[2 * i], p[2 * i + 1]);
    for (int i = 0; i < 2; i++) b[i] = pack_bf16(q[2 * i], q[2 * i + 1]);
    for (int i = 0; i < 4; i++) d[i] = C[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)];
    mma_m16n8k16_bf16(d, a, b);
    for (int i = 0; i < 4; i++) D[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = d[i];
}
"""


@pytest.fixture(scope="module")
def words():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**12,), generator=g, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(2**16).to(torch.int16).view(torch.float16).float()
    ties = (halves[:-1].double() + halves[1:].double()).mul(0.5).float()  # between neighbours
    x = torch.cat([bits.view(torch.float32), halves, ties, torch.tensor([0.0, -0.0, 65520.0, 65519.9, 1e-45, -1e-8])])
    x = torch.cat([x, x.new_zeros(-x.numel() % 256)])
    names = {"A8": (16, 8), "B8": (8, 8), "A16": (16, 16), "B16": (16, 8), "C": (16, 8)}
    m = {n: torch.randn(shape, generator=g) for n, shape in names.items()}
    n = x.numel()
    launches = [
        Launch("warp_words", 1, 32, {"warp": torch.zeros(128)}),
        Launch("convert", n // 256, 256, {"x": x, "h": x.half(), "b": x.bfloat16(), "back": torch.zeros(2 * n)}),
        Launch("several", 1, 32, {"s": torch.arange(128.0), "pairs": torch.zeros(64)}),
        Launch("tf32", 1, 32, {"A8": m["A8"], "B8": m["B8"], "C": m["C"], "D8": torch.zeros(16, 8)}),
        Launch("bf16", 1, 32, {"A16": m["A16"], "B16": m["B16"], "C": m["C"], "D16": torch.zeros(16, 8)}),
    ]
    launches[1].arguments["h"].zero_(), launches[1].arguments["b"].zero_()
    reports = [emulator.launch(WORDS, launches, checked=c, schedule="random") for c in (True, False)]
    assert reports[0].ok, reports[0]
    assert all(torch.equal(a.view(torch.uint8), reports[1][n].view(torch.uint8)) for n, a in reports[0].arrays.items())
    return reports[0], x, m


def test_shuffles(words):
    y = words[0]["warp"].view(4, 32).tolist()
    assert y[0] == [i // 8 * 8 + 3 for i in range(32)]
    assert y[1] == [max(i - 1, 0) for i in range(32)]
    assert y[2] == [i + 2 if i % 16 < 14 else i for i in range(32)]
    assert y[3] == [496.0] * 32


def test_half_precision_rounds_as_torch_does(words):
    report, x, _ = words
    number = ~torch.isnan(x)
    for name, dtype in (("h", torch.float16), ("b", torch.bfloat16)):
        assert torch.equal(report[name][number].view(torch.int16), x[number].to(dtype).view(torch.int16))
        assert torch.isnan(report[name][~number]).all()
    back = report["back"].view(-1, 2)[number]
    assert torch.equal(back[:, 0], x[number].half().float()) and torch.equal(back[:, 1], x[number].bfloat16().float())


def test_several_at_once(words):
    assert words[0]["pairs"].tolist() == [float(x) for i in range(32) for x in (126 - 2 * i, 127 - 2 * i)]
    assert words[0].counts["several"]["s"].reads == 128 + 64  # one name for a global and a shared array: both count


def test_matrix_products(words):
    report, _, m = words

    def tf32(x):  # 10 bits of fraction, ties away from zero
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp(torch.floor(mantissa.abs() * 2**11 + 0.5) * mantissa.sign(), exponent - 11)

    want = m["C"].double() + tf32(m["A8"]) @ tf32(m["B8"])
    assert float((report["D8"] - want).abs().max()) < 2e-6
    want = m["C"].double() + m["A16"].bfloat16().double() @ m["B16"].bfloat16().double()
    assert float((report["D16"] - want).abs().max()) < 2e-6


def test_pieces_cut_the_source_at_its_markers():
    source = emulated.read_source()
    pieces = emulated.pieces(source)
    assert "r_t[i] = to_float(r[now + i]);" in pieces["forward: one step"]
    assert "fmaf" in pieces["forward: read, then write the state"] and "forward: arguments" in pieces
    assert all(len(text.splitlines()) <= 30 for text in pieces.values())


def test_printf():
    report = run_one('if (i == 3) printf("thread %d of %d\\n", i, int(blockDim.x));')
    assert report.printed == "thread 3 of 64\n"

"""Kernels on the processor: every planted race, fault and typing error is found and named; the words do as on a GPU."""

import re
from pathlib import Path

import pytest
import torch

from rwkv_nb.wkv import emulator
from rwkv_nb.wkv.emulator import Launch

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))


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
    "two readers, the latter writes": (
        "SHARED(float, s, 1); if (i == 0) { s[0] = 1; float z = s[0]; } __syncthreads();\n"
        "if (i > 61 && s[0] > 0)\nif (i == 63) s[0] = 2;",
        *(1, "s", {"write", "read"}, {4, 5}),
    ),
    "two readers in two warps, the latter writes": (
        "SHARED(float, s, 1); if (i == 0) { s[0] = 1; float z = s[0]; } __syncthreads();\n"
        "if (i % 63 == 0 && s[0] > 0)\nif (i == 63) s[0] = 2;",
        *(1, "s", {"write", "read"}, {4, 5}),
    ),
    "another block has read": (
        "float z = y[i];\nif (blockIdx.x == 1) y[i] = z;",
        2,
        "y",
        {"write", "read"},
        {3, 4},
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


def test_a_race_says_everything(planted):
    report = planted["in order"]
    race = next(r for r in report.races if r.kernel == name_of("write and read"))
    assert str(race) == (
        "race in shared array s, element 32: thread 31 reads (line 4), thread 32 writes (line 3), no barrier between"
    )
    across = next(r for r in report.races if r.kernel == name_of("across blocks"))
    assert "thread 0 of block 0 writes (line 33), thread 0 of block 1 writes (line 33)" in str(across)
    assert report.problems[0].kind == "uninitialised" and "s[63]" in report.problems[0].message
    assert not report.ok and str(report).startswith("race in shared array s")


FAULTS = {  # kind -> (text, words of the message, line of the text; 0: unknown)
    "out of bounds": ("y[i + 1] = x[i];", "y[64]: the array has 64 elements", 1),
    "divergent barrier": ("if (i < 40)\n__syncthreads();", "40 of the 64 threads of the block: thread 40 has ended", 2),
    "divergent barrier, two": (
        "if (i % 2)\n__syncthreads();\nelse __syncthreads();",
        "thread 1 waits at __syncthreads",
        3,
    ),
    "divergent barrier, warp": ("if (i > 40)\n__syncwarp();", "23 of the 32 lanes of a warp: thread 32 has ended", 2),
    "step limit": ("while (x[0] == 0) {}", "endless loop", 1),
    "time limit": ("volatile int n = 1; while (n) {}", "endless loop", 0),
    "crash": ("float a[4]; for (int j = 0; j < 4; j++) a[j] = x[j];\ny[i] = a[i];", "a thread's own array", 1),
    "crash, pointer": ("float* p = (float*)8; y[i] = *p;", "memory", 0),
    "misaligned": ("y[i] = load<4>(x, i)[0];", "x[1]: an access to 4 elements at once", 1),
    "warp mask": ("__syncwarp(0xffff);", "__syncwarp needs the mask", 1),
    "exception": ("std::vector<int>().at(1);", "vector", 0),
    "none": ('if (i == 3) printf("thread %d of %d\\n", i, int(blockDim.x));', "", 0),
}


def run_fault(name, grid=1, block=64):
    """One case of FAULTS. All are in one source, so that it is compiled once; case n begins in line 10 (n + 1)."""
    source = "__global__ void f(int fault, Global<const float> x, Global<float> y) {\n    int i = threadIdx.x;"
    for n, (text, _, _) in enumerate(FAULTS.values()):
        source += "\n" * (10 * n + 8 - source.count("\n")) + f"if (fault == {n}) {{\n{text}\n}}"
    arguments = {"fault": list(FAULTS).index(name), "x": torch.arange(64.0), "y": torch.zeros(64)}
    return emulator.launch(source + "}", [Launch("f", grid, block, arguments)], limit=100_000, seconds=1)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "none"])
def test_faults_are_reported_not_suffered(name):
    _, words, line = FAULTS[name]
    report = run_fault(name)
    assert [p.kind for p in report.problems] == [name.split(",")[0]], report
    assert words in report.problems[0].message, report
    assert report.problems[0].line == (10 * (list(FAULTS).index(name) + 1) + line - 1 if line else 0)


def test_printf():
    report = run_fault("none")
    assert report.ok and report.printed == "thread 3 of 64\n"


def test_a_launch_that_cuda_refuses():
    assert "1025 threads" in run_fault("none", block=1025).problems[0].message
    assert "0 blocks" in run_fault("none", grid=0).problems[0].message


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
    with pytest.raises(emulator.KernelError, match="line 1: __global__.*\n *(too few arguments|no matching function)"):
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
        Launch("wkv5_words_shuffles", 1, 32, {"warp": torch.zeros(192)}),
        Launch(
            "wkv5_words_convert", n // 256, 256, {"x": x, "h": x.half(), "b": x.bfloat16(), "back": torch.zeros(2 * n)}
        ),
        Launch("wkv5_words_several", 1, 32, {"s": torch.arange(128.0), "pairs": torch.zeros(64)}),
        Launch("wkv5_words_tf32", 1, 32, {"A8": m["A8"], "B8": m["B8"], "C": m["C"], "D8": torch.zeros(16, 8)}),
        Launch("wkv5_words_bf16", 1, 32, {"A16": m["A16"], "B16": m["B16"], "C": m["C"], "D16": torch.zeros(16, 8)}),
    ]
    source = Path(__file__).with_name("emulator_words.cu").read_text()
    launches[1].arguments["h"].zero_(), launches[1].arguments["b"].zero_()
    reports = [emulator.launch(source, launches, checked=c, schedule="random") for c in (True, False)]
    assert reports[0].ok, reports[0]
    assert all(torch.equal(a.view(torch.uint8), reports[1][n].view(torch.uint8)) for n, a in reports[0].arrays.items())
    return reports[0], x, m


def test_shuffles(words):
    y = words[0]["warp"].view(6, 32).tolist()
    assert y[0] == [i // 8 * 8 + 3 for i in range(32)]
    assert y[1] == [max(i - 1, 0) for i in range(32)]
    assert y[2] == [i + 2 if i % 16 < 14 else i for i in range(32)]
    assert y[3] == [496.0] * 32
    assert y[4] == [1.0] * 32 and y[5] == [0.0] * 32, "of all lanes: all, and all but one"


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
    assert (
        words[0].counts["wkv5_words_several"]["s"].reads == 128 + 64
    )  # one name for a global and a shared array: both count


def test_matrix_products(words):
    report, _, m = words

    def tf32(x):  # 10 bits of fraction, ties away from zero
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp(torch.floor(mantissa.abs() * 2**11 + 0.5) * mantissa.sign(), exponent - 11)

    want = m["C"].double() + tf32(m["A8"]) @ tf32(m["B8"])
    assert float((report["D8"] - want).abs().max()) < 2e-6
    want = m["C"].double() + m["A16"].bfloat16().double() @ m["B16"].bfloat16().double()
    assert float((report["D16"] - want).abs().max()) < 2e-6

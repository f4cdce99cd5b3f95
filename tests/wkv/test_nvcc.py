"""nvcc takes the kernels for every architecture from sm_75 to sm_90, and a thread's numbers stay in registers.

No GPU is needed. The instances with the most numbers in registers (head size 128, float) stand for all; the full table
is printed by benchmarks/compile_report.py.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from rwkv_nb.wkv import build

NVCC = build.find_nvcc()
pytestmark = pytest.mark.skipif(
    NVCC is None, reason=f"the CUDA kernels were NOT compiled: no nvcc; {build.NVCC_REMEDY}"
)
KERNELS = {
    f"wkv5_{name}" for name in ("forward", "backward_r", "backward_k", "backward_v", "backward_w", "sum_over_batch")
}


def load_report():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "compile_report.py"
    spec = importlib.util.spec_from_file_location("compile_report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


report = load_report()
ARCHITECTURES = report.architectures(NVCC) if NVCC else ["sm_90"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch):
    uses = report.compile_for(NVCC, arch, ("-DWKV5_HEAD_SIZE=128", "-DWKV5_DTYPE=0"))
    assert {u.kernel for u in uses} == KERNELS and {u.arch for u in uses} == {arch}
    assert [u for u in uses if u.spills or u.stack] == []
    assert all(u.registers <= 255 and u.shared <= 48 * 1024 for u in uses)


def test_half_precision_compiles():
    uses = report.compile_for(NVCC, ARCHITECTURES[0], ("-DWKV5_HEAD_SIZE=64", "-DWKV5_DTYPE=2"))
    assert {u.kernel for u in uses} == KERNELS and not any(u.spills for u in uses)


@pytest.mark.parametrize(("arch", "size", "dtype"), [("sm_80", 64, 2), ("sm_90", 64, 2), ("sm_90", 128, 0)])
def test_the_fast_kernels_stay_in_registers_too(arch, size, dtype):
    """A whole state, and where gw is made its derivative, in registers; blocks enough beside each other at size 64."""
    if arch not in ARCHITECTURES:
        pytest.skip(f"this nvcc does not compile for {arch}")
    defines = (f"-DWKV5_HEAD_SIZE={size}", f"-DWKV5_DTYPE={dtype}", *report.all_kernels(arch))
    uses = report.compile_for(NVCC, arch, defines)
    assert {u.kernel for u in uses} == KERNELS | {"wkv5_values", "wkv5_keys"}
    fast = [u for u in uses if u.kernel in ("wkv5_values", "wkv5_keys")]
    assert len(fast) == 4 and not any(u.spills or u.stack for u in uses)
    if size == 64:
        assert sorted(65536 // (128 * u.registers) for u in fast) == [3, 4, 4, 4]
        assert all(4 * u.shared <= 100 * 1024 for u in fast)


def test_the_fast_kernels_are_left_out_where_there_are_no_tensor_cores_for_them():
    assert report.all_kernels("sm_75") == [] and report.all_kernels("sm_86") == ["-DWKV5_CHUNKED"]


def test_nvcc_understands_every_word():
    """The source that test_emulator.py runs on the processor."""
    path = Path(__file__).with_name("emulator_words.cu")
    uses = report.compile_for(NVCC, "sm_90", source=path)
    names = ("shuffles", "convert", "several", "tf32", "bf16")
    assert {u.kernel for u in uses} == {f"wkv5_words_{name}" for name in names}


def test_a_spill_is_seen():
    log = """ptxas info    : Compiling entry function '_Z12wkv5_forwardILi64EfEvliPKf' for 'sm_90'
    ptxas info    : Function properties for _Z12wkv5_forwardILi64EfEvliPKf
        8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem"""
    assert report.parse(log) == [report.Use("wkv5_forward", "sm_90", 168, 1024, 8, 16)]

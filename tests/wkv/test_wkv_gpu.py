"""The GPU benchmark runs from end to end, by emulation where there is no GPU, and calls a wrong kernel wrong."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_nb.wkv import cuda, emulated


def load_benchmark():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "wkv_gpu.py"
    spec = importlib.util.spec_from_file_location("wkv_gpu", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()
EMULATED = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "why_not", lambda: "torch sees no NVIDIA GPU; check `nvidia-smi` and the driver")
    assert benchmark.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "torch sees no NVIDIA GPU" in printed


@EMULATED
def test_all_steps_by_emulation(capsys):
    assert benchmark.main(["--emulate"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| right |") == 6 and "WRONG" not in printed
    assert printed.count("| plain |") == printed.count("| chunked |") == 1


@EMULATED
def test_a_wrong_kernel_is_called_wrong(capsys):
    def backward(*arguments, kernel):
        gr, gk, gv, gw, gu, gstate = emulated.backward(*arguments, kernel=kernel)
        return gr, gk, gv, gw * 1.01, gu, gstate

    module = SimpleNamespace(forward=emulated.forward, backward=backward)
    assert not benchmark.check(module, "cpu", [16], [5], ["plain"])
    assert capsys.readouterr().out.count("WRONG: ['gw']") == 3

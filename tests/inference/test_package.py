"""The package's switches, and float16 without overflow."""

import gc
import os
import subprocess
import sys
import types

import pytest
import torch

from rwkv_nb.inference import package
from rwkv_nb.inference.rescale import rescale
from rwkv_nb.inference.strategy import parse_strategy
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV

os.environ.setdefault("RWKV_JIT_ON", "0")
DEEP = ModelConfig(14, 64, 40)


@pytest.fixture
def imported(monkeypatch):
    """As if the package had been imported with both switches off."""
    model = types.ModuleType("rwkv.model")
    model.MyModule = torch.nn.Module
    monkeypatch.setitem(sys.modules, "rwkv.model", model)
    return model


def test_switches_that_come_too_late_are_named(imported, monkeypatch):
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    assert package.import_package() is imported
    monkeypatch.setenv("RWKV_JIT_ON", "1")
    with pytest.raises(ValueError, match="RWKV_JIT_ON = 1, but the `rwkv` package was imported with 0"):
        package.import_package()
    imported.MyModule = torch.jit.ScriptModule
    assert package.import_package() is imported
    monkeypatch.setenv("RWKV_CUDA_ON", "1")
    with pytest.raises(ValueError, match="RWKV_CUDA_ON = 1, but .* restart the kernel"):
        package.import_package()
    imported.cuda_wkv = None
    assert package.import_package() is imported
    monkeypatch.delenv("RWKV_JIT_ON")  # not asked for: whatever it was
    imported.MyModule = torch.nn.Module
    assert package.import_package() is imported


@pytest.mark.parametrize(
    ("lacks", "words"),
    [("gpu", "a CUDA GPU .*"), ("nvcc", "nvcc"), ("cxx", r"a C\+\+ compiler"), ("ninja", "ninja .pip install ninja.")],
)
def test_cuda_kernels_without_their_tools_are_refused_before_anything_is_compiled(lacks, words, monkeypatch):
    monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)
    monkeypatch.setenv("RWKV_CUDA_ON", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: lacks != "gpu")
    for name in ("nvcc", "cxx"):
        monkeypatch.setattr(package.build, f"find_{name}", lambda name=name: None if lacks == name else name)
    monkeypatch.setattr(package.shutil, "which", lambda name: None if lacks == name else name)
    with pytest.raises(ValueError, match=f"{words} is missing; install it, or set RWKV_CUDA_ON=0"):
        package.import_package()
    assert "rwkv.model" not in sys.modules


def deep_weights(config):
    g = torch.Generator().manual_seed(1)
    return {name: x + 0.1 * torch.randn(x.shape, generator=g) for name, x in init_weights(config, seed=0).items()}


def deep(growth):
    """A model whose residual stream grows by about `growth` with each block from the seventh on."""
    weights = deep_weights(DEEP)
    for name, x in weights.items():
        if name.endswith("ffn.value.weight") and int(name.split(".")[1]) >= 6:
            x *= growth
    return RWKV(DEEP, weights).eval().requires_grad_(False)


def test_rescaling_changes_nothing_but_the_range():
    idx = torch.arange(20)[None]
    plain, halved = deep(1.0).double(), rescale(deep(1.0).double())
    want, state = plain(idx)
    got, halved_state = halved(idx)
    assert float((want - got).abs().max()) < 1e-3 * float(want.abs().max())
    for a, b in zip(state, halved_state, strict=True):  # the blocks see norms: their states are the same
        assert float((a - b).abs().max()) < 1e-3 * max(1.0, float(a.abs().max()))
    stream = {}
    for name, model in (("plain", plain), ("halved", halved)):
        model.blocks[-1].register_forward_hook(lambda m, i, out, name=name: stream.update({name: out[0]}))
        model(idx)
    assert torch.allclose(stream["plain"] / 4, stream["halved"], atol=0.01)  # 14 blocks: halved twice


def test_what_overflows_float16_does_not_when_halved():
    idx = torch.arange(20)[None]
    grown = deep(1.1e4)
    want, _ = grown(idx)
    peak = {}
    grown.blocks[-1].register_forward_hook(lambda m, i, out: peak.update(x=float(out[0].abs().max())))
    grown(idx)
    assert 65504 < peak["x"] < 4 * 65504, "the test's model must overflow, but not when halved twice"
    assert not torch.isfinite(deep(1.1e4).half()(idx)[0]).all()
    got, _ = rescale(deep(1.1e4).half())(idx)
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def test_loading_is_silent_and_leaves_the_garbage_collector_as_it_was(tmp_path, capsys):
    config = ModelConfig(2, 64, 40)
    torch.save(deep_weights(config), tmp_path / "small.pth")
    frozen = gc.get_freeze_count()
    engine = package.PackageEngine(tmp_path / "small.pth", parse_strategy("cpu bf16 *1+", 2), config)
    assert capsys.readouterr().out == "" and gc.get_freeze_count() == frozen
    assert torch.isfinite(engine(torch.tensor([[1, 2, 3]]))[0]).all()
    (tmp_path / "small.pth").unlink()
    with pytest.raises(FileNotFoundError):
        package.PackageEngine(tmp_path / "small.pth", parse_strategy("cpu bf16", 2), config)
    assert gc.get_freeze_count() == frozen


def test_the_package_leaves_the_products_of_others_alone():
    """It switches tf32 on when it is imported."""
    code = (
        "import torch; from rwkv_nb.inference import package; package.import_package()\n"
        "print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["highest False"], done.stdout + done.stderr

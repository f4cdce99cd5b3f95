"""What needs a GPU: every precision, fsdp and DeepSpeed's stages give the losses and weights of one plain process.

Skipped, loudly, where there is no CUDA device; DeepSpeed's also where it is not installed. With one device nothing is
cut: that pieces are put together is tested here where there are two, and on processors in test_cut_models.py.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.training.checkpoint import init_checkpoint, load_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.trainer_state import TrainerState

WORKER, ACCELERATOR = Path(__file__).with_name("worker.py"), "gpu"
DEEPSPEED = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: these runs need one"),
]


@pytest.fixture
def flags(tmp_path):
    with MMapIndexedDatasetBuilder(tmp_path / "data") as builder:
        builder.add_item(np.random.default_rng(3).integers(1, 50, 1240).astype(np.uint16))
        builder.end_document()
    return {
        "data_file": str(tmp_path / "data"), "data_type": "binidx", "vocab_size": 4096, "ctx_len": 16, "devices": 1,
        "my_pile_stage": 3, "magic_prime": 71, "accelerator": ACCELERATOR, "strategy": "auto", "precision": "bf16",
        "micro_bsz": 4, "n_layer": 2, "n_embd": 64, "lr_init": 2e-3, "lr_final": 1e-4, "warmup_steps": 2,
        "weight_decay": 0.01, "random_seed": 5, "my_exit_tokens": 8 * 4 * 16,
    }  # fmt: skip


def trained(flags, folder, name, **more):
    """(losses, weights in the file, state) of a run of eight steps in a process of its own."""
    out = folder / name
    (out / "run").mkdir(parents=True)
    flags = {**flags, **more, "proj_dir": str(out / "run")}
    alone = {"my_pile_stage": 1, "devices": 1, "strategy": "auto", "accumulate_grad_batches": 1}
    init_checkpoint(TrainConfig(**{**flags, **alone}))
    settings = folder / f"{name}.json"
    settings.write_text(json.dumps({"flags": flags, "out": str(out)}), encoding="utf-8")
    done = subprocess.run([sys.executable, str(WORKER), str(settings)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    seen = json.loads((out / "rank-0.json").read_text(encoding="utf-8"))["losses"]
    [state] = (out / "run").glob("rwkv-0.*.state")
    return seen, load_checkpoint(out / "run" / "rwkv-final.pth"), TrainerState.load(state)


def off(folder, one, other):
    """How far two runs' float32 weights lie apart, over how far training has moved them."""
    begin = load_checkpoint(folder / "run" / "rwkv-init.pth")
    apart = sum(float((tensor - other.weights[name]).square().sum()) for name, tensor in one.weights.items())
    moved = sum(float((tensor - begin[name].float()).square().sum()) for name, tensor in one.weights.items())
    return (apart / moved) ** 0.5


@pytest.mark.parametrize(
    ("precision", "near", "dtype"),
    [("fp32", 1e-4, torch.float32), ("tf32", 2e-3, torch.float32), ("fp16", 5e-3, torch.float16),
     ("bf16", 1e-2, torch.bfloat16)],
)  # fmt: skip
def test_every_precision_trains_as_float32_does_on_a_processor(precision, near, dtype, flags, tmp_path):
    expected, _, _ = trained(flags, tmp_path, "processor", accelerator="cpu", precision="fp32")
    found, weights, state = trained(flags, tmp_path, "gpu", precision=precision)
    assert found == pytest.approx(expected, rel=near)
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert ("scale" in state.scaler) == (precision == "fp16")


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", *DEEPSPEED])
def test_a_strategy_gives_the_plain_run(strategy, flags, tmp_path):
    if strategy in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("NO DEEPSPEED: pip install deepspeed")
    plain, expected, whole = trained(flags, tmp_path, "auto")
    found, weights, state = trained(flags, tmp_path, strategy, strategy=strategy)
    assert found == pytest.approx(plain, rel=2e-2), "bfloat16 weights in DeepSpeed round differently"
    assert weights.keys() == expected.keys() and off(tmp_path / "auto", whole, state) < 0.5
    for name, tensor in expected.items():
        assert weights[name].shape == tensor.shape
        assert torch.equal(state.weights[name].to(weights[name].dtype), weights[name]), name
        assert state.optimizer[name]["step"] == whole.optimizer[name]["step"] == 8, name
        assert state.optimizer[name]["exp_avg_sq"].sum() > 0, name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="ONE GPU OR NONE: these runs need two")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", *DEEPSPEED])
def test_two_devices_give_the_run_of_ddp(strategy, flags, tmp_path):
    if strategy in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("NO DEEPSPEED: pip install deepspeed")
    collected = 1 if strategy == "fsdp_cpu_offload" else 2
    more = {"devices": 2, "micro_bsz": 2 // collected, "accumulate_grad_batches": collected, "weight_decay": 2.0,
            "precision": "fp32"}  # fmt: skip
    plain, _, whole = trained(flags, tmp_path, "ddp", strategy="ddp", **more)
    found, _, state = trained(flags, tmp_path, strategy, strategy=strategy, **more)
    assert found == pytest.approx(plain, rel=1e-3) and off(tmp_path / "ddp", whole, state) < 0.02

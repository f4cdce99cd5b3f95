"""fsdp and DeepSpeed's stages with two processes: the losses and weights of ddp (which test_two_processes.py tests).

On processors, where torch and DeepSpeed cut, send and put together as they do on GPUs: worker_without_gpu.py says what
differs. Tests on a GPU are in test_gpu.py. Weight decay is large, so that a parameter in the wrong group shows.
"""

import importlib.util
import json
import os
import shutil
import signal
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
from rwkv_nb.wkv import build

WORKER = Path(__file__).with_name("worker_without_gpu.py")
DEEPSPEED = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")]
CTX = 16
WAITS = 6 * 3600  # seconds for the first process to write its files
ANEW = {"my_pile_stage": 0, "my_exit": 0, "epoch_save": 1, "magic_prime": 0}  # with other weights than the others
ALIKE = {"warmup_steps": 0, "dropout": 0.0, "weight_decay": 0.0}
KINDS = {
    "plain": {"precision": "fp32", "my_exit_tokens": 8 * 4 * CTX},
    "collected": {"precision": "fp32", "accumulate_grad_batches": 2, "my_exit_tokens": 8 * 4 * CTX, "grad_cp": 1,
                  "val_split": 0.2, "val_every": 2, "magic_prime": 59},
    "bf16": {"precision": "bf16", "my_exit_tokens": 8 * 4 * CTX},
    "three": {"precision": "fp32", "my_exit_tokens": 8 * 6 * CTX},
    "beside": {"precision": "fp16", **ANEW, "epoch_steps": 4, "head_qk": 16, "vocab_size": 4096},
    "fp16": {"precision": "fp16", "my_exit_tokens": 16 * 4 * CTX},
    "fp16-2": {"precision": "fp16", "accumulate_grad_batches": 2, "my_exit_tokens": 32 * 4 * CTX},
    "both": {"precision": "bf16", "accumulate_grad_batches": 2, "my_exit_tokens": 8 * 4 * CTX},
    "one": {"precision": "bf16", **ALIKE, "my_exit_tokens": 2 * CTX},
    "many": {"precision": "bf16", **ALIKE, "my_exit_tokens": 64 * 2 * CTX, "accumulate_grad_batches": 64},
    "head": {"precision": "fp32", **ANEW, "epoch_steps": 8, "vocab_size": 4096},
    "mish": {"precision": "bf16", **ANEW, "epoch_steps": 8, "my_testing": "g"},
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with data and initial weights, and the flags of a run there."""
    folder = tmp_path_factory.mktemp("cut")
    with MMapIndexedDatasetBuilder(folder / "data") as builder:
        builder.add_item(np.random.default_rng(3).integers(1, 50, 1240).astype(np.uint16))
        builder.end_document()
    flags = {
        "data_file": str(folder / "data"), "data_type": "binidx", "vocab_size": 64, "ctx_len": CTX, "my_pile_stage": 3,
        "magic_prime": 71, "accelerator": "cpu", "devices": 2, "micro_bsz": 2, "n_layer": 2, "n_embd": 64,
        "lr_init": 2e-3, "lr_final": 1e-4, "warmup_steps": 2, "weight_decay": 2.0, "layerwise_lr": 1,
        "random_seed": 5, "dropout": 0.1,
    }  # fmt: skip
    alone = {**flags, "my_pile_stage": 1, "devices": 1, "proj_dir": str(folder / "begin")}
    init_checkpoint(TrainConfig(**alone))
    return folder, flags


def run(base, strategy, *runs):
    """Two processes train once for each (kind, name, more settings of worker.py): [(losses, val, weights, folder)]."""
    folder, flags = base
    if strategy in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("NO DEEPSPEED: pip install deepspeed")
    if strategy in DEEPSPEED and strategy.endswith("_offload") and build.find_cxx() is None:
        pytest.skip(f"NO C++ COMPILER for DeepSpeed's Adam: {build.CXX_REMEDY}")
    outs = [folder / f"{strategy}-{name}-{kind}" for kind, name, _ in runs]
    for out, (kind, _, more) in zip(outs, runs, strict=True):
        if not out.exists():
            shutil.copytree(folder / "begin", out / "run")
        settings = {"flags": {**flags, **KINDS[kind], "strategy": strategy, "proj_dir": str(out / "run")},
                    "out": str(out), **more}  # fmt: skip
        (out / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(WORKER), *(str(out / "settings.json") for out in outs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return [read(out) for out in outs]


def read(out):
    seen = json.loads((out / "rank-0.json").read_text(encoding="utf-8"))
    return seen["losses"], seen["val"], load_checkpoint(out / "run" / "rwkv-final.pth"), out / "run"


def seen_by(folder):
    """What worker_without_gpu.py watched in the first process."""
    return json.loads((folder.parent / "most.json").read_text(encoding="utf-8"))


def states(folder):
    return sorted(path.name for path in folder.glob("*.state"))


def close(one, other, rtol, atol):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name].float(), tensor.float(), rtol=rtol, atol=atol, msg=name)


@pytest.fixture(scope="module")
def ddp(base):
    kinds = ("plain", "collected", "bf16")
    return dict(zip(kinds, run(base, "ddp", *((kind, "whole", {}) for kind in kinds)), strict=True))


def stops_in(last):
    return {"signal": [0, last, int(signal.SIGTERM)]}


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", *DEEPSPEED])
def test_a_cut_model_trains_like_a_whole_one_and_goes_on_where_it_stopped(strategy, base, ddp):
    kinds = [kind for kind in ddp if (strategy, kind) != ("fsdp_cpu_offload", "collected")]  # refused, see rules.py
    *whole, stopped = run(base, strategy, *((kind, "whole", {}) for kind in kinds), ("bf16", "stopped", stops_in(3)))
    for (losses, val, weights, folder), kind in zip(whole, kinds, strict=True):
        expected, expected_val, expected_weights, _ = ddp[kind]
        assert losses == pytest.approx(expected, rel=5e-3 if kind == "bf16" else 2e-5), kind
        assert val == (expected_val and pytest.approx(expected_val, rel=1e-4)), kind
        close(expected_weights, weights, *((0.05, 1e-2) if kind == "bf16" else (1e-3, 1e-4)))
        assert states(folder) == ["rwkv-0.8.state"]
    goes_on_bit_for_bit(base, strategy, "bf16", stopped, whole[-1])


def goes_on_bit_for_bit(base, strategy, kind, stopped, whole):
    """A run that was asked to stop, started again, against the uninterrupted one; the state between."""
    first, _, _, folder = stopped
    done = len(first)
    assert states(folder) == [f"rwkv-0.{done}.state"] and first == whole[0][:done] != whole[0]
    state = TrainerState.load(folder / f"rwkv-0.{done}.state")
    [(second, _, weights, _)] = run(base, strategy, (kind, "stopped", {}))
    if strategy in ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"):
        # DeepSpeed's Adam for processors computes beta^n in another way when it begins
        assert second == pytest.approx(whole[0][done:], rel=2e-4)
        close(whole[2], weights, 0.02, 2e-3)
        return state
    assert second == whole[0][done:], "the resumed run is the uninterrupted one"
    for name, tensor in whole[2].items():
        assert torch.equal(weights[name], tensor), name
    return state


@pytest.mark.parametrize(
    ("first", "then"), [("deepspeed_stage_3", "ddp"), ("ddp", "fsdp"), ("fsdp", "deepspeed_stage_1")]
)
def test_a_run_may_change_its_strategy(first, then, base, ddp):
    folder = run(base, first, ("plain", f"to-{then}", stops_in(3)))[0][-1].parent
    state = TrainerState.load(folder / "run" / "rwkv-0.4.state")
    assert {entry["step"].item() for entry in state.optimizer.values()} == {4.0}
    folder.rename(base[0] / f"{then}-from-{first}-plain")
    [(losses, _, weights, _)] = run(base, then, ("plain", f"from-{first}", {}))
    assert losses == pytest.approx(ddp["plain"][0][4:], rel=2e-5)
    close(ddp["plain"][2], weights, 1e-3, 1e-4)


def test_stage_3_cuts_a_parameter_at_a_time(base):
    """No process has the model on its device: one parameter on its way, and half of all others."""
    [(*_, out)] = run(base, "deepspeed_stage_3", ("plain", "moved", {}))
    sizes = [tensor.numel() for tensor in load_checkpoint(out / "rwkv-final.pth").values()]
    assert seen_by(out) == {"whole": max(sizes), "kept": sum(size // 2 for size in sizes), "waits": WAITS}


def test_fsdp_gathers_a_block_at_a_time(base):
    """Embedding, head and block 0 stay for a step; of the others one, and the next one that is fetched meanwhile."""
    folder, flags = base
    begin = folder / "fsdp-deep-plain"
    deep = {**flags, "n_layer": 6}
    init_checkpoint(TrainConfig(**{**deep, "my_pile_stage": 1, "devices": 1, "proj_dir": str(begin / "run")}))
    [(*_, out)] = run((folder, deep), "fsdp", ("plain", "deep", {}))
    sizes = {name: tensor.numel() for name, tensor in load_checkpoint(out / "rwkv-final.pth").items()}
    blocks = [sum(n for name, n in sizes.items() if name.startswith(f"blocks.{i}.")) for i in range(6)]
    root = sum(sizes.values()) - sum(blocks[1:])
    most = seen_by(out)["whole"]
    assert seen_by(out)["waits"] == WAITS
    assert root + blocks[1] < most <= root + 2 * blocks[1] < sum(sizes.values()) * 0.6
    assert TrainerState.load(out / "rwkv-0.8.state").optimizer.keys() == sizes.keys()


@pytest.mark.parametrize(
    ("strategy", "scale", "kind", "last"),
    [("fsdp", "scale", "fp16", 11), ("deepspeed_stage_2", "cur_scale", "fp16", 11),
     ("deepspeed_stage_1", "cur_scale", "fp16-2", 23), ("deepspeed_stage_2", "cur_scale", "fp16-2", 23)],
)  # fmt: skip
def test_float16_finds_its_loss_scale_and_keeps_it(strategy, scale, kind, last, base):
    """All weights and gradients are float16 here: at first the gradient of emb.weight is too large, and steps are left
    out until the scale is small enough. Also with two batches a step, which are added up in float32."""
    whole, stopped = run(base, strategy, (kind, "whole", {}), (kind, "stopped", stops_in(last)))
    began = load_checkpoint(base[0] / "begin" / "rwkv-init.pth")
    assert all(torch.isfinite(tensor).all() for tensor in whole[2].values())
    assert not torch.equal(whole[2]["head.weight"].float(), began["head.weight"].half().float())
    state = goes_on_bit_for_bit(base, strategy, kind, stopped, whole)
    assert 1 <= state.scaler[scale] < 2**16


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_pieces_that_are_filled_up(strategy, base):
    """Three processes: no tensor can be divided by three, so that the last pieces have numbers of nobody."""
    folder, flags = base
    base = folder, {**flags, "devices": 3}
    whole, stopped = run(base, strategy, ("three", "whole", {}), ("three", "stopped", stops_in(3)))
    [(losses, _, weights, _)] = run(base, "ddp", ("three", "whole", {}))
    assert whole[0] == pytest.approx(losses, rel=2e-5)
    close(weights, whole[2], 1e-3, 1e-4)
    goes_on_bit_for_bit(base, strategy, "three", stopped, whole)


@pytest.mark.parametrize(("strategy", "devices"), [("fsdp", 1), *((each, 2) for each in ("fsdp", *DEEPSPEED))])
def test_many_batches_add_up_in_float32(strategy, devices, base):
    """64 equal batches make the step of one of them. In bfloat16 their sum would be 3 % off.

    Without clipping, which would hide a common factor, and without L2Wrap, which pulls once a batch.
    """
    folder, flags = base
    period = folder / "period"
    if not period.with_suffix(".idx").exists():
        with MMapIndexedDatasetBuilder(period) as builder:
            builder.add_item(np.tile(np.random.default_rng(3).integers(1, 50, CTX), 78)[:1240].astype(np.uint16))
            builder.end_document()
    base = folder, {**flags, "data_file": str(period), "devices": devices, "micro_bsz": 2 // devices}
    settings = {"l2wrap": 0.0, "clip": None}
    runs = run(base, strategy, *((kind, f"sum-of-{devices}", settings) for kind in ("one", "many")))
    one, many = (TrainerState.load(*out.glob("*.state")).optimizer for *_, out in runs)
    assert sum(entry["exp_avg"].abs().sum() for entry in one.values()) > 1
    for name, entry in one.items():
        torch.testing.assert_close(many[name]["exp_avg"], entry["exp_avg"], rtol=1e-5, atol=1e-8, msg=name)


def test_stage_1_that_collects_batches_goes_on(base):
    """In bfloat16 DeepSpeed takes another optimizer there."""
    whole, stopped = run(base, "deepspeed_stage_1", ("both", "whole", {}), ("both", "stopped", stops_in(2)))
    [(losses, _, weights, _)] = run(base, "ddp", ("both", "whole", {}))
    assert whole[0] == pytest.approx(losses, rel=5e-3)
    close(weights, whole[2], 0.05, 1e-2)
    goes_on_bit_for_bit(base, "deepspeed_stage_1", "both", stopped, whole)


@pytest.fixture(scope="module")
def variants(base):
    return run(base, "ddp", ("head", "variant", {}), ("mish", "variant", {}))


def test_processes_wait_while_the_first_one_writes(base):
    assert seen_by(run(base, "ddp", ("plain", "waits", {}))[0][-1]) == {"waits": WAITS}


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_the_sliced_head_and_mish_glu(strategy, base, variants):
    """4096 tokens: `head_loss` takes the head's weight by itself, but for stage 3, where it is not there."""
    found = run(base, strategy, ("head", "variant", {}), ("mish", "variant", {}))
    for kind, (losses, _, weights, _), (expected, _, whole, _) in zip(("head", "mish"), found, variants, strict=True):
        assert losses == pytest.approx(expected, rel=5e-3 if kind == "mish" else 2e-5), kind
        close(whole, weights, *((0.05, 1e-2) if kind == "mish" else (1e-3, 1e-4)))


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_the_state_beside_a_checkpoint_belongs_to_it(strategy, base):
    """Masks are in both; tokens that the data lacks keep zeros of either sign in emb.weight."""
    [(*_, folder)] = run(base, strategy, ("beside", "beside", {}))
    saved = load_checkpoint(folder / "rwkv-0.pth")
    assert "copy_mask" in saved and ((saved["emb.weight"] == 0) & saved["emb.weight"].signbit()).any()
    assert TrainerState.load(folder / "rwkv-0.state").belongs_to(saved)


def test_a_disk_that_fails_ends_every_process(base):
    folder, flags = base
    full = folder / "deepspeed_stage_3-full-plain"
    shutil.copytree(folder / "begin", full / "run")
    (full / "run" / "rwkv-0.8.state").mkdir()  # neither the state nor anything else can take this name
    with pytest.raises(AssertionError, match="rwkv-0.8.state"):
        run(base, "deepspeed_stage_3", ("plain", "full", {}))

"""What needs a GPU: every precision, fsdp and DeepSpeed's stages give the losses and weights of one plain process, and
a run that was stopped goes on as if nothing had been.

Skipped, loudly, where there is no CUDA device; DeepSpeed's also where it is not installed. Two processes are two GPUs,
where there are two. On one GPU they are two nodes that share it: NCCL refuses that to processes of one machine, so each
is told a host name of its own, and they talk over the loopback device, as machines without InfiniBand do.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.training.checkpoint import init_checkpoint, load_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.trainer_state import TrainerState

WORKER, ACCELERATOR = Path(__file__).with_name("worker.py"), "gpu"
DEEPSPEED = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")]
CUT = ["fsdp", "fsdp_cpu_offload", *DEEPSPEED]
TWO = [
    pytest.param({"devices": 2}, id="two GPUs", marks=pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="ONE GPU OR NONE: these runs need two"
    )),
    pytest.param({"num_nodes": 2}, id="two nodes on one GPU"),
]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: these runs need one"),
]


class Run(NamedTuple):
    losses: list[float]  # of each batch, the mean over all processes
    weights: dict[str, torch.Tensor]
    state: TrainerState


def write(prefix, tokens):
    with MMapIndexedDatasetBuilder(prefix) as builder:
        builder.add_item(tokens.astype(np.uint16))
        builder.end_document()
    return str(prefix)


@pytest.fixture
def flags(tmp_path):
    return {
        "data_file": write(tmp_path / "data", np.random.default_rng(3).integers(1, 50, 1240)), "data_type": "binidx",
        "vocab_size": 4096, "ctx_len": 16, "my_pile_stage": 3, "magic_prime": 71, "accelerator": ACCELERATOR,
        "strategy": "auto", "precision": "bf16", "micro_bsz": 4, "n_layer": 2, "n_embd": 64, "lr_init": 2e-3,
        "lr_final": 1e-4, "warmup_steps": 2, "weight_decay": 0.01, "random_seed": 5, "my_exit_tokens": 8 * 4 * 16,
    }  # fmt: skip


def needs(strategy):
    if strategy in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("NO DEEPSPEED: pip install deepspeed")


def trained(flags, folder, *runs, **more):
    """A process, or one for each node, trains once for each of `runs`, a name or (name, further settings of worker.py);
    a name that comes again goes on. [Run], or the Run if it is one."""
    files, flags = [], {**flags, **more}
    runs = [run if isinstance(run, tuple) else (run, {}) for run in runs]
    for number, (name, settings) in enumerate(runs):
        at = {**flags, **settings.get("flags", {}), "proj_dir": str(folder / name)}
        if not (folder / name).exists():
            alone = {"my_pile_stage": 1, "num_nodes": 1, "devices": 1, "strategy": "auto", "accumulate_grad_batches": 1}
            init_checkpoint(TrainConfig(**{**at, **alone}))
        files.append(folder / f"{number}-{name}.json")
        files[-1].write_text(json.dumps({**settings, "flags": at, "out": str(files[-1].with_suffix(""))}), "utf-8")
    in_processes(files, flags.get("num_nodes", 1))
    found = [read(path.with_suffix(""), folder / name) for path, (name, _) in zip(files, runs, strict=True)]
    return found if len(found) > 1 else found[0]


def in_processes(files, nodes):
    """worker.py for these settings, started once a node; if one fails, all end."""
    folder = files[0].parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment["OMP_NUM_THREADS"] = "1"
    processes, errors = [], [folder / f"{files[0].stem}-node-{node}.txt" for node in range(nodes)]
    for node, error in enumerate(errors):
        cluster = {"NODE_RANK": str(node), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                   "NCCL_HOSTID": f"node {node}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}  # fmt: skip
        with error.open("w", encoding="utf-8") as stderr:
            processes.append(subprocess.Popen(
                [sys.executable, str(WORKER), *map(str, files)], stdout=subprocess.DEVNULL, stderr=stderr,
                env=environment | (cluster if nodes > 1 else {}),
            ))  # fmt: skip
    end = time.monotonic() + 300
    while None in (codes := [process.poll() for process in processes]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    assert codes == [0] * nodes, "\n\n".join(error.read_text(encoding="utf-8")[-6000:] for error in errors)


def read(out, folder):
    ranks = [json.loads(path.read_text(encoding="utf-8"))["losses"] for path in sorted(out.glob("rank-*.json"))]
    last = max(folder.glob("rwkv-0.*.state"), key=lambda path: int(path.name.split(".")[1]))
    return Run(np.mean(ranks, axis=0).tolist(), load_checkpoint(folder / "rwkv-final.pth"), TrainerState.load(last))


def off(folder, one, other):
    """How far two runs' float32 weights lie apart, over how far training has moved them."""
    begin = load_checkpoint(folder / "rwkv-init.pth")
    apart = sum(float((tensor - other.weights[name]).square().sum()) for name, tensor in one.weights.items())
    moved = sum(float((tensor - begin[name].float()).square().sum()) for name, tensor in one.weights.items())
    return (apart / moved) ** 0.5


@pytest.mark.parametrize(
    ("precision", "near", "dtype"),
    [("fp32", 1e-4, torch.float32), ("tf32", 2e-3, torch.float32), ("fp16", 5e-3, torch.float16),
     ("bf16", 1e-2, torch.bfloat16)],
)  # fmt: skip
def test_every_precision_trains_as_float32_does_on_a_processor(precision, near, dtype, flags, tmp_path):
    expected = trained(flags, tmp_path, "processor", accelerator="cpu", precision="fp32")
    found = trained(flags, tmp_path, "gpu", precision=precision)
    assert found.losses == pytest.approx(expected.losses, rel=near)
    assert {tensor.dtype for tensor in found.weights.values()} == {dtype}
    assert ("scale" in found.state.scaler) == (precision == "fp16")


def test_compiled_blocks_train_as_the_others(flags, tmp_path):
    plain, found = trained(flags, tmp_path, "plain", ("compiled", {"flags": {"compile": 1}}), precision="fp32")
    assert found.losses == pytest.approx(plain.losses, rel=1e-4)
    assert off(tmp_path / "plain", plain.state, found.state) < 0.02


@pytest.mark.parametrize("strategy", CUT)
def test_a_strategy_gives_the_plain_run(strategy, flags, tmp_path):
    needs(strategy)
    plain = trained(flags, tmp_path, "auto")
    found = trained(flags, tmp_path, strategy, strategy=strategy)
    assert found.losses == pytest.approx(plain.losses, rel=2e-2), "bfloat16 weights in DeepSpeed round differently"
    assert found.weights.keys() == plain.weights.keys()
    assert off(tmp_path / "auto", plain.state, found.state) < 0.5
    for name, tensor in plain.weights.items():
        assert found.weights[name].shape == tensor.shape
        assert torch.equal(found.state.weights[name].to(found.weights[name].dtype), found.weights[name]), name
        assert found.state.optimizer[name]["step"] == plain.state.optimizer[name]["step"] == 8, name
        assert found.state.optimizer[name]["exp_avg_sq"].sum() > 0, name


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_many_batches_add_up_in_float32(strategy, flags, tmp_path):
    """64 equal batches make the step of one; without clipping, which would hide a common factor, and L2Wrap."""
    needs(strategy)
    tokens = np.tile(np.random.default_rng(3).integers(1, 50, 16), 78)[:1240]
    flags |= {"data_file": write(tmp_path / "period", tokens), "micro_bsz": 2, "warmup_steps": 0, "weight_decay": 0.0}
    told = {"l2wrap": 0.0, "clip": None}
    one, many = trained(
        flags, tmp_path, ("one", {**told, "flags": {"my_exit_tokens": 2 * 16}}),
        ("many", {**told, "flags": {"my_exit_tokens": 64 * 2 * 16, "accumulate_grad_batches": 64}}), strategy=strategy,
    )  # fmt: skip
    assert sum(entry["exp_avg"].abs().sum() for entry in one.state.optimizer.values()) > 1
    for name, entry in one.state.optimizer.items():
        torch.testing.assert_close(many.state.optimizer[name]["exp_avg"], entry["exp_avg"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("auto", {}), ("auto", {"precision": "fp16"}), ("fsdp", {}), ("deepspeed_stage_2", {}), ("deepspeed_stage_3", {}),
     ("ddp", {"num_nodes": 2}), ("fsdp", {"num_nodes": 2}), ("deepspeed_stage_3", {"num_nodes": 2})],
)  # fmt: skip
def test_a_stopped_run_goes_on_bit_for_bit(strategy, more, flags, tmp_path):
    needs(strategy)
    flags |= {"strategy": strategy, "dropout": 0.1, "micro_bsz": 4 // more.get("num_nodes", 1)} | more
    stop = {"signal": [0, 3, int(signal.SIGTERM)]}
    whole, first, then = trained(flags, tmp_path, "whole", ("stopped", stop), "stopped")
    assert len(first.losses) == 4 and first.losses + then.losses == whole.losses
    assert all(torch.equal(then.weights[name], tensor) for name, tensor in whole.weights.items())


@pytest.mark.parametrize("two", TWO)
def test_two_processes_give_the_run_of_one_with_twice_the_batch(two, flags, tmp_path):
    plain = trained(flags, tmp_path, "one", precision="fp32")
    found = trained(flags, tmp_path, "two", precision="fp32", strategy="ddp", micro_bsz=2, **two)
    assert found.losses == pytest.approx(plain.losses, rel=1e-4)
    assert off(tmp_path / "one", plain.state, found.state) < 0.01


@pytest.mark.parametrize("two", TWO)
@pytest.mark.parametrize("strategy", CUT)
def test_a_cut_model_gives_the_run_of_ddp(strategy, two, flags, tmp_path):
    needs(strategy)
    collected = 1 if strategy == "fsdp_cpu_offload" else 2
    more = {"micro_bsz": 2 // collected, "accumulate_grad_batches": collected, "weight_decay": 2.0,
            "precision": "fp32", **two}  # fmt: skip
    plain = trained(flags, tmp_path, "ddp", strategy="ddp", **more)
    found = trained(flags, tmp_path, strategy, strategy=strategy, **more)
    assert found.losses == pytest.approx(plain.losses, rel=1e-3)
    assert off(tmp_path / "ddp", plain.state, found.state) < 0.02

"""Two processes on the CPU (gloo): samples, losses and weights of one process with twice the batch, one set of files,
and one end for all, whatever ends the run.

Starting a pair of processes costs seconds, so that each test starts one pair and asserts several things.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.training.agreement import beginning, check_same
from rwkv_nb.training.checkpoint import init_checkpoint, load_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.resume import find_start
from rwkv_nb.training.trainer import train
from rwkv_nb.training.validation import Validation

WORKER = Path(__file__).with_name("worker.py")
CTX, PRIME, N_TOKENS = 16, 71, 1240  # 77 slots, 7 of them held out where val_split says so
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
)


@pytest.fixture
def flags(tmp_path):
    tokens = np.random.default_rng(3).integers(1, 50, N_TOKENS).astype(np.uint16)
    with MMapIndexedDatasetBuilder(tmp_path / "data") as builder:
        builder.add_item(tokens)
        builder.end_document()
    made = {
        "proj_dir": str(tmp_path / "run"), "data_file": str(tmp_path / "data"), "data_type": "binidx",
        "vocab_size": 64, "ctx_len": CTX, "my_pile_stage": 3, "magic_prime": PRIME, "accelerator": "cpu",
        "precision": "fp32", "strategy": "ddp", "devices": 2, "micro_bsz": 2, "n_layer": 2, "n_embd": 64,
        "lr_init": 2e-3, "lr_final": 1e-4, "warmup_steps": 2, "weight_decay": 0.01, "random_seed": 5, "epoch_save": 1,
    }  # fmt: skip
    init_checkpoint(TrainConfig(**{**made, "my_pile_stage": 1, "devices": 1, "strategy": "auto"}))
    for name in ("alone", "timed", "asked"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    return made


def start(command, settings, folder, **more):
    """The process with its output in a pipe; `settings`: one dictionary for each training."""
    files = []
    for number, one in enumerate(settings):
        files.append(folder / f"settings-{number}.json")
        files[-1].write_text(json.dumps(one), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [sys.executable, *command, str(WORKER), *map(str, files)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, **more,
    )  # fmt: skip


def end(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def seen(folder):
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def gone(folder):
    """Whether both processes have ended (a moment is allowed for the second)."""
    pids = [int((folder / f"pid-{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    for _ in range(300):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():  # a child that has ended and that nobody has waited for is not alive
        return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return not Path("/proc").is_dir()


def official_start(rank, idx):
    """A window's place in the official words: with ii = 1 + idx * world_size + rank, f * ii^3 mod p."""
    factor = int(PRIME * (math.sqrt(5) - 1) / 2)
    return pow(1 + idx * 2 + rank, 3, PRIME) * factor % PRIME * CTX


def official_batches(rank, n):
    tokens = np.random.default_rng(3).integers(1, 50, N_TOKENS)
    places = [[official_start(rank, 2 * step + i) for i in (0, 1)] for step in range(n)]
    return [[tokens[place : place + CTX].tolist() for place in pair] for pair in places]


def equal_files(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def log_numbers(folder):
    log = Path(folder, "train_log.txt").read_text(encoding="utf-8")
    return log.count("NEW RUN"), re.findall(r"^(\d+) (\d+\.\d+) \S+ (\d\.\d+) \S+ \S+ (\d+)(.*)$", log, re.MULTILINE)


@pytest.mark.slow
def test_lightnings_launcher_equals_one_process_with_twice_the_batch(flags, tmp_path):
    """Eight steps, the end by my_exit_tokens, with a validation loss."""
    flags |= {"my_exit_tokens": 8 * 4 * CTX, "val_split": 0.07, "val_every": 3}
    flags["magic_prime"] = PRIME
    process = start([], [{"flags": flags, "out": str(tmp_path)}], tmp_path)
    alone = {**flags, "devices": 1, "strategy": "auto", "micro_bsz": 4, "proj_dir": str(tmp_path / "alone")}
    losses = Losses()
    train(TrainConfig(**alone), callbacks=[losses], progress=False)
    code, out, err = end(process)
    assert code == 0, err
    ranks = seen(tmp_path)
    for rank, record in enumerate(ranks):
        assert record["batches"] == official_batches(rank, 8), "the official division of the samples"
        assert record["world_size"] == 2 and record["steps"] == list(range(1, 9))
        assert record["seed"] == 5 + rank, "what dropout draws"
    mean = [(a + b) / 2 for a, b in zip(*(record["losses"] for record in ranks), strict=True)]
    assert mean == pytest.approx(losses.seen, rel=1e-5)
    assert ranks[0]["rates"] == ranks[1]["rates"] == pytest.approx(losses.rates)
    both, one = (Path(folder) for folder in (flags["proj_dir"], alone["proj_dir"]))
    equal_files(load_checkpoint(one / "rwkv-final.pth"), load_checkpoint(both / "rwkv-final.pth"))
    assert {p.name for p in both.glob("*.pth")} == {p.name for p in one.glob("*.pth")}
    (runs, lines), (_, expected) = log_numbers(both), log_numbers(one)
    assert runs == 1 and len(lines) == len(expected) == 1 and lines[0][0] == lines[0][3] == "0"
    assert float(lines[0][1]) == pytest.approx(float(expected[0][1]), abs=1e-5)
    assert float(lines[0][4]) == pytest.approx(float(expected[0][4]), abs=1e-5), "the held-out loss"
    assert ranks[0]["val"] == ranks[1]["val"] == pytest.approx(float(lines[0][4]), abs=1e-6)
    assert out.count("one mini-epoch =") == 1 and "2 ranks" in out and "held out:" in out, out
    assert gone(tmp_path)


class Losses(Validation):
    """A callback that only remembers."""

    def __init__(self):
        self.seen, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(pl_module.last_loss))
        self.rates.append(pl_module.last_lr)

    def on_train_epoch_end(self, trainer, pl_module):
        pass


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM to hear on Windows")
def test_torchrun_accumulates_stops_by_time_or_signal_and_resumes(flags, tmp_path):
    """Processes that something else has started, as on a cluster; four runs one after the other."""
    flags |= {"accumulate_grad_batches": 2, "micro_bsz": 1}
    whole = {**flags, "my_exit_tokens": 6 * 4 * CTX, "save_steps": 3}
    timed, asked = {**flags, "proj_dir": str(tmp_path / "timed")}, {**whole, "proj_dir": str(tmp_path / "asked")}
    process = start(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
        [{"flags": whole, "out": str(tmp_path)},
         {"flags": timed, "out": str(tmp_path / "timed"), "max_seconds": 0.2, "slow": 0.02},
         {"flags": asked, "out": str(tmp_path / "asked"), "signal": [1, 5, int(signal.SIGTERM)], "slow": 0.01},
         {"flags": asked, "out": str(tmp_path / "again")}],
        tmp_path,
    )  # fmt: skip
    alone = {**whole, "devices": 1, "strategy": "auto", "micro_bsz": 4, "accumulate_grad_batches": 1,
             "proj_dir": str(tmp_path / "alone")}  # fmt: skip
    losses = Losses()
    train(TrainConfig(**alone), callbacks=[losses], progress=False)
    code, _, err = end(process)
    assert code == 0, err
    ranks = seen(tmp_path)
    a_batch = [(a + b) / 2 for a, b in zip(*(record["losses"] for record in ranks), strict=True)]
    a_step = [(a_batch[2 * i] + a_batch[2 * i + 1]) / 2 for i in range(6)]
    assert ranks[0]["steps"] == [n // 2 for n in range(1, 13)]
    assert a_step == pytest.approx(losses.seen, rel=2e-3), "but for L2Wrap, which is not divided by the two batches"
    timed_ranks = seen(tmp_path / "timed")
    assert timed_ranks[0]["steps"] == timed_ranks[1]["steps"] and len(timed_ranks[0]["steps"]) >= 2
    assert len(timed_ranks[0]["losses"]) % 2 == 0, "no step is cut in two"
    assert {p.name for p in (tmp_path / "timed").glob("*.pth")} == {"rwkv-init.pth", "rwkv-final.pth"}
    assert log_numbers(tmp_path / "timed")[0] == 1
    told = seen(tmp_path / "asked")
    assert told[0]["steps"] == told[1]["steps"] == [0, 1, 1, 2, 2, 3], "the signal came to the second process alone"
    again = seen(tmp_path / "again")
    for rank in (0, 1):
        assert again[rank]["steps"] == [3, 4, 4, 5, 5, 6] and told[rank]["batches"] == ranks[rank]["batches"][:6]
        assert again[rank]["batches"] == ranks[rank]["batches"][6:]
        assert again[rank]["losses"] == ranks[rank]["losses"][6:], "both go on as if nothing had been"
    final, resumed = (load_checkpoint(tmp_path / name / "rwkv-final.pth") for name in ("run", "asked"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in final.items())
    assert gone(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups on Windows")
def test_ctrl_c_reaches_both_and_stops_them_cleanly(flags, tmp_path):
    settings = {"flags": flags, "out": str(tmp_path), "slow": 0.05}
    process = start([], [settings], tmp_path, start_new_session=True)
    for _ in range(600):
        if (tmp_path / "pid-1").exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    code, _, err = end(process)
    assert code == 0, err
    ranks = seen(tmp_path)
    assert ranks[0]["steps"] == ranks[1]["steps"] and "Traceback" not in err
    final = load_checkpoint(Path(flags["proj_dir"]) / "rwkv-final.pth")
    assert final["emb.weight"].shape == (64, 64) and gone(tmp_path)


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_message(flags, tmp_path):
    began = time.monotonic()
    code, _, err = end(start([], [{"flags": flags, "out": str(tmp_path), "fail": [1, 2]}], tmp_path))
    assert code != 0 and "a fault of process 1, made for the test" in err
    assert time.monotonic() - began < 60 and gone(tmp_path)
    assert not (Path(flags["proj_dir"]) / "rwkv-final.pth").exists()


@pytest.mark.slow
def test_processes_that_begin_with_different_files_say_so(flags, tmp_path):
    """As when proj_dir is not shared, or a disk failed one of them; Adam would go on from two different pasts."""
    one = {**flags, "devices": 1, "strategy": "auto", "my_exit_tokens": 4 * 2 * CTX}
    train(TrainConfig(**one), progress=False)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    other = {"proj_dir": str(tmp_path / "alone"), "lr_init": 1e-3}
    both = {**flags, "load_model": str(tmp_path / "run" / "rwkv-init.pth"), "my_exit_tokens": 4 * 4 * CTX}
    settings = {"flags": both, "out": str(tmp_path)}
    code, _, err = end(start(torchrun, [{**settings, "other": {**other, "load_model": ""}}], tmp_path))
    said = re.findall(r"ValueError: (the processes do not begin .*)", err)
    assert code != 0 and len(said) == 2 == len(set(said)) + 1, err
    assert "--lr_init: 0.002, in process 1 0.001" in said[0] and "disk that they share" in said[0]
    assert "proj_dir:" not in said[0] and "load_model:" not in said[0]
    assert log_numbers(flags["proj_dir"])[0] == 1 and not (tmp_path / "pid-0").exists(), "before anything is done"


def test_what_a_run_begins_with(flags):
    cfg = TrainConfig(**{**flags, "devices": 1, "strategy": "auto", "my_exit_tokens": 4 * 2 * CTX})
    model = train(cfg, progress=False)
    start = find_start(cfg, N_TOKENS)
    found = beginning(start.cfg, start, N_TOKENS)
    assert found["file to begin with"] == "rwkv-0.4.state" and found["mini-epoch and batch"] == (0, 4)
    assert found["optimizer step"] == 4 and found["tokens in the data"] == N_TOKENS and found["--magic_prime"] == PRIME
    start.weights["ln_out.weight"][7] += 1e-6
    assert beginning(start.cfg, start, N_TOKENS) != found, "a state of the same place, but of another run"
    check_same(found)  # one process alone
    assert "file to begin with" not in beginning(cfg, None, N_TOKENS) and model.config.n_embd == 64


def test_several_devices_need_a_program(flags, monkeypatch):
    """In a notebook, which cannot be started once more for the second device."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"devices=2, num_nodes=1: .*python -m rwkv_nb train.*`!`"):
        train(TrainConfig(**flags), progress=False)
    assert os.listdir(flags["proj_dir"]) == ["rwkv-init.pth"]


def test_a_dataset_for_another_rank_is_refused(flags):
    alone = TrainConfig(**{**flags, "devices": 1, "strategy": "auto"})
    data = TokenDataset(DataConfig.from_flags(alone), rank=1, world_size=2)
    with pytest.raises(ValueError, match=r"\(rank, world_size\) = \(1, 2\), but this process is \(0, 1\)"):
        train(alone, dataset=data, progress=False)


def test_a_model_in_pieces_comes_back_whole(flags, monkeypatch):
    """As with fsdp, where what is left in this process is of no use; pretended here, since it needs GPUs."""
    monkeypatch.setattr("rwkv_nb.training.trainer.leaves_no_model", lambda strategy: True)
    more = {"devices": 1, "strategy": "auto", "precision": "bf16", "my_exit_tokens": 4 * 2 * CTX}
    alone = TrainConfig(**{**flags, **more})
    trained = train(alone, progress=False)
    final = load_checkpoint(Path(alone.proj_dir) / "rwkv-final.pth")
    assert all(torch.equal(tensor, final[name].float()) for name, tensor in trained.state_dict().items())
    assert not trained.training and trained.state_dict().keys() == final.keys()


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3_offload"])
def test_what_needs_a_gpu_says_so(flags, strategy):
    with pytest.raises(ValueError, match=f"strategy='{strategy}'.*GPU.*ddp"):
        train(TrainConfig(**{**flags, "strategy": strategy}), progress=False)
    assert not Path(flags["proj_dir"], "train_log.txt").exists()

"""Data held out: never read by training, measured rightly; the masked loss of my_qa_mask, written out a second time."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.data.held_out import n_held_out, n_training
from rwkv_nb.data.magic_prime import magic_prime
from rwkv_nb.model import loss as loss_module
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training import machine
from rwkv_nb.training.checkpoint import init_checkpoint
from rwkv_nb.training.cli import check
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.runbook import RunBook
from rwkv_nb.training.trainer import train
from rwkv_nb.training.validation import Validation

pytestmark = pytest.mark.usefixtures("one_thread")

CTX = 8


def write(prefix, tokens):
    with MMapIndexedDatasetBuilder(prefix) as builder:
        builder.add_item(np.asarray(tokens, dtype=np.uint16))
        builder.end_document()
    return str(prefix)


@pytest.fixture
def flags(tmp_path):
    """810 tokens, 101 windows of 8: the training part holds ids below 20, the last ten windows ids from 20 on."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.integers(1, 20, 91 * CTX), rng.integers(20, 32, 82)])
    return {
        "proj_dir": str(tmp_path / "run"), "data_file": write(tmp_path / "data", tokens), "data_type": "binidx",
        "vocab_size": 32, "ctx_len": CTX, "accelerator": "cpu", "precision": "fp32", "micro_bsz": 3, "n_layer": 1,
        "n_embd": 64, "random_seed": 1, "epoch_steps": 4, "epoch_count": 2, "lr_init": 1e-3, "lr_final": 1e-3,
        "val_split": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 3, 4])
def test_training_reads_nothing_of_what_is_held_out(flags, stage):
    prime = magic_prime(91 * CTX, CTX) if stage == 3 else 0
    more = {"my_pile_stage": stage, "magic_prime": prime, "micro_bsz": 7, "epoch_steps": 60}
    data = TokenDataset(DataConfig.from_flags(TrainConfig(**{**flags, **more})))
    assert data.n_tokens == 91 * CTX and data.held_out.n_tokens == 82
    windows = [torch.cat(data[i]) for i in range(400)]
    assert max(int(window.max()) for window in windows) < 20
    if stage == 3:
        assert len({tuple(window.tolist()) for window in windows[:prime]}) == prime
    assert int(data.held_out.window(0, 82).min()) >= 20
    assert "held out: the last 82 tokens, 10 windows" in data.describe()


@pytest.mark.parametrize("n_tokens", [16, 17, 24, 25, 809, 810, 1000, 65537])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
def test_the_cut_leaves_whole_windows_on_both_sides(n_tokens, fraction):
    if (n_tokens - 1) // CTX < 2:
        with pytest.raises(ValueError, match="val_split.*more data"):
            n_training(n_tokens, CTX, fraction)
        return
    cut, windows = n_training(n_tokens, CTX, fraction), n_held_out(n_tokens, CTX, fraction)
    assert cut % CTX == 0 and cut > 0
    assert cut + windows * CTX + 1 <= n_tokens < cut + (windows + 1) * CTX + 1
    assert windows == max(1, int(fraction * (n_tokens // CTX)))


def test_a_prime_that_reaches_into_it_is_refused_with_the_right_one(flags):
    whole = magic_prime(810, CTX)
    cfg = TrainConfig(**{**flags, "my_pile_stage": 3, "magic_prime": whole, "epoch_steps": 60, "val_split": 0.2})
    right = magic_prime(81 * CTX, CTX)
    assert right < whole
    with pytest.raises(ValueError, match=rf"magic_prime.* {whole}.*--magic_prime {right}.*val_split 0.2 leaves 648"):
        TokenDataset(DataConfig.from_flags(cfg))


class Watch(pl.Callback):
    def __init__(self):
        self.models, self.batches, self.losses, self.random = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.models.append({k: v.clone() for k, v in pl_module.model.state_dict().items()})
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(pl_module.last_loss))
        self.random.append(torch.get_rng_state().sum().item())


def held_out_loss(cfg, weights):
    """Mean over all windows, one at a time, with a softmax written out in float64."""
    model = RWKV(cfg.model_config(), {k: v.double() for k, v in weights.items()}).eval()
    tokens = np.fromfile(cfg.data_file + ".bin", dtype=np.uint16)[91 * CTX :].astype(np.int64)
    total = 0.0
    for i in range(10):
        x, y = (torch.from_numpy(tokens[i * CTX + shift :][:CTX]) for shift in (0, 1))
        with torch.no_grad():
            p = torch.softmax(model(x[None])[0][0], dim=-1)
        total -= sum(math.log(p[t, y[t]]) for t in range(CTX))
    return total / (10 * CTX)


def test_the_loss_in_the_log_is_that_of_the_held_out_windows(flags):
    flags |= {"val_every": 3, "my_exit": 1, "dropout": 0.1}
    cfg = TrainConfig(**flags)
    watch, plain = Watch(), Watch()
    model = train(cfg, callbacks=[watch], progress=False)
    lines = Path(cfg.proj_dir, "train_log.txt").read_text(encoding="utf-8").splitlines()[2:]
    logged = [float(re.fullmatch(r"\d \S+ \S+ \S+ \S+ \S+ \d (\d+\.\d{6})", line)[1]) for line in lines]
    expected = [held_out_loss(cfg, watch.models[4]), held_out_loss(cfg, model.state_dict())]
    assert logged == pytest.approx(expected, abs=2e-5)
    del flags["val_split"], flags["val_every"]
    tokens = np.fromfile(cfg.data_file + ".bin", dtype=np.uint16)[: 91 * CTX]
    again = {**flags, "data_file": write(Path(cfg.proj_dir) / "part", tokens), "proj_dir": cfg.proj_dir + "2"}
    train(TrainConfig(**again), callbacks=[plain], progress=False)
    assert plain.losses == watch.losses and plain.random == watch.random, "looking on must not change the run"
    line = Path(again["proj_dir"], "train_log.txt").read_text(encoding="utf-8").splitlines()[2]
    assert re.fullmatch(r"\d \S+ \S+ \S+ \S+ \S+ \d", line), "without val_split the line is the official one"


@pytest.mark.parametrize(("head_qk", "sliced"), [(0, True), (0, False), (8, True)])
def test_logits_of_a_large_vocabulary_are_never_whole(head_qk, sliced, monkeypatch):
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            self.seen = max([self.seen, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
            return made

    monkeypatch.setattr(loss_module, "_HEAD_SLICE", 16 * 4096)
    torch.manual_seed(0)
    model = RWKV(ModelConfig(n_layer=1, n_embd=32, vocab_size=4096, ctx_len=50, head_qk=head_qk, head_size_a=32))
    torch.nn.init.normal_(model.head.weight)
    idx, targets = torch.randint(4096, (2, 3, 50))
    with torch.no_grad(), Largest() as largest:
        losses = loss_module.token_losses(model, idx, targets, sliced)
    whole = 3 * 50 * 4096
    assert (largest.seen >= whole) == (head_qk > 0 or not sliced) and largest.seen >= 4096 * 32
    assert sliced or head_qk or largest.seen == whole
    with torch.no_grad():
        expected = -torch.log_softmax(model(idx)[0].double(), -1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert losses.shape == (3, 50) and losses.dtype == torch.float32


def test_a_device_without_float64_adds_in_float32(flags, monkeypatch):
    """As Apple's GPUs; here the processor plays one."""
    class Sums(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            [book] = [c for c in trainer.callbacks if isinstance(c, RunBook)]
            self.dtype = book._loss_sum.dtype

    found = {}
    for has in (True, False):
        monkeypatch.setattr(machine, "has_float64", lambda device, has=has: has)
        sums = Sums()
        cfg = TrainConfig(**{**flags, "proj_dir": flags["proj_dir"] + str(has), "logger": "csv", "my_exit": 1})
        train(cfg, callbacks=[sums], progress=False)
        log = Path(cfg.proj_dir, "train_log.txt").read_text(encoding="utf-8").splitlines()[2:]
        found[sums.dtype] = [[float(x) for x in (*line.split()[1:4], line.split()[-1])] for line in log]
    assert list(found) == [torch.float64, torch.float32]
    wide, narrow = found.values()
    assert len(wide) == 2 and np.allclose(wide, narrow, rtol=0, atol=1e-4)


def test_val_every_counts_steps(flags):
    data = TokenDataset(DataConfig.from_flags(TrainConfig(**flags)))
    look = Validation(data.held_out, CTX, batch_size=4, every=3)
    flags |= {"my_exit": 1, "val_split": 0.1}
    train(TrainConfig(**flags), callbacks=[look], progress=False)
    assert [step for step, _ in look.history] == [3, 4, 6, 8]


def test_the_command_line_computes_the_prime_of_the_training_part(flags):
    argv = [f"--{name}={value}" for name, value in {**flags, "my_pile_stage": 3, "val_split": 0.2}.items()]
    init_checkpoint(TrainConfig(**{**flags, "my_pile_stage": 1}))
    cfg, notes = check(argv)
    assert cfg.magic_prime == magic_prime(81 * CTX, CTX) < magic_prime(810, CTX)
    assert any("648 tokens" in note for note in notes)


def test_impossible_splits_are_named(flags):
    for change, words in [
        ({"val_split": 0, "val_every": 5}, "val_every=5.*val_split"),
        ({"val_split": 1.0}, r"val_split=1.0.*\[0, 1\)"),
        ({"data_type": "uint16", "my_sample_len": 9}, "val_split=0.1.*uint16"),
    ]:
        with pytest.raises(ValueError, match=words):
            TrainConfig(**{**flags, **change}).validate()
    data = TokenDataset(DataConfig.from_flags(TrainConfig(**{**flags, "val_split": 0})))
    with pytest.raises(ValueError, match="the dataset given holds nothing out"):
        train(TrainConfig(**flags), dataset=data, progress=False)


def test_a_masked_run_learns_answers_alone(flags, tmp_path):
    """Even samples are general text, odd ones questions and answers, of which the mask leaves the answers."""
    rng = np.random.default_rng(2)
    asked = np.concatenate([[*rng.integers(1, 9, 4), 9, 10, *rng.integers(11, 20, 3), 0] for _ in range(60)])
    flags |= {
        "data_file": write(tmp_path / "asked", asked), "my_qa_mask": 1, "qa_mask_ids": "9,10",
        "qa_pile_file": write(tmp_path / "pile", rng.integers(1, 20, 500)), "val_split": 0, "my_pile_stage": 4,
        "micro_bsz": 4, "epoch_steps": 10080, "my_exit_tokens": 5 * 4 * CTX,
    }  # fmt: skip
    cfg, watch = TrainConfig(**flags), Watch()
    model = RWKV(cfg.model_config())
    train(cfg, model=model, callbacks=[watch], progress=False)
    assert len(watch.losses) == 5
    masked = 0
    for weights, (x, y, mask), loss in zip(watch.models, watch.batches, watch.losses, strict=True):
        twin = RWKV(cfg.model_config(), {k: v.double() for k, v in weights.items()})
        with torch.no_grad():
            p = torch.log_softmax(twin(x)[0], dim=-1)
        kept = [(b, t) for b in range(4) for t in range(CTX) if mask[b, t] == 1]
        assert loss == pytest.approx(-sum(float(p[b, t, y[b, t]]) for b, t in kept) / len(kept), rel=1e-5)
        masked += 4 * CTX - len(kept)
        for b in range(4):
            inside = False  # the mask itself, by a second rule: after 9, 10 until 0
            for t in range(CTX):
                inside = (inside or x[b, t - 1 : t + 1].tolist() == [9, 10]) and int(x[b, t]) != 0
                assert mask[b].all() or bool(mask[b, t]) == inside
    assert masked > 20
    with pytest.raises(ValueError, match="qa_mask_ids.*187,187,34,27"):
        DataConfig.from_flags(cfg.replace(qa_mask_ids="nine"))

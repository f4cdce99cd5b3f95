"""A run: the numbers of a bare loop, the right samples, log, checkpoints and end; monitor, measurements, silence."""

import logging
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.model.rwkv import RWKV, l2wrap_cross_entropy
from rwkv_nb.training import machine
from rwkv_nb.training.checkpoint import CheckpointError, load_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.trainer import Monitor, evaluate, fast_bf16, keep_freed_memory, measure_tokens_per_second, train

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the eagle writes cell by cell. " * 40


class Spy(pl.Callback):
    """Losses, learning rates and samples of every batch."""

    def __init__(self, stop_at=None):
        self.losses, self.rates, self.batches, self.stop_at = [], [], [], stop_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(pl_module.last_loss))
        self.rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])
        self.batches.append(batch[0].clone())
        if self.stop_at == len(self.losses):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        proj_dir=str(tmp_path / "run"), data_file=str(tmp_path / "text.txt"), accelerator="cpu", precision="fp32",
        n_layer=2, n_embd=64, ctx_len=16, micro_bsz=2, epoch_steps=4, epoch_count=3, epoch_save=1, lr_init=5e-3,
        lr_final=1e-4, warmup_steps=2, weight_decay=0.01, my_exit_tokens=10 * 32, random_seed=5,
    )  # fmt: skip


def dataset(cfg):
    return TokenDataset(DataConfig.from_flags(cfg), seed=cfg.random_seed)


def run(cfg, *callbacks, **kwargs):
    return train(cfg, callbacks=callbacks, progress=False, **kwargs)


def files(cfg):
    return {name for name in os.listdir(cfg.proj_dir) if name.endswith(".pth")}


def bare_loop(cfg, model, steps):
    """Losses of the plain PyTorch training loop, rates written out for a cosine with warm-up."""
    data, losses = dataset(cfg), []
    matrices = [p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() == 2]
    decay = [p for n, p in model.named_parameters() if "time_decay" in n]
    others = [p for p in model.parameters() if not any(p is q for q in matrices + decay)]
    groups = [{"params": others}, {"params": decay}, {"params": matrices, "weight_decay": cfg.weight_decay}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, fused=True)
    for step in range(steps):
        epoch, within = divmod(step, cfg.epoch_steps)
        data.set_epoch(epoch)
        batch = [data[within * 2 + i] for i in range(2)]
        x, y = (torch.stack([sample[part] for sample in batch]) for part in (0, 1))
        done = min(max((step - 2) / (cfg.my_exit_tokens / 32 - 2), 0), 1)
        lr = cfg.lr_final + (cfg.lr_init - cfg.lr_final) * (1 + math.cos(math.pi * done)) / 2
        lr *= 0.01 + 0.99 * step / 2 if step < 2 else 1
        for group, scale in zip(optimizer.param_groups, (1, 2, 1), strict=True):
            group["lr"] = lr * scale
        loss = l2wrap_cross_entropy(model(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lightning_gives_the_losses_of_a_bare_loop(cfg):
    model = RWKV(cfg.replace(vocab_size=dataset(cfg).vocab_size).model_config())
    twin = RWKV(model.config, {k: v.clone() for k, v in model.state_dict().items()})
    spy = Spy()
    run(cfg, spy, model=model)
    expected = bare_loop(cfg, twin, 10)
    assert spy.losses[:5] == expected[:5]
    assert spy.losses == pytest.approx(expected, rel=1e-4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert spy.rates[0] == pytest.approx([5e-5, 1e-4, 1.5e-4, 5e-5]), "warm-up, and the scale of each group"


def test_log_checkpoints_and_end(cfg):
    spy = Spy()
    model = run(cfg, spy)
    assert not model.training and len(spy.losses) == 10, "320 tokens are ten steps"
    assert files(cfg) == {"rwkv-init.pth", "rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth"}, "epoch 2 was cut short"
    final = load_checkpoint(f"{cfg.proj_dir}/rwkv-final.pth")
    assert all(torch.equal(final[k], v) for k, v in model.state_dict().items())
    log = Path(cfg.proj_dir, "train_log.txt").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"NEW RUN \d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", log[0]) and "'my_exit_tokens': 320" in log[1]
    for n, line in enumerate(log[2:]):
        part = spy.losses[4 * n : 4 * n + 4]
        loss = sum(part) / len(part)
        lr = spy.rates[min(4 * n + 3, 9)][0]
        expected = rf"{n} {loss:.6f} (\d+\.\d{{4}}) {lr:.8f} \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ {n}"
        match = re.fullmatch(expected, line)
        assert match and float(match[1]) == pytest.approx(math.exp(loss), rel=1e-4), line
    assert n == 2


def test_every_epoch_sees_its_own_samples_also_after_a_restart(cfg):
    whole, again = Spy(), Spy()
    run(cfg, whole)
    data = dataset(cfg)
    for step, batch in enumerate(whole.batches):
        data.set_epoch(step // 4)
        assert torch.equal(batch, torch.stack([data[step % 4 * 2][0], data[step % 4 * 2 + 1][0]]))
    run(cfg.replace(load_model=f"{cfg.proj_dir}/rwkv-0.pth", epoch_begin=1), again)
    assert len(again.batches) == 6, "of 320 tokens, the first epoch had 128"
    assert all(torch.equal(a, b) for a, b in zip(whole.batches[4:], again.batches, strict=True))
    log = Path(cfg.proj_dir, "train_log.txt").read_text(encoding="utf-8")
    assert re.findall(r"^(\d+) .* (\d+)$", log, re.MULTILINE) == [(a, b) for a, b in ("00", "11", "22", "10", "21")]


def test_stage_3_resumes_from_the_newest_and_warms_up(cfg):
    cfg = cfg.replace(my_pile_stage=3, magic_prime=71, micro_bsz=1, my_exit_tokens=10**7, warmup_steps=-1)
    run(cfg.replace(my_pile_stage=1))
    assert files(cfg) == {"rwkv-init.pth"}, "stage 1 only builds weights"
    data = dataset(cfg)
    for epoch, rate in ((0, 5e-3), (1, 5e-3 * 0.01)):
        spy = Spy()
        run(cfg, spy, max_seconds=1e-9)
        data.set_epoch(epoch)
        assert len(spy.batches) == 1 and torch.equal(spy.batches[0][0], data[0][0])
        assert spy.rates[0][0] == pytest.approx(rate, rel=2e-2)
        os.rename(f"{cfg.proj_dir}/rwkv-final.pth", f"{cfg.proj_dir}/rwkv-0.pth")


def test_my_exit_stops_after_that_epoch(cfg):
    spy = Spy()
    run(cfg.replace(my_exit_tokens=0, my_exit=1, epoch_save=2, epoch_count=9), spy)
    assert len(spy.losses) == 8 and files(cfg) == {"rwkv-init.pth", "rwkv-0.pth", "rwkv-final.pth"}


def test_accumulated_batches_make_one_step(cfg):
    big = cfg.replace(precision="fp32", micro_bsz=4, epoch_steps=2, lr_init=1e-2, lr_final=1e-2, warmup_steps=0)
    small = big.replace(micro_bsz=2, epoch_steps=4, accumulate_grad_batches=2, proj_dir=cfg.proj_dir + "2")
    start = RWKV(cfg.replace(vocab_size=dataset(cfg).vocab_size).model_config()).state_dict()
    models, spies = [], [Spy(), Spy()]
    for c, spy in zip((big, small), spies, strict=True):
        config = c.replace(vocab_size=start["emb.weight"].shape[0]).model_config()
        models.append(run(c, spy, model=RWKV(config, {k: v.clone() for k, v in start.items()})))
    assert (len(spies[0].losses), len(spies[1].losses)) == (5, 10), "the same tokens, so the same number of steps"
    pairs = np.reshape(spies[1].losses, (5, 2)).mean(axis=1)
    assert spies[0].losses == pytest.approx(pairs.tolist(), rel=2e-2)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_every_precision_trains_float32_weights(cfg, precision):
    model = run(cfg.replace(precision=precision, my_exit_tokens=40 * 32, epoch_steps=40, warmup_steps=0))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = {t.dtype for t in load_checkpoint(f"{cfg.proj_dir}/rwkv-final.pth").values()}
    assert stored == {{"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    data = dataset(cfg)
    assert evaluate(model, data.source.window(0, 800), 16) < 2.6, "below the entropy of single letters"


def test_an_interrupt_ends_the_run_as_usual(cfg):
    before = signal.getsignal(signal.SIGINT)
    spy = Spy(stop_at=3)
    run(cfg, spy)
    assert len(spy.losses) == 3 and "rwkv-final.pth" in files(cfg) and "rwkv-0.pth" not in files(cfg)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_is_already_over_trains_nothing(cfg):
    spy = Spy()
    run(cfg.replace(epoch_begin=3, my_exit_tokens=3 * 4 * 32, load_model=""), spy, model=_model(cfg))
    assert spy.losses == [] and files(cfg) == {"rwkv-final.pth"}


def _model(cfg, **changes):
    return RWKV(cfg.replace(vocab_size=dataset(cfg).vocab_size, **changes).model_config())


def test_nothing_is_said(cfg, capfd, recwarn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, listener = [], logging.Handler()
    listener.emit = said.append
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    for logger in loggers:
        logger.addHandler(listener)
        monkeypatch.setattr(logger, "level", logging.INFO)
    run(cfg)
    for logger in loggers:
        logger.removeHandler(listener)
        assert logger.level == logging.INFO
    assert said == []
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == "" and not [w for w in recwarn if "lightning" in w.filename]
    assert set(os.listdir(tmp_path)) == {"run", "text.txt"}, "no lightning_logs, no checkpoints"


def test_progress_shows_data_notes_and_a_bar(cfg, capfd):
    train(cfg.replace(n_layer=1), progress=True)
    captured = capfd.readouterr()
    assert "vocab_size" in captured.out and "note: n_layer=1" in captured.out
    assert "10/10" in captured.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"my_pile_stage": 1, "load_model": "x.pth", "magic_prime": 71}, "x.pth: no such checkpoint"),
        ({"tiny_att_dim": 8}, "tiny_att_layer=-999"),
        ({"vocab_size": 3}, "vocab_size=3"),
        ({"precision": "int4"}, "precision='int4'"),
        ({"data_file": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_an_impossible_run_writes_nothing(cfg, flags, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(cfg.replace(**flags))
    assert not os.path.exists(cfg.proj_dir) or files(cfg) == set()


def test_a_model_or_checkpoint_of_other_sizes_is_named(cfg):
    with pytest.raises(ValueError, match="n_embd=64: the model given has 128"):
        run(cfg, model=_model(cfg, n_embd=128))
    run(cfg)
    other = cfg.replace(load_model=f"{cfg.proj_dir}/rwkv-final.pth", n_layer=3)
    with pytest.raises(CheckpointError, match=r"rwkv-final\.pth: .*blocks\.2"):
        run(other)
    run(other.replace(load_partial=1))


def test_monitor_records_marks_and_stops(cfg, monkeypatch):
    clock = iter(range(0, 100000, 1))
    monkeypatch.setattr("rwkv_nb.training.monitor.time.perf_counter", lambda: next(clock) / 1.0)
    marks, seen = [], []

    def on_mark(mark, record, model):
        marks.append((mark, record.step, model.training, torch.is_grad_enabled()))
        torch.rand(100)
        for _ in range(7):
            next(clock)  # looking at the model takes seven seconds

    monitor = Monitor(every_seconds=None, every_steps=2, at_seconds=(3, 0), on_record=seen.append, on_mark=on_mark,
                      max_seconds=7)  # fmt: skip
    spy, alone = Spy(), Spy()
    config = cfg.replace(dropout=0.2)
    run(config, spy, monitor)
    assert marks == [(0, 0, False, False), (3, 3, False, False)]
    assert [(r.step, r.tokens, r.seconds) for r in seen] == [(2, 64, 2.0), (4, 128, 4.0), (6, 192, 6.0), (7, 224, 7.0)]
    assert len(spy.losses) == 7, "one second a step; the time spent looking does not count"
    assert seen[1].loss == pytest.approx(sum(spy.losses[2:4]) / 2)
    assert monitor.records == seen and seen[2].lr == spy.rates[5][0]
    run(config, alone)
    assert alone.losses[:7] == spy.losses, "looking does not change the run"


def test_the_end_replaces_marks_not_reached(cfg):
    marks = []
    run(cfg, Monitor(at_seconds=(0, 1e6, 2e6), on_mark=lambda mark, record, model: marks.append((mark, record.step))))
    assert [step for _, step in marks] == [0, 10] and marks[1][0] < 1e6


def test_max_seconds_ends_training(cfg):
    spy = Spy()
    run(cfg.replace(my_exit_tokens=0), spy, max_seconds=1e-9)
    assert len(spy.losses) == 1


def test_evaluate_is_the_mean_over_windows(cfg):
    model = _model(cfg).train()
    tokens = dataset(cfg).source.window(0, 100)
    windows = [tokens[a : a + 17] for a in (0, 42, 83)]  # evenly from the first to the last possible start
    losses = []
    for w in windows:
        logits = model(torch.as_tensor(w[None, :-1]))[0].detach().double().log_softmax(-1)[0]
        losses += [-logits[i, token].item() for i, token in enumerate(w[1:])]
    assert evaluate(model, tokens, 16, batch_size=2, n_windows=3) == pytest.approx(np.mean(losses), rel=1e-5)
    assert evaluate(model, tokens.astype(np.uint16), 99) > 0 and model.training
    assert evaluate(model, tokens, 16, bf16=True) == pytest.approx(evaluate(model, tokens, 16), rel=0.02)
    with pytest.raises(ValueError, match="100 are too few.*101"):
        evaluate(model, tokens, 100)


def test_measuring_speed_changes_nothing(cfg):
    model, data = _model(cfg), dataset(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert measure_tokens_per_second(cfg, model, data, steps=3) > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_the_machine_is_said_to_have(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)
    assert fast_bf16("cpu") is False
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert fast_bf16("cpu") is True
    for name, amx, fast in (("Intel Xeon", False, False), ("Intel Xeon", True, True), ("AMD EPYC", False, True)):
        has = {"avx512_bf16": True, "amx_bf16": amx, "cpu_name": name}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert fast_bf16("cpu") is fast
    assert fast_bf16("mps") is False
    assert isinstance(keep_freed_memory(), bool)
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert keep_freed_memory() is False

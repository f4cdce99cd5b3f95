"""Going on: a run stopped anywhere is the uninterrupted run, bit for bit; which file it goes on from, and why."""

import functools
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training import config, interrupts, rules
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.files import CheckpointError
from rwkv_nb.training.interrupts import Interrupted
from rwkv_nb.training.trainer import train
from rwkv_nb.training.trainer_state import TrainerState

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the eagle writes cell by cell. " * 40
MINI = 12  # samples in a mini-epoch: 40320 would take hours here


class Spy(pl.Callback):
    """Losses, learning rates and loss scale of every batch; stops the run as Ctrl-C does after some of its batches."""

    def __init__(self, stop_after=None, number=signal.SIGINT):
        self.losses, self.rates, self.stop_after, self.number = [], [], stop_after, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(pl_module.last_loss))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = [] if scaler is None else [scaler.get_scale()]
        self.rates.append([g["lr"] for g in trainer.optimizers[0].param_groups] + scale)
        if len(self.losses) == self.stop_after:
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def short_mini_epochs(monkeypatch):
    monkeypatch.setattr(config, "MINI_EPOCH", MINI)
    monkeypatch.setattr(rules, "MINI_EPOCH", MINI)


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        proj_dir=str(tmp_path / "run"), data_file=str(tmp_path / "text.txt"), accelerator="cpu", precision="fp32",
        n_layer=2, n_embd=64, ctx_len=8, micro_bsz=2, my_pile_stage=3, magic_prime=149, epoch_save=1, lr_init=5e-3,
        lr_final=1e-4, warmup_steps=2, weight_decay=0.01, my_exit_tokens=16 * 16, random_seed=5, dropout=0.1,
        save_minutes=0,
    )  # fmt: skip


def run(cfg, *callbacks, **kwargs):
    return train(cfg, callbacks=callbacks, progress=False, **kwargs)


def prepare(cfg):
    run(cfg.replace(my_pile_stage=1, magic_prime=149))
    return cfg


def copy_of(cfg, name):
    """The same run in another folder, with the initial weights alone."""
    other = cfg.replace(proj_dir=str(Path(cfg.proj_dir).parent / name))
    os.makedirs(other.proj_dir)
    shutil.copy(f"{cfg.proj_dir}/rwkv-init.pth", other.proj_dir)
    return other


def contents(cfg, pattern="rwkv-*.pth"):
    return {path.name: path.read_bytes() for path in Path(cfg.proj_dir).glob(pattern)}


def names(cfg):
    return sorted(name for name in os.listdir(cfg.proj_dir) if name.startswith((".", "rwkv-")))


def log_lines(cfg):
    """{mini-epoch: the last line about it, without its time}."""
    log = Path(cfg.proj_dir, "train_log.txt").read_text(encoding="utf-8")
    found = re.findall(r"^(\d+) (\S+ \S+ \S+) \S+ \S+ (\d+)$", log, re.MULTILINE)
    return {int(epoch): (numbers, since) for epoch, numbers, since in found}


@pytest.mark.parametrize(
    "flags",
    [
        {"precision": "fp32"},
        {"precision": "bf16", "my_pile_stage": 4, "magic_prime": 0},
        {"precision": "fp16", "lr_init": 1e-2},
        {"precision": "tf32", "my_pile_stage": 2, "warmup_steps": -1, "my_random_steps": 9},
        {"micro_bsz": 1, "accumulate_grad_batches": 3, "epoch_save": 2, "my_exit_tokens": 11 * 24},
    ],
    ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()),
)
def test_stopped_and_resumed_is_uninterrupted(cfg, flags, monkeypatch):
    soon = functools.partial(torch.amp.GradScaler, growth_interval=4)  # not 2000: the loss scale changes in this run
    monkeypatch.setattr(torch.amp, "GradScaler", soon)
    cfg = prepare(cfg.replace(**flags))
    whole, parts = Spy(), []
    broken = copy_of(cfg, "broken")
    run(cfg, whole)
    for stop_after in (1, 3, 2, None):  # within a mini-epoch, across its end, ...
        parts.append(Spy(stop_after))
        run(broken, parts[-1])
    assert [len(part.losses) > 0 for part in parts] == [True] * 4
    assert [x for part in parts for x in part.losses] == whole.losses
    assert [x for part in parts for x in part.rates] == whole.rates
    assert contents(broken) == contents(cfg) and {"rwkv-0.pth", "rwkv-final.pth"} < set(contents(cfg))
    assert log_lines(broken) == log_lines(cfg)


def test_the_optimizer_goes_on_where_it_was(cfg):
    """What makes the difference: the same two halves from weights alone are another run."""
    cfg = prepare(cfg)
    states, alone = copy_of(cfg, "states"), copy_of(cfg, "alone").replace(resume="weights")
    for c in (states, alone):
        run(c.replace(my_exit_tokens=6 * 16, lr_final=5e-3))
    whole, from_state, from_weights = Spy(), Spy(), Spy()
    run(cfg.replace(lr_final=5e-3), whole)
    with pytest.warns(UserWarning, match="my_exit_tokens: 96 -> 256"):
        run(states.replace(lr_final=5e-3), from_state)
    with pytest.warns(UserWarning, match=r"did not go on from rwkv-0\.state.*\.old"):
        run(alone.replace(lr_final=5e-3), from_weights)
    assert from_state.losses == whole.losses[6:]
    assert from_weights.losses[0] == from_weights.losses[0] and from_weights.losses[1:] != whole.losses[7:]
    assert from_weights.rates[0][0] < from_state.rates[0][0] / 10, "warm-up again, as officially"


HEARD = [signal.SIGINT, signal.SIGTERM, *interrupts.ANNOUNCES]


@pytest.mark.parametrize("number", HEARD, ids=lambda number: number.name)
def test_signals_save_and_leave(cfg, number):
    cfg = prepare(cfg)
    before = [signal.getsignal(s) for s in HEARD]
    spy, rest, whole = Spy(3, number), Spy(), Spy()
    with pytest.raises(Interrupted) as found:
        run(cfg, spy, raise_interrupt=True)
    assert found.value.exit_code == 128 + number and number.name in str(found.value)
    assert [signal.getsignal(s) for s in HEARD] == before
    assert names(cfg) == ["rwkv-0.3.state", "rwkv-final.pth", "rwkv-init.pth"] and len(spy.losses) == 3
    assert isinstance(run(cfg, Spy(2, number)), RWKV), "in a notebook an interrupt is a normal end"
    run(cfg, rest)
    run(copy_of(cfg, "whole"), whole)
    assert len(rest.losses) == 11 and rest.losses == whole.losses[5:]


class Stopper(Spy):
    """Ends the run as Lightning's own callbacks do."""

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        trainer.should_stop |= len(self.losses) == 6


@pytest.mark.parametrize("spy", [Spy(6), Stopper()], ids=["signal", "should_stop"])
def test_the_end_within_a_step_waits_for_its_end(cfg, spy):
    cfg = prepare(cfg.replace(micro_bsz=1, accumulate_grad_batches=4))
    run(cfg, spy)
    assert len(spy.losses) == 8 and "rwkv-0.8.state" in names(cfg), "two steps of four batches"


@pytest.fixture
def interruptible():
    """Ctrl-C as at a terminal: a shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_is_immediate(cfg):
    class Impatient(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    cfg = prepare(cfg.replace(save_steps=1))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as found:
        run(cfg, Impatient())
    assert not isinstance(found.value, Interrupted) and signal.getsignal(signal.SIGINT) is before
    assert names(cfg) == ["rwkv-0.1.state", "rwkv-0.2.state", "rwkv-init.pth"], "only what was there"


needs_sigusr1 = pytest.mark.skipif(not interrupts.ANNOUNCES, reason="no SIGUSR1 on Windows")


@needs_sigusr1
def test_slurm_announces_the_end_of_a_job(cfg, monkeypatch):
    """Twice, as when Slurm and the script both send it, and SIGTERM before all is saved: the first word is the reason.
    Lightning would write a checkpoint, and load any it finds."""
    cfg = prepare(cfg)
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "eagle", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    left_over = Path(cfg.proj_dir, "hpc_ckpt_1.ckpt")
    left_over.write_text("of another program", encoding="utf-8")

    class Twice(Spy):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            for number in (self.number, signal.SIGTERM) if len(self.losses) == self.stop_after else ():
                os.kill(os.getpid(), number)

    whole, spy, rest = Spy(), Twice(3, signal.SIGUSR1), Spy()
    run(copy_of(cfg, "whole"), whole)
    with pytest.raises(Interrupted, match="SIGUSR1") as found:
        run(cfg, spy, raise_interrupt=True)
    assert found.value.exit_code == 128 + signal.SIGUSR1
    run(cfg, rest)
    assert len(spy.losses) == 3 and spy.losses + rest.losses == whole.losses
    assert [path.name for path in Path(cfg.proj_dir).glob("*hpc*")] == [left_over.name]
    assert not Path(cfg.proj_dir, ".lightning").exists()


@needs_sigusr1
def test_a_program_keeps_its_own_use_of_sigusr1(cfg):
    heard, spy = [], Spy(2, signal.SIGUSR1)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        run(prepare(cfg), spy, raise_interrupt=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] and len(spy.losses) == 16


def test_a_run_that_is_over_ends_at_once(cfg):
    cfg = prepare(cfg)
    run(cfg)
    before, listed = contents(cfg, "rwkv-*"), names(cfg)
    for ending in (cfg, cfg.replace(my_exit=1, my_exit_tokens=0)):  # tokens used up, last mini-epoch done
        spy = Spy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(ending, spy)
        assert spy.losses == [] and contents(cfg, "rwkv-*") == before and names(cfg) == listed


def test_my_exit_then_more(cfg):
    cfg = prepare(cfg.replace(my_exit_tokens=0, my_exit=0, lr_final=5e-3))
    longer, whole = copy_of(cfg, "longer"), Spy()
    run(cfg)
    run(longer.replace(my_exit=1), whole)
    more = Spy()
    with pytest.warns(UserWarning, match="my_exit: 0 -> 1"):
        run(cfg.replace(my_exit=1), more)
    assert len(whole.losses) == 12 and more.losses == whole.losses[6:]
    assert contents(cfg) == contents(longer)


def test_states_are_few_and_do_not_change_the_run(cfg):
    cfg = prepare(cfg)
    often, never = copy_of(cfg, "often").replace(save_steps=2), copy_of(cfg, "never").replace(save_state=False)
    minutes = copy_of(cfg, "minutes").replace(save_minutes=1e-9)
    for c in (cfg, often, never, minutes):
        run(c)
    assert contents(often) == contents(cfg) == contents(never) == contents(minutes)
    assert names(never) == sorted(contents(cfg)), "not one state"
    assert [n for n in names(often) if "state" in n] == ["rwkv-2.2.state", "rwkv-2.4.state"]
    assert [n for n in names(minutes) if "state" in n] == ["rwkv-2.3.state", "rwkv-2.4.state"]
    assert [n for n in names(cfg) if "state" in n] == ["rwkv-1.state", "rwkv-2.4.state"]


def test_the_official_trainer_takes_no_notice(cfg):
    """Its rule, in short: of names rwkv*.pth, the word between the first "-" and the "." is init, final or a number."""
    cfg = prepare(cfg.replace(save_steps=2))
    run(cfg, Spy(9))
    seen = [name for name in names(cfg) if name.startswith("rwkv") and name.endswith(".pth")]
    words = [name.split("-")[1].split(".")[0] for name in seen]
    epochs = sorted(-1 if word == "init" else int(word) for word in words if word != "final")
    assert epochs == [-1, 0] and any(name.endswith(".state") for name in names(cfg))


def test_any_stage_goes_on_from_a_state_that_is_named(cfg):
    cfg = prepare(cfg).replace(my_pile_stage=0, magic_prime=0, epoch_steps=6, epoch_count=3)
    whole, first, rest = Spy(), Spy(4), Spy()
    run(cfg, whole)
    broken = copy_of(cfg, "broken")
    run(broken, first)
    run(broken.replace(load_model=f"{broken.proj_dir}/rwkv-0.4.state"), rest)
    assert first.losses + rest.losses == whole.losses
    with pytest.raises(FileNotFoundError, match=r"rwkv-0\.4\.state: no such state; older ones are removed"):
        run(broken.replace(load_model=f"{broken.proj_dir}/rwkv-0.4.state"))
    with pytest.raises(CheckpointError, match=r"rwkv-2\.4\.state: cannot go on from there: ctx_len=4, it was 8"):
        run(broken.replace(load_model=f"{broken.proj_dir}/rwkv-2.4.state", ctx_len=4))


def test_a_full_disk_within_the_run_is_only_said(cfg, monkeypatch):
    cfg = prepare(cfg.replace(save_steps=2))
    full, save = copy_of(cfg, "full"), TrainerState.save
    run(cfg)

    def no_room(self, path):
        if self.epoch == 1:
            raise OSError(28, f"{path}: not written, there is no room")
        return save(self, path)

    monkeypatch.setattr(TrainerState, "save", no_room)
    with pytest.warns(UserWarning, match=r"rwkv-1\.\d\.state: not written.*the run goes on"):
        run(full)
    assert contents(full) == contents(cfg)
    monkeypatch.setattr(TrainerState, "save", lambda self, path: no_room(self, path) if self.epoch < 2 else 1 / 0)
    last = copy_of(cfg, "last")
    with warnings.catch_warnings(), pytest.raises(OSError, match=r"rwkv-1\.6\.state"):
        warnings.simplefilter("ignore")
        run(last.replace(my_exit=1))
    assert contents(last)["rwkv-final.pth"] == contents(last)["rwkv-1.pth"], "the weights are there all the same"

"""Runs the same training once in one piece, and once killed by SIGKILL again and again; prints what happened as JSON.

    python tests/training/killed_runs.py FOLDER KILLS SEED

Each attempt is a fork of one process that has imported everything, so that it starts at once. It is killed either by
itself, at the n-th call of a kind that matters (a write into a file, fsync, rename, removal, the end of a batch, a line
of the log), or by its parent after a while, during writes that are slowed down for the purpose.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402

from rwkv_nb.training import config, files, rules  # noqa: E402
from rwkv_nb.training.config import TrainConfig  # noqa: E402
from rwkv_nb.training.runbook import RunBook  # noqa: E402
from rwkv_nb.training.trainer import train  # noqa: E402

KINDS = {"write": 60, "fsync": 6, "replace": 6, "unlink": 3, "batch": 3, "log": 2, "after": 1.0}  # draw up to so many


class Losses(pl.Callback):
    """Appends "step loss" to a file, exactly."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{trainer.global_step} {float(pl_module.last_loss).hex()}\n")


def flags(folder, name):
    return TrainConfig(
        proj_dir=str(folder / name), data_file=str(folder / "text.txt"), accelerator="cpu", precision="bf16",
        n_layer=2, n_embd=32, head_size_a=32, ctx_len=8, micro_bsz=2, my_pile_stage=3, magic_prime=149, epoch_save=1,
        lr_init=5e-3, lr_final=1e-4, weight_decay=0.01, my_exit_tokens=100 * 16, random_seed=5, dropout=0.1,
        save_minutes=0, save_steps=1,
    )  # fmt: skip


def die_at(kind, count):
    """From now on, the count-th call of this kind is the last thing that this process does."""
    left = [count]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    owner, name = {
        "write": (files._Watched, "write"), "fsync": (os, "fsync"), "replace": (os, "replace"),
        "unlink": (Path, "unlink"), "batch": (RunBook, "on_train_batch_end"), "log": (RunBook, "_log"),
    }[kind]  # fmt: skip
    setattr(owner, name, counted(getattr(owner, name)))


def slow_writes(pause=0.002):
    write = files._Watched.write

    def slowly(self, data):
        time.sleep(pause)
        return write(self, data)

    files._Watched.write = slowly


def attempt(cfg, losses, kind="", count=0):
    """Fork a run and wait for it; (signal that ended it, exit code)."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            if kind == "after":
                slow_writes()
            elif kind:
                die_at(kind, count)
            train(cfg, callbacks=[Losses(losses)], progress=False)
            code = 0
        finally:
            os._exit(code)
    if kind == "after":
        time.sleep(count)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return (os.WTERMSIG(status), 0) if os.WIFSIGNALED(status) else (0, os.WEXITSTATUS(status))


def main(folder, kills, seed):
    folder, draw = Path(folder), random.Random(seed)
    torch.set_num_threads(1)
    config.MINI_EPOCH = rules.MINI_EPOCH = 12
    (folder / "text.txt").write_text("the eagle writes cell by cell. " * 40, encoding="utf-8")
    whole, broken = flags(folder, "whole"), flags(folder, "broken")
    assert attempt(whole.replace(my_pile_stage=1), folder / "none.txt") == (0, 0)
    os.makedirs(broken.proj_dir)
    shutil.copy(f"{whole.proj_dir}/rwkv-init.pth", broken.proj_dir)
    assert attempt(whole, folder / "whole.txt") == (0, 0)
    moments = []
    while len(moments) < kills:
        kind = draw.choice(list(KINDS))
        count = draw.uniform(0.2, KINDS[kind]) if kind == "after" else draw.randint(1, KINDS[kind])
        ended, code = attempt(broken, folder / "broken.txt", kind, count)
        if (ended, code) != (signal.SIGKILL, 0):
            break  # it came to its end before that moment
        moments.append([kind, count])
    last = attempt(broken, folder / "broken.txt")
    print(json.dumps({"moments": moments, "last": last}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""What each process of a test in this folder runs: one training as a JSON file says, and a record of what it saw.

    python worker.py SETTINGS.json
settings: "flags" of TrainConfig; "out", a folder for rank-R.json; optionally "max_seconds" (of process 0 alone: the
others have no clock), "other": flags of the others that differ, "signal" [rank, batch, number, who]: that process
signals itself or the first, "fail" [rank, batch]: that process raises, "slow": seconds that each batch takes at least,
"clip" and "l2wrap" in place of the trainer's own.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_nb.model import loss
from rwkv_nb.training import trainer
from rwkv_nb.training.config import TrainConfig

CLIP, L2WRAP = trainer.GRAD_CLIP, loss.L2WRAP


class Spy(pl.Callback):
    def __init__(self, settings: dict) -> None:
        self.settings, self.losses, self.batches, self.rates, self.steps = settings, [], [], [], []

    def on_train_start(self, trainer, pl_module):
        (Path(self.settings["out"]) / f"pid-{trainer.global_rank}").write_text(str(os.getpid()), encoding="utf-8")
        self.seed = torch.initial_seed()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.settings.get("slow", 0))
        seen, rank = len(self.batches), trainer.global_rank
        if self.settings.get("fail") == [rank, seen]:
            raise ValueError(f"a fault of process {rank}, made for the test")
        if self.settings.get("signal", [])[:2] == [rank, seen]:
            os.kill(os.getpid(), self.settings["signal"][2])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(pl_module.last_loss))
        self.batches.append(batch[0].tolist())
        self.rates.append(pl_module.last_lr)
        self.steps.append(trainer.global_step)

    def on_train_end(self, trainer, pl_module):
        found = {"losses": self.losses, "batches": self.batches, "rates": self.rates, "steps": self.steps,
                 "val": pl_module.last_val_loss, "world_size": trainer.world_size, "seed": self.seed}  # fmt: skip
        path = Path(self.settings["out"]) / f"rank-{trainer.global_rank}.json"
        path.write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    for text in sys.argv[1:]:
        settings = json.loads(Path(text).read_text(encoding="utf-8"))
        os.makedirs(settings["out"], exist_ok=True)
        first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
        seconds = settings.get("max_seconds") if first else settings.get("max_seconds") and 1e9
        flags = settings["flags"] | ({} if first else settings.get("other", {}))
        trainer.GRAD_CLIP = settings.get("clip", CLIP)
        loss.L2WRAP = settings.get("l2wrap", L2WRAP)
        trainer.train(TrainConfig(**flags), callbacks=[Spy(settings)], max_seconds=seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main()

"""One of several processes that train together: once in one piece, once stopped by a signal to one of them and resumed.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/training/resumed_together.py FOLDER

FOLDER has text.txt, and whole/ and broken/ with the same rwkv-init.pth.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402

from rwkv_nb.training import config, rules  # noqa: E402
from rwkv_nb.training.config import TrainConfig  # noqa: E402
from rwkv_nb.training.trainer import train  # noqa: E402

config.MINI_EPOCH = rules.MINI_EPOCH = 24


class Losses(pl.Callback):
    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(pl_module.last_loss))
        if self.stop == (trainer.global_rank, len(self.seen)):
            os.kill(os.getpid(), signal.SIGTERM)


def flags(folder, name):
    return TrainConfig(**{
        "proj_dir": str(folder / name), "data_file": str(folder / "text.txt"), "accelerator": "cpu",
        "precision": "fp32", "strategy": "ddp", "devices": 2, "micro_bsz": 2, "ctx_len": 8, "n_layer": 2, "n_embd": 32,
        "head_size_a": 32, "my_pile_stage": 3, "magic_prime": 149, "epoch_save": 1, "lr_init": 5e-3, "lr_final": 1e-4,
        "weight_decay": 0.01, "dropout": 0.1, "my_exit_tokens": 16 * 32, "save_minutes": 1e-9,
    })  # fmt: skip


def main(folder):
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), {"whole": [], "broken": []}
    for name, stop in [("whole", None), ("broken", (1, 3)), ("broken", (0, 5)), ("broken", None)]:
        losses = Losses(stop)
        torch.manual_seed(rank)  # dropout of its own for each process, at the first start
        train(flags(folder, name), callbacks=[losses], progress=False)
        found[name].append(losses.seen)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

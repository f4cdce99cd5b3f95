"""Train with real processes from a notebook, and hear from each what it read and what gradient it had.

    start = make_data(folder, chunks=47, ctx_len=32)          flags of a small run; a chunk's first token is its number
    records = run({**start, "devices": 2, "micro_bsz": 2}, processes=2)       two new processes
    record = watch(TrainConfig(**start))                      the same in this process

It is: a callback that takes notes around the package's own `train`. It is not: a way to train (that is
`python -m rwkv_nb train`, under torchrun or alone), nor a measurement of speed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.data.magic_prime import magic_prime
from rwkv_nb.training.checkpoint import init_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.trainer import train

LOOK_AT = "ln_out.weight"  # the parameter whose gradient is noted: one number a channel


@dataclass
class Record:
    """Of one process: chunks (steps x micro_bsz), losses (steps), the first gradient of LOOK_AT.

    own_gradient: from this process's samples alone; gradient: what the optimizer was given, before clipping.
    """

    rank: int = 0
    pid: int = 0
    chunks: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    own_gradient: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)


def make_data(folder: str | os.PathLike, chunks: int, ctx_len: int, seed: int = 0) -> dict[str, Any]:
    """Write `chunks` chunks of random tokens, each beginning with its number, and initial weights for a tiny model.

    Returns flags of TrainConfig for one process; `chunks` + 1 slots, so that the magic prime can be `chunks`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(seed).integers(0, 64, (chunks + 1) * ctx_len).astype(np.uint16)
    tokens[::ctx_len] = np.arange(chunks + 1)
    with MMapIndexedDatasetBuilder(folder / "data") as builder:
        builder.add_item(tokens)
        builder.end_document()
    flags = {
        "data_file": str(folder / "data"), "data_type": "binidx", "vocab_size": 64 * (chunks // 64 + 1),
        "ctx_len": ctx_len, "magic_prime": magic_prime(tokens.size, ctx_len), "my_pile_stage": 3,
        "proj_dir": str(folder / "run"), "n_layer": 2, "n_embd": 64, "accelerator": "cpu", "precision": "fp32",
        "lr_init": 1e-3, "lr_final": 1e-4, "random_seed": 3, "micro_bsz": 1, "enable_progress_bar": False,
    }  # fmt: skip
    init_checkpoint(TrainConfig(**{**flags, "my_pile_stage": 1}))
    return flags


class Notes(pl.Callback):
    """Fills a Record while a run goes on."""

    def __init__(self) -> None:
        self.record = Record()

    def on_train_start(self, trainer, pl_module) -> None:
        self.record.rank, self.record.pid = trainer.global_rank, os.getpid()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.record.chunks.append(batch[0][:, 0].tolist())
        if not self.record.own_gradient:  # the model itself, not its DDP wrapper: nothing is exchanged here
            loss = pl_module.training_step(batch, batch_idx)
            parameter = pl_module.model.get_parameter(LOOK_AT)
            self.record.own_gradient = torch.autograd.grad(loss, parameter)[0].tolist()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not self.record.gradient:
            self.record.gradient = pl_module.model.get_parameter(LOOK_AT).grad.tolist()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.record.losses.append(float(pl_module.last_loss))


def watch(cfg: TrainConfig, *callbacks: pl.Callback) -> Record:
    """Train as cfg says, in this process (or as one of several), and return the notes."""
    notes = Notes()
    train(cfg, callbacks=[notes, *callbacks], progress=False)
    return notes.record


def run(flags: dict[str, Any], processes: int = 2, timeout: float = 240) -> list[Record]:
    """Start `processes` new processes that train together on the CPU; their records, by rank.

    Raises RuntimeError with what they wrote if one of them fails.
    """
    flags = {**flags, "devices": processes, "strategy": "ddp"}
    out = Path(flags["proj_dir"] + "-records")
    out.mkdir(parents=True, exist_ok=True)
    (out / "flags.json").write_text(json.dumps(flags), encoding="utf-8")
    started = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(processes):  # these variables are all that a process is told: torchrun sets the same
        told = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
        with open(out / f"{rank}.log", "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "rwkv_nb.teaching.two_processes", str(out)]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()  # nothing to a process that has ended
    for rank, code in enumerate(codes):
        if code:
            said = (out / f"{rank}.log").read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"process {rank} ended with exit code {code}:\n{said}")
    texts = [(out / f"{rank}.json").read_text(encoding="utf-8") for rank in range(processes)]
    return [Record(**json.loads(text)) for text in texts]


def main(folder: str) -> None:
    """What each process does: the run of FOLDER/flags.json, its record to FOLDER/RANK.json."""
    out = Path(folder)
    record = watch(TrainConfig(**json.loads((out / "flags.json").read_text(encoding="utf-8"))))
    (out / f"{record.rank}.json").write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

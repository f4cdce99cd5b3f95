"""What benchmarks/training.py times: the models, a step of the trainer's by hand, and the trainer itself.

The transformer has the form and sizes of nanoGPT: learned positions, one product for q, k and v, GELU, four times as
wide inside, no biases, head and embedding tied. "Straightforward RWKV-5" is our model with every part by its definition
in plain PyTorch under autograd, but for the WKV operator.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.model import by_hand, elementwise, products
from rwkv_nb.model.loss import next_token_loss
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.machine import autocast
from rwkv_nb.training.optimizer import build_optimizer
from rwkv_nb.training.trainer import train


@dataclass(frozen=True)
class Size:
    """Of a model and its batches."""

    L: int
    D: int
    V: int
    T: int
    B: int

    def __str__(self) -> str:
        return f"L{self.L} D{self.D} V{self.V}, batches of {self.B} x {self.T}"


SMALL, WORLD, SCRIPTS = Size(6, 256, 96, 256, 8), Size(6, 256, 65536, 256, 8), Size(12, 768, 65536, 512, 1)
NOTEBOOK = Size(3, 128, 96, 128, 16)  # of notebook 07: small, so its steps are short
QUICK, QUICK_WORLD, QUICK_SCRIPTS = Size(2, 64, 96, 64, 2), Size(2, 64, 8192, 64, 2), Size(2, 64, 8192, 64, 1)
LETTERS = [chr(i) for i in (10, *range(32, 127))]


# ---- the models


class TransformerBlock(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.projection = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (y.view(B, T, -1, 64).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, 64)
        x = x + self.projection(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Transformer(nn.Module):
    """Token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.emb, self.positions = nn.Embedding(size.V, size.D), nn.Embedding(size.T, size.D)
        self.blocks = nn.Sequential(*(TransformerBlock(size.D) for _ in range(size.L)))
        self.ln_out = nn.LayerNorm(size.D, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.emb(idx) + self.positions.weight[: idx.shape[1]]
        return F.linear(self.ln_out(self.blocks(x)), self.emb.weight)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())


def config_of(size: Size, precision: str = "fp32", **flags) -> TrainConfig:
    return TrainConfig(
        n_layer=size.L, n_embd=size.D, vocab_size=size.V, ctx_len=size.T, micro_bsz=size.B, accelerator="cpu",
        precision=precision, **flags,
    )  # fmt: skip


@contextlib.contextmanager
def by_parts():
    """Within: no layer is one node, so that a profiler sees its parts."""
    with mock.patch.object(by_hand, "suits", lambda *_: False):
        yield


@contextlib.contextmanager
def by_definition():
    """Within: no part of a layer is fused, and every product is PyTorch's."""
    with mock.patch.object(elementwise, "library", lambda: None), mock.patch.object(products, "onednn", lambda: False):
        yield


class Step:
    """One way to train: `run()` does a step, `clock()` tells the time."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, way: str, size: Size) -> None:
        torch.manual_seed(0)
        precision = "bf16" if "bf16" in way else "fp32"
        self.cfg = config_of(size, precision)
        self.model = Transformer(size) if "transformer" in way else RWKV(self.cfg.model_config()).train()
        self.optimizer = build_optimizer(self.model, self.cfg)
        self.idx, self.targets = torch.randint(0, size.V, (2, size.B, size.T))
        self.sliced = "plain head" not in way
        self.around = contextlib.nullcontext
        if "straightforward" in way:
            self.around = by_definition

    def loss(self) -> Tensor:
        if isinstance(self.model, Transformer):
            return self.model.loss(self.idx, self.targets)
        return next_token_loss(self.model, self.idx, self.targets, sliced=self.sliced)

    def run(self) -> None:
        with self.around():
            with autocast(self.cfg.precision, "cpu"):
                loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def seconds(self, steps: int = 3) -> float:
        """The quickest of some steps in a row: the first finds the caches full of another way's numbers."""
        best = float("inf")
        for _ in range(steps):
            start = self.clock()
            self.run()
            best = min(best, self.clock() - start)
        return best


class Clock(pl.Callback):
    """Seconds of the quickest step, from the start of one to the start of the next; and what passed between two."""

    def __init__(self) -> None:
        self.last, self.ended, self.best, self.between = None, None, float("inf"), []

    def on_train_batch_start(self, *_) -> None:
        now = Step.clock()
        if self.last:
            self.best = min(self.best, now - self.last)
            self.between.append(now - self.ended)
        self.last = now

    def on_train_batch_end(self, *_) -> None:
        self.ended = Step.clock()


class LightningSteps:
    """The trainer itself: `seconds()` trains for a few steps and tells the quickest, on text or on binidx data."""

    def __init__(self, size: Size, folder: str, steps: int = 5, data_type: str = "utf-8") -> None:
        text = Path(folder) / "letters.txt"
        if data_type == "binidx":
            tokens = torch.randint(0, size.V, (4_000_000,)).numpy()
            with MMapIndexedDatasetBuilder(text) as builder:
                builder.add_item(tokens)
                builder.end_document()
        else:
            text.write_text("".join(LETTERS[i % len(LETTERS)] for i in range(100_000)), encoding="utf-8")
        self.cfg = config_of(
            size, data_file=str(text), data_type=data_type, proj_dir=str(Path(folder) / "out"), epoch_steps=steps,
            my_exit_tokens=steps * size.B * size.T, random_seed=0,
        )  # fmt: skip
        self.dataset = TokenDataset(DataConfig.from_flags(self.cfg))
        self.model = RWKV(self.cfg.model_config())

    def clock(self) -> Clock:
        clock = Clock()
        train(self.cfg, model=self.model, dataset=self.dataset, callbacks=[clock], progress=False)
        return clock

    def seconds(self) -> float:
        return self.clock().best

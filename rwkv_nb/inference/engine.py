"""From a file and a strategy to something that can be called like the model, with the tokenizer that belongs to it.

    engine = load_engine("data/small.pth", "cpu bf16")
    tokenizer = tokenizer_for(engine.config, "data/small.pth")

Three engines, one call, `(idx (B, T), state, full_output=…) -> (logits, state)`:

    Decoder         cpu in fp32, bf16, fp32i8, bf16i8, with a C++ compiler: ours, 8 bits packed our way
    RWKV            one device in fp32 or bf16: ours, in PyTorch
    PackageEngine   everything else (split, streamed, fp16, 8 bits on a card): the `rwkv` package

What it is not: the choice of a strategy (`memory.best_strategy`), or the writing (`generation.py`).
"""

from __future__ import annotations

import os
import types
from pathlib import Path

import torch
from torch import Tensor

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.data.vocabulary import VOCAB_SIZE
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.model.weights import load_weights

from . import decoder
from .strategy import Plan, parse_strategy

ENGINES = ("auto", "ours", "package")


def load_engine(path: str | os.PathLike, strategy: str = "cpu fp32", engine: str = "auto"):
    """Load a `.pth` file of RWKV-5.2 as the strategy says; sizes are read from the file.

    Args:
        engine: "auto" takes ours where it can do the strategy, "ours" insists on that, "package" takes the package's.

    Raises:
        FileNotFoundError, ValueError: no such file, not RWKV-5.2, not a strategy, or one that the engine cannot do.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine = {engine!r}: choose from {', '.join(ENGINES)}")
    weights = load_weights(path)
    try:
        config = ModelConfig.from_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    plan = parse_strategy(strategy, config.n_layer)
    place = plan.places[0]
    if engine != "package" and ours_can(plan):
        dtype = getattr(torch, place.dtype)
        if plan.devices == ("cpu",) and decoder.why_not() is None:
            del weights
            storage = "int8" if place.eight_bit else place.dtype
            return decoder.Decoder(RWKV.from_checkpoint(path, dtype=None), storage, place.dtype)
        if not place.eight_bit:
            del weights
            return RWKV.from_checkpoint(path, dtype=dtype).to(place.device).eval().requires_grad_(False)
    if engine == "ours":
        raise ValueError(
            f"strategy {plan.text!r}: our engines do one device in fp32 or bf16, and 8 bits on a processor with a C++ "
            "compiler; use engine 'package' or another strategy"
        )
    del weights
    return PackageEngine(path, plan, config)


def ours_can(plan: Plan) -> bool:
    """One device and format for all layers, nothing streamed, not fp16 (the package rescales it to avoid overflow)."""
    same = len({(p.device, p.dtype, p.eight_bit) for p in plan.places}) == 1
    return same and not any(p.streamed for p in plan.places) and plan.places[0].dtype != "float16"


def tokenizer_for(config: ModelConfig, path: str | os.PathLike, given: str | os.PathLike | None = None):
    """The tokenizer of a checkpoint: World for 65536 tokens, else the vocab.json beside it, or the one that is given.

    Raises ValueError if it has another number of tokens than the model: the text would be nonsense.
    """
    beside = Path(path).with_name("vocab.json")
    if given is None and config.vocab_size == VOCAB_SIZE:
        return WorldTokenizer()
    if given is None and not beside.is_file():
        raise ValueError(
            f"{path}: the model has vocab_size = {config.vocab_size}, so its tokenizer is not the World one "
            f"({VOCAB_SIZE}); put its vocab.json beside it or give its path"
        )
    tokenizer = CharTokenizer.load(beside if given is None else given)
    if tokenizer.vocab_size != config.vocab_size:
        world = " It is a World model: give no tokenizer." if config.vocab_size == VOCAB_SIZE else ""
        raise ValueError(
            f"{given or beside}: {tokenizer.name} has {tokenizer.vocab_size} tokens, {path} needs "
            f"{config.vocab_size}: they do not belong together.{world}"
        )
    return tokenizer


class PackageEngine:
    """The `rwkv` package behind the same call. Its switches RWKV_JIT_ON and RWKV_CUDA_ON are read when it is imported.

    Rows of a batch are worked off one after the other: the package knows no batches.
    """

    training = False

    def __init__(self, path: str | os.PathLike, plan: Plan, config: ModelConfig):
        if config.n_layer < 2:
            raise ValueError(f"{path}: has n_layer = 1, which the `rwkv` package cannot load; use 'cpu fp32'")
        from rwkv.model import RWKV as Package

        self.config, self.plan = config, plan
        self.package = Package(str(path).removesuffix(".pth"), plan.text, verbose=False)
        self.emb = types.SimpleNamespace(weight=self.package.w["emb.weight"])  # where callers look for the device

    def __call__(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """idx (B, T) -> logits (B, T, V), or (B, 1, V) without full_output, and the state, batch first."""
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"PackageEngine: idx must be (B, T) with at least one token, got shape {tuple(idx.shape)}")
        rows, states = [], []
        for b, tokens in enumerate(idx.tolist()):
            own = None if state is None else [x[b].clone() for x in state]  # the package changes what it is given
            logits, own = self.package.forward(tokens, own, full_output=full_output and len(tokens) > 1)
            rows.append(logits.view(-1, self.config.vocab_size))
            states.append(own)
        return torch.stack(rows).float(), [torch.stack(parts) for parts in zip(*states, strict=True)]

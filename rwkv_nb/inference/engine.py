"""From a file and a strategy to something that can be called like the model, with the tokenizer that belongs to it.

    config = read_config("data/small.pth")                    sizes alone, no weights: quick for any file
    tokenizer = tokenizer_for(config, "data/small.pth")
    engine = load_engine("data/small.pth", "cpu bf16")

Three engines, one call, `(idx (B, T), state, full_output=…) -> (logits, state)`:

    Decoder         cpu in fp32, bf16, fp32i8, bf16i8, with a C++ compiler: ours, 8 bits packed our way
    RWKV            one device in fp32, bf16 or fp16: ours, in PyTorch
    PackageEngine   everything else (split, streamed, 8 bits on a card): the `rwkv` package

What it is not: the choice of a strategy (`memory.best_strategy`), or the writing (`generation.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.protocol import Tokenizer
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.data.vocabulary import VOCAB_SIZE
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.model.weights import load_weights

from . import decoder
from .memory import OURS, UNPACKING
from .package import PackageEngine
from .protocol import Engine
from .rescale import rescale
from .strategy import Plan, parse_strategy

ENGINES = ("auto", "ours", "package")


def load_engine(path: str | os.PathLike, strategy: str = "cpu fp32", engine: str = "auto") -> Engine:
    """Load a `.pth` file of RWKV-5.2 as the strategy says; sizes are read from the file.

    Args:
        engine: "auto" takes ours where it can do the strategy, "ours" insists on that, "package" takes the package's.

    Raises:
        FileNotFoundError, ValueError: no such file, not RWKV-5.2, not a strategy, or one that the engine cannot do.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine = {engine!r}: choose from {', '.join(ENGINES)}")
    config = read_config(path)
    plan = parse_strategy(strategy, config.n_layer)
    check_devices(plan)
    place = plan.places[0]
    if engine != "package" and ours_can(plan):
        if plan.devices == ("cpu",) and place.dtype != "float16" and decoder.why_not() is None:
            storage = "int8" if place.eight_bit else place.dtype
            # The decoder copies each matrix: read it from the file page by page, never all of them at once.
            return decoder.Decoder(RWKV.from_checkpoint(path, dtype=None, mmap=True), storage, place.dtype)
        if not place.eight_bit:
            model = RWKV.from_checkpoint(path, dtype=getattr(torch, place.dtype))
            model = rescale(model) if place.dtype == "float16" else model
            return model.to(place.device).eval().requires_grad_(False)
    if engine == "ours":
        raise ValueError(
            f"strategy {plan.text!r}: our engines do one device in one format, and 8 bits on a processor with a C++ "
            "compiler, without fp16; use engine 'package' or another strategy"
        )
    return PackageEngine(path, plan, config)


def ours_can(plan: Plan) -> bool:
    """One device and format for all layers, nothing streamed; 8 bits on a processor alone, not with fp16; not dml."""
    same = len({(p.device, p.dtype, p.eight_bit) for p in plan.places}) == 1
    first = plan.places[0]
    packed = not first.eight_bit or (first.device == "cpu" and first.dtype != "float16")
    return same and packed and first.device != "dml" and not any(p.streamed for p in plan.places)


def slowness() -> dict[str, float]:
    """What `memory.memory_plan` should count for 8 bits with engine "auto" here."""
    return OURS if decoder.why_not() is None else UNPACKING


def check_devices(plan: Plan) -> None:
    """Raise ValueError for a device that this machine has not."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in plan.devices:
        name, _, number = device.partition(":")
        missing = name == "cuda" and int(number or 0) >= cards
        missing |= name == "mps" and not torch.backends.mps.is_available()
        if missing:
            found = ["cpu", *(f"cuda:{i}" for i in range(cards))]
            raise ValueError(
                f"strategy {plan.text!r}: {device} is not there; torch sees {', '.join(found)}. Use one of them, or "
                "check the driver and that this torch is a build for it"
            )


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The sizes of a `.pth` file, from its shapes; the weights themselves are not read.

    Raises:
        FileNotFoundError, ValueError: no such file, or not RWKV-5.2.
    """
    weights = load_weights(path, mmap=True)
    try:
        return ModelConfig.from_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tokenizer_for(
    config: ModelConfig, path: str | os.PathLike, given: str | os.PathLike | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint: World for 65536 tokens, else the vocab.json beside it, or the one that is given.

    given: "rwkv_vocab_v20230424" (the package's name for World), a rwkv_vocab_….txt, or a vocab.json of characters.
    Raises ValueError if it has another number of tokens than the model: the text would be nonsense.
    """
    beside = Path(path).with_name("vocab.json")
    world = config.vocab_size == VOCAB_SIZE
    if given is None and world:
        return WorldTokenizer()
    if given is None and not beside.is_file():
        raise ValueError(
            f"{path}: the model has vocab_size = {config.vocab_size}, so its tokenizer is not the World one "
            f"({VOCAB_SIZE}); put its vocab.json beside it or give its path"
        )
    source = beside if given is None else Path(given)
    remedy = " It is a World model: give no tokenizer." if world else ""
    if source.name.startswith("rwkv_vocab"):
        tokenizer = WorldTokenizer(source) if source.is_file() else WorldTokenizer()
        name = "the World tokenizer"
    elif n := _hugging_face_tokens(source):
        what = f"{source}: a Hugging Face tokenizer of {n} tokens" + ", as the 20B one of GPT-NeoX" * (n == 50277)
        if n == config.vocab_size:
            raise ValueError(f"{what}; such files are not read here, but by the `rwkv` package's PIPELINE")
        raise ValueError(f"{what}; {path} needs {config.vocab_size}: they do not belong together.{remedy}")
    else:
        tokenizer = CharTokenizer.load(source)
        name = tokenizer.name
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{source}: {name} has {tokenizer.vocab_size} tokens, {path} needs {config.vocab_size}: they do not "
            f"belong together.{remedy}"
        )
    return tokenizer


def _hugging_face_tokens(path: Path) -> int:
    """How many tokens a Hugging Face tokenizer.json has; 0 if it is none."""
    try:
        content = json.loads(path.read_bytes())
        tokens = set(content["model"]["vocab"]) | {entry["content"] for entry in content.get("added_tokens", [])}
        return len(tokens)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0

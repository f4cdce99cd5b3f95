"""The inference script of the article, with our sampler and the right token ids.

    python scripts/run-inference-cuda.py [MODEL.pth]        'cuda fp16': a GPU of 24 GB
    python scripts/run-inference-mac.py [MODEL.pth]         'cpu fp32': 35 GB of memory

It writes 200 tokens after a prompt and then shows that a text read in pieces gives the logits of the same text read at
once. The article's last lines read ids of the 20B tokenizer; here the same words are encoded for the model at hand.

What it is not: the command for daily use, which is `python -m rwkv_nb generate`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from rwkv_nb.data.offers import OFFERS, find
from rwkv_nb.data.protocol import Tokenizer

from .engine import load_engine, read_config, tokenizer_for
from .generation import generate
from .protocol import Engine
from .sampling import SamplingArgs
from .strategy import parse_strategy

PROMPT = "\nAttention Free Transformer is"
ARGS = SamplingArgs(temperature=1.0, top_p=0.7, top_k=100, alpha_frequency=0.25, alpha_presence=0.25,
                    alpha_decay=0.996, token_ban=(0,), token_stop=(), chunk_len=256)  # fmt: skip
WORDS = "\nThe following is a"  # what the ids of the article, 187 510 1563 310 247, mean to the 20B tokenizer
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # of the largest logit: rounding, in another order


def main(strategy: str, argv: Sequence[str] | None = None) -> int:
    """Run the script; `strategy` is its default. Returns the exit code."""
    name = next(iter(OFFERS["eagle-7b"].files))
    parser = argparse.ArgumentParser(description="Write 200 tokens with a World model, then read a text in pieces.")
    parser.add_argument("model", nargs="?", help=f"a .pth of RWKV-5.2; default: {OFFERS['eagle-7b'].folder}/{name}")
    parser.add_argument("--strategy", default=strategy)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args(argv)
    path = options.model or next(iter(find("eagle-7b") or ()), None)
    if path is None:
        parser.error(f"no {name} here; fetch it with `python -m rwkv_nb download eagle-7b`, or give another model")
    try:
        config = read_config(path)
        tokenizer = tokenizer_for(config, path)
        engine = load_engine(path, options.strategy)
        write(engine, tokenizer, options.tokens, options.seed)
        same = in_pieces(engine, tokenizer.encode(WORDS), options.strategy)
        print(f"read in pieces, the logits are the same: {same}")
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    return 0


def write(engine: Engine, tokenizer: Tokenizer, n_tokens: int, seed: int | None = None) -> str:
    """Print the prompt and what follows, as it comes; returns the text."""
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    print(PROMPT, end="", flush=True)
    text = ""
    for piece in generate(engine, tokenizer, PROMPT, n_tokens, ARGS, generator=generator):
        print(piece, end="", flush=True)
        text += piece
    print("\n")
    return text


@torch.no_grad()
def in_pieces(engine: Engine, ids: list[int], strategy: str) -> str:
    """"yes" if one call, and three with a state, end with the same logits; else "NO" and by how much."""
    device = engine.emb.weight.device
    whole, _ = engine(torch.tensor([ids], device=device), None, full_output=False)
    state = None
    for piece in (ids[:2], ids[2:3], ids[3:]):
        pieces, state = engine(torch.tensor([piece], device=device), state, full_output=False)
    apart = float((whole - pieces).abs().max()) / float(whole.abs().max())
    formats = {place.dtype for place in parse_strategy(strategy, engine.config.n_layer).places}
    same = apart < max(TOLERANCE[name] for name in formats)
    return "yes" if same else f"NO, they differ by {apart:.2g} of the largest"

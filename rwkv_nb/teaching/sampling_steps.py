"""From logits to chances step by step, and what the sampling panel shows of it: plain functions, no widgets.

    stages(logits, args)       label -> probabilities (V,) after each step, in the order in which they are taken
    chances_html(...)          the likeliest tokens with a bar for each step
    load(path, strategy)       an engine and its tokenizer

What it is not: a second sampler. Every stage is asked of `filter_probs` itself, with the later knobs set to do nothing.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.corpus import ALPHABET
from rwkv_nb.inference.engine import load_engine, tokenizer_for
from rwkv_nb.inference.row import Row
from rwkv_nb.inference.sampling import SamplingArgs, filter_probs
from rwkv_nb.teaching.widgets.tokenizer import readable

MODEL, PENALTIES, TOP_P, TOP_K, TEMPERATURE = STAGES = (
    "model", "penalties, bans", "top_p", "top_k", "temperature",
)  # fmt: skip
PAIRS = (("temperature", "alpha_presence"), ("top_p", "alpha_frequency"), ("top_k", "alpha_decay"))  # knobs of a row
SHOWN = 12  # tokens in the table
CELL = "border:1px solid #888; padding:0.1em 0.5em; text-align:left; min-width:7.5em"
BAR = "display:inline-block; height:0.7em; background:#0072B2; margin-right:0.4em"
FRAME = "white-space:pre-wrap; border:1px solid #888; padding:0.4em; font-family:monospace; line-height:1.35"


def stages(logits: Tensor, args: SamplingArgs, after: Tensor | None = None) -> dict[str, Tensor]:
    """Label -> probabilities (V,) float64 after each of STAGES; the last is what a token is drawn with.

    after: the logits less the penalties; None: there are none. Raises ValueError as `filter_probs`.
    """
    left = (logits if after is None else after).clone()
    if args.token_ban and max(args.token_ban) >= len(left):
        raise ValueError(f"token_ban holds {max(args.token_ban)}, the vocabulary ends at {len(left) - 1}")
    left[list(args.token_ban)] = -math.inf
    return {
        MODEL: filter_probs(logits, 1.0, 1.0, 0),
        PENALTIES: filter_probs(left, 1.0, 1.0, 0),
        TOP_P: filter_probs(left, 1.0, args.top_p, 0),
        TOP_K: filter_probs(left, 1.0, args.top_p, args.top_k),
        TEMPERATURE: filter_probs(left, args.temperature, args.top_p, args.top_k),
    }


def after(tokenizer, args: SamplingArgs, drawn: Sequence[int], logits: Tensor) -> Tensor:
    """Logits less the penalties that these tokens, drawn one after the other, have earned with these settings."""
    row = Row(tokenizer, len(logits), 0, args)
    for token in drawn:
        row.count(token)
    return row.penalised(logits)


def label(tokenizer, token: int) -> str:
    """A token for the eye: its text with blanks made visible, bytes in hexadecimal, or what it stands for."""
    entry = tokenizer.vocab.get(token)
    if entry is None:
        return "end of document" if token == 0 else "no text"
    return readable(entry)


def likeliest(chances: dict[str, Tensor], n: int = SHOWN) -> list[int]:
    """The n tokens that matter: likeliest after any step, in the order of the first. None that is cut everywhere."""
    best = torch.stack(list(chances.values())).amax(0)
    chosen = torch.sort(best, descending=True, stable=True).indices[:n]
    first = next(iter(chances.values()))
    return sorted(chosen[best[chosen] > 0].tolist(), key=lambda token: (-float(first[token]), token))


def rows(chances: dict[str, Tensor], tokenizer, n: int = SHOWN) -> list[tuple[str, list[float]]]:
    """(what, its probability after each step) for the n likeliest tokens, then for all others together."""
    tokens = likeliest(chances, n)
    table = [(f"{label(tokenizer, t)} ({t})", [float(p[t]) for p in chances.values()]) for t in tokens]
    rest = [max(0.0, 1 - sum(values)) for values in zip(*(values for _, values in table), strict=True)]
    others = len(next(iter(chances.values()))) - len(tokens)
    return [*table, (f"{others:,} others", rest)] if others else table


def percent(p: float) -> str:
    return "–" if p == 0 else "<0.1 %" if p < 0.001 else f"{100 * p:.1f} %"


def chances_html(chances: dict[str, Tensor], tokenizer, tail: str = "") -> str:
    """A table of bars, one column a step; a token that a step has cut has a dash."""
    head = "".join(f"<th scope='col' style='{CELL}'>{html.escape(name)}</th>" for name in chances)
    kept = "".join(f"<td style='{CELL}'>{int((p > 0).sum())}</td>" for p in chances.values())
    body = "".join(
        f"<tr><th scope='row' style='{CELL}'>{html.escape(what)}</th>"
        + "".join(
            f"<td style='{CELL}'><span style='{BAR}; width:{6 * p:.2f}em'></span>{percent(p)}</td>" for p in values
        )
        + "</tr>"
        for what, values in rows(chances, tokenizer)
    )
    after_what = f" after <code>…{html.escape(readable(tail.encode()))}</code>" if tail else ""
    return (
        f"<p><b>The next token</b>{after_what}: its chances after each step</p><table style='border-collapse:collapse'>"
        f"<tr><th scope='col' style='{CELL}'>token (id)</th>{head}</tr>{body}"
        f"<tr><th scope='row' style='{CELL}'>tokens left</th>{kept}</tr></table>"
    )


def text_html(prompt: str, text: str) -> str:
    """The prompt in grey, what was written in black, nothing obeyed as HTML."""
    return (
        f"<div style='{FRAME}; min-height:4em'><span style='opacity:0.65'>{html.escape(prompt)}</span>"
        f"<span>{html.escape(text)}</span></div>"
    )


def note(text: str) -> str:
    return f"<p role='status'>{html.escape(text)}</p>"


def settings(args: SamplingArgs, seed: int) -> str:
    """The settings of a run in short: what differs from doing nothing, and the seed."""
    nothing = SamplingArgs(1.0, 1.0, 0, 0.0, 0.0, args.alpha_decay, chunk_len=args.chunk_len)
    told = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name in SamplingArgs.__dataclass_fields__
        if (value := getattr(args, name)) != getattr(nothing, name) or name in ("temperature", "top_p")
    ]
    if args.alpha_frequency:
        told.append(f"alpha_decay {args.alpha_decay:g}")
    return ", ".join([*told, f"seed {seed}"])


def history_html(runs: Sequence[tuple[str, str, str]]) -> str:
    """Runs (settings, prompt, text) side by side, the newest first."""
    boxes = "".join(
        f"<div style='flex:1 1 16em; min-width:16em; max-width:26em'><p><b>{html.escape(how)}</b></p>"
        f"{text_html(prompt, text)}</div>"
        for how, prompt, text in runs
    )
    side_by_side = "display:flex; flex-wrap:wrap; gap:0.8em"
    return f"<p><b>Runs so far</b>, the newest first</p><div style='{side_by_side}'>{boxes}</div>"


def ids(text: str, name: str) -> tuple[int, ...]:
    """Token ids from "3, 5 7". Raises ValueError naming the field and what is no id."""
    parts = text.replace(",", " ").split()
    for part in parts:
        if not part.isascii() or not part.isdigit():
            raise ValueError(f"{name}: {part!r} is no token id; give whole numbers, as in the brackets of the table")
    return tuple(int(part) for part in parts)


def stop_texts(text: str) -> list[str]:
    r"""Stop texts from "\n\n|User:"; \n stands for a new line, \t for a tabulator."""
    return [part.replace("\\n", "\n").replace("\\t", "\t") for part in text.split("|") if part]


def own_runs(folder: str | os.PathLike) -> list[str]:
    """The trained checkpoints in a folder and the folders in it, the newest first."""
    found = [p for pattern in ("*.pth", "*/*.pth") for p in Path(folder).glob(pattern) if p.name != "rwkv-init.pth"]
    return [str(path) for path in sorted(found, key=lambda p: (-p.stat().st_mtime, str(p)))]


def load(path: str | os.PathLike, strategy: str = "cpu fp32"):
    """(engine, tokenizer) of a checkpoint; a model of 96 tokens without a vocab.json has this course's characters."""
    engine = load_engine(path, strategy)
    if engine.config.vocab_size == len(ALPHABET) and not Path(path).with_name("vocab.json").is_file():
        return engine, CharTokenizer(ALPHABET)
    return engine, tokenizer_for(engine.config, path)

"""What people type: strategy strings, against a parser of their grammar written once more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

from rwkv_nb.inference.strategy import StrategyError, parse_strategy

from . import demand, refusal

GRAMMAR = r"\s*(cpu|cuda(?::[0-9]+)?|mps|dml)\s+(fp32|fp16|bf16)(i8|i4|i3)?(?:\s+\*0*([0-9]{1,12})(\+)?)?\s*"


def dealt(text: str, n_layer: int) -> list[tuple] | None:
    """The independent path: (device, format, 8 bits, streamed) of each place by the package's rules, or None."""
    entries = [re.fullmatch(GRAMMAR, part) for part in text.split("->")]
    if not all(entries) or any(e[4] and int(e[4]) == 0 and not e[5] for e in entries):
        return None
    left, asked = n_layer + 1, []
    for e in entries:
        count = min(left, int(e[4])) if e[4] else 0
        asked.append(count)
        left -= count
    streaming = max((i for i, e in enumerate(entries) if e[5]), default=None)
    extra = [0] * len(entries)
    free = [i for i, e in enumerate(entries) if not e[4]]
    if streaming is not None:
        extra[streaming] = left
    elif free:
        for n, i in enumerate(free):
            extra[i] = (left - sum(extra)) // (len(free) - n)
    else:
        extra[-1] = left
    places = []
    for i, e in enumerate(entries):
        kind = (e[1], {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[e[2]], e[3] == "i8")
        places += [(*kind, False)] * asked[i] + [(*kind, i == streaming)] * extra[i]
    return places


def strategies(folder: Path) -> Callable[[Random], str]:
    """The right places, or a StrategyError that points at a character of the text."""
    devices, formats = (
        ("cpu", "cuda", "cuda:0", "cuda:17", "mps", "dml"),
        ("fp32", "fp16", "bf16", "fp16i8", "bf16i4", "fp32i3"),
    )
    noise = [
        "cpu",
        "fp32",
        "->",
        "*",
        "*1",
        "*0",
        "*0+",
        "+",
        "*-1",
        "gpu",
        "cuda:",
        "cuda:x",
        "fp64",
        "i8",
        ">",
        "-",
        "\n",
        "\t",
        "*" + "9" * 5000,
        "*99999999999",
        "*٣",
        "cuda:٣",
        "*1.5",
        "CPU",
        "\0",
        "é",
        "- >",
        "*²",
        "*3++",
        "cpu:0",
    ]

    def entry(draw: Random) -> str:
        odd = draw.choice([word for word in noise if word[0] == "*"])
        count = draw.choice(("", "", f" *{draw.randint(0, 40)}", f" *{draw.randint(0, 40)}+"))
        count = f" {odd}" if draw.random() < 0.03 else count
        device = "cuda:٣" if draw.random() < 0.01 else draw.choice(devices)
        return f"{device} {draw.choice(formats)}{count}"

    def some(draw: Random) -> str:
        text = draw.choice((" -> ", "->", " ->  ")).join(entry(draw) for _ in range(draw.randint(1, 4)))
        for _ in range(draw.choice((0, 0, 1, 2))):
            a = draw.randint(0, len(text))
            b = min(len(text), a + draw.randint(0, 3))
            text = text[:a] + draw.choice((draw.choice(noise), "", " ")) + text[b:]
        return text

    def case(draw: Random) -> str:
        text, n_layer = some(draw), draw.choice((1, 2, 12, 32))
        truth = dealt(text, n_layer)
        try:
            plan = parse_strategy(text, n_layer)
        except StrategyError as error:
            demand(truth is None, f"{text!r} is refused: {error}")
            demand(re.search(r"\^ character \d+$", str(error)), f"no place is shown: {error}")
            return refusal(error, "strategy")
        demand(truth is not None, f"{text!r} is taken")
        places = [(p.device, p.dtype, p.eight_bit, p.streamed) for p in plan.places]
        demand(
            places == truth and [p.index for p in plan.places] == list(range(n_layer + 1)), f"{text!r}: other places"
        )
        again = parse_strategy(plan.text, n_layer)
        demand(again.places == plan.places, f"{text!r}: not the same once more")
        return "right"

    return case

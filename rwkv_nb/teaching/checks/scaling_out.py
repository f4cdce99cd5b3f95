"""Checks of notebook 10: tokens of a step and length of a run, memory under ZeRO, time from operations."""

from __future__ import annotations

import math

from rwkv_nb.teaching.checks import exercise, require
from rwkv_nb.training import planner


def _number(value: object, call: str) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(good, f"{call} gave {value!r}; a number was expected. Is there a return?")
    return float(value)


@exercise("10.1", "Steps of a run", minutes=8, difficulty=2)
def n_steps(answer):
    """answer(tokens, num_nodes, devices, micro_bsz, accumulate, ctx_len) -> optimizer steps for so many tokens."""

    def steps(*args: int) -> float:
        return _number(answer(*args), f"n_steps{args}")

    found = steps(1000, 1, 1, 1, 1, 100)
    require(found != 1000, "Each sample has ctx_len tokens: does ctx_len enter?")
    require(found == 10, f"1000 tokens, one device, one window of 100 a step: 10 steps, yours {found:g}.")
    require(steps(1000, 1, 1, 5, 1, 100) == 2, "micro_bsz 5: five windows a step on a device. Does micro_bsz enter?")
    require(steps(1000, 1, 2, 1, 1, 100) == 5, "Two devices read twice as much a step. Does devices enter?")
    require(steps(1000, 2, 1, 1, 1, 100) == 5, "num_nodes counts machines, devices those in each: multiply both.")
    found = steps(1000, 1, 1, 1, 2, 100)
    require(found != 20, "accumulate_grad_batches 2 makes a step of two batches: fewer steps, not more.")
    require(found == 5, "accumulate_grad_batches 2: two batches are read before the one step. Does it enter?")
    found = steps(1001, 1, 1, 1, 1, 100)
    require(found != 10, "1001 tokens: after 10 steps one token is missing. The run ends when all are read: round up.")
    require(found == 11, f"1001 tokens at 100 a step: 11 steps, yours {found:g}. Whole steps only, rounded up.")
    for args in ((1498226207, 1, 1, 16, 1, 512), (332115325534, 8, 8, 4, 3, 4096)):
        right = -(-args[0] // math.prod(args[1:]))
        require(steps(*args) == right, f"n_steps{args}: {right}, yours {steps(*args):g}. Do floats round?")
    return f"minipile with the demo script takes {-(-1498226207 // (16 * 512)):,} steps."


@exercise("10.2", "Memory under ZeRO", minutes=12, difficulty=3)
def zero_bytes(answer):
    """answer(P, n, stage) -> bytes on each of n devices for weights, gradients and Adam, stages 0 to 3."""

    def found(P: int, n: int, stage: int) -> float:
        return _number(answer(P, n, stage), f"zero_bytes({P}, {n}, {stage})")

    alone = found(1000, 1, 0)
    require(alone != 8000, "2 + 2 bytes for weights and gradients, and Adam's 12: did you leave out some of the three "
                           "float32 numbers that the optimizer holds?")
    require(alone == 16000, f"One device, nothing cut: 2 + 2 + 12 = 16 bytes a parameter, yours {alone / 1000:g}.")
    require(found(1000, 4, 0) != 4000, "Stage 0 cuts nothing: each device holds all 16 bytes, however many there are.")
    require(found(1000, 4, 0) == 16000, f"Stage 0 on 4 devices: 16000 on each, yours {found(1000, 4, 0):g}.")
    one = found(1000, 4, 1)
    require(one != 4000, "Stage 1 cuts Adam's 12 bytes alone; weights and gradients stay whole.")
    require(one == 7000, f"Stage 1, 4 devices: 2 + 2 + 12 / 4 = 7 bytes a parameter, yours {one / 1000:g}.")
    two = found(1000, 4, 2)
    require(two != one, "Stage 2 is the same as stage 1 in yours: it cuts the gradients too.")
    require(two == 5500, f"Stage 2, 4 devices: 2 + (2 + 12) / 4 = 5.5 bytes a parameter, yours {two / 1000:g}.")
    three = found(1000, 4, 3)
    require(three != two, "Stage 3 is the same as stage 2 in yours: it cuts the weights too.")
    require(three == 4000, f"Stage 3, 4 devices: all 16 bytes divided by 4, yours {three / 1000:g}.")
    for stage in (1, 2, 3):
        right = planner.state_bytes(7_500_000_000, f"deepspeed_stage_{stage}", 64).total
        value = found(7_500_000_000, 64, stage)
        require(math.isclose(value, right), f"7.5e9 parameters on 64 devices, stage {stage}: {right / 1e9:.1f} GB.")
    return "the figures of the ZeRO paper."


@exercise("10.3", "How long will it take?", minutes=10, difficulty=3)
def training_hours(answer):
    """answer(P, tokens, n, peak, utilisation) -> hours, with 6 operations a parameter and token."""

    def hours(*args: float) -> float:
        return _number(answer(*args), f"training_hours{args}")

    base = (1e6, 6e8, 1, 1e12, 1.0)  # 3.6e15 operations at 1e12 a second: 3600 seconds
    found = hours(*base)
    require(not math.isclose(found, 3600), "That is in seconds. An hour has 3600 of them.")
    require(not math.isclose(found, 1 / 3), "2 operations a parameter and token are the forward pass alone; the "
                                            "backward pass costs twice as much again: 6 in all.")
    require(math.isclose(found, 1), f"1e6 parameters, 6e8 tokens at 1e12 a second: 1 hour, yours {found:g}. "
                                    "Is it 6 * P * tokens / rate / 3600?")
    half = hours(1e6, 6e8, 1, 1e12, 0.5)
    require(not math.isclose(half, 0.5), "Half the utilisation takes longer, not less: it multiplies the rate.")
    require(math.isclose(half, 2), f"At half the rate it takes 2 hours, yours {half:g}. Does utilisation enter?")
    four = hours(1e6, 6e8, 4, 1e12, 1.0)
    require(not math.isclose(four, 4), "Four devices share the work: the time goes down.")
    require(math.isclose(four, 0.25), f"Four devices: a quarter of an hour, yours {four:g}. Does n enter?")
    right = 6 * 7.5e9 * 1.1e12 / (64 * 312e12 * 0.4) / 3600
    require(math.isclose(hours(7.5e9, 1.1e12, 64, 312e12, 0.4), right), f"A large run: {right:.0f} hours.")
    return "now multiply by the price."

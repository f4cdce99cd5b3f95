"""Checks of notebook 09: the size of a state, 8 bits with a scale a row, a strategy for a small card, mistakes."""

from __future__ import annotations

import torch

from rwkv_nb.inference import report
from rwkv_nb.inference.memory import Device, best_strategy, memory_plan
from rwkv_nb.inference.strategy import StrategyError, parse_strategy
from rwkv_nb.teaching.checks import exercise, require
from rwkv_nb.teaching.model_sizes import official

SMALL_CARD = {"cpu": Device(32e9, 50e9), "cuda": Device(8e9, 272e9)}  # a card of 8 GB in a computer with 32
CLAIMS = {  # letter -> (strategy, what its writer wants of it, true or not, what to look at)
    "a": ("cuda fp16i8 *10 -> cpu fp32", "10 layers in 8 bits on the card, 23 places on the processor", True, ""),
    "b": ("cuda fp16 *40 -> cpu fp32", "the card takes what it can, the processor the rest", False,
          "The count is an order, not a limit. How many places has the model, and what is left of them?"),
    "c": ("cuda fp16 -> cpu fp32 *1", "everything on the card but the head", True, ""),
    "d": ("cuda fp16 -> cpu fp32", "everything on the card, and what does not fit on the processor", False,
          "Nobody looks whether it fits. What do two entries without a count do with the places?"),
    "e": ("cuda fp16i4", "the matrices in 4 bits: a quarter of the memory", False,
          "Which of i8, i4 and i3 changes what is stored? Print the plan's notes."),
    "f": ("cuda fp16i8 *0+ -> cpu fp32 *1", "all blocks streamed through the card, the head on the processor", True,
          ""),
    "g": ("cuda fp16 *10+ -> cpu fp32", "10 blocks on the card, the other 23 places on the processor", False,
          "What does the + do with the places that are left?"),
}  # fmt: skip


@exercise("9.1", "How large is a memory?", minutes=6, difficulty=2)
def state_bytes(answer):
    """answer(n_layer, n_embd, head_size) -> bytes of the state of one text in float32."""

    def size(*args: int) -> float:
        found = answer(*args)
        good = isinstance(found, (int, float)) and not isinstance(found, bool)
        require(good, f"state_bytes{args} gave {found!r}; a number was expected. Is there a return?")
        return found

    one = size(1, 64, 64)
    require(one != 2 * 64 + 64 * 64, "That is the count of numbers. In float32 each has 4 bytes.")
    require(one != 4 * 64 * 64, "The matrix of the head is right. Token shift remembers the last x, in both mixings.")
    require(one != 4 * (64 + 64 * 64), "Both mixings, time and channel, keep their last x: twice n_embd, not once.")
    require(one == 4 * (2 * 64 + 64 * 64), f"One layer, one head of 64: 4 * (2 * 64 + 64 * 64), yours is {one:g}.")
    require(size(3, 64, 64) == 3 * one, "Each layer has a state of its own: does n_layer enter?")
    two = size(1, 128, 64)
    require(two != 4 * (2 * 128 + 128 * 128), "With n_embd 128 there are two heads of 64 x 64, not one of 128 x 128.")
    require(two != 4 * (2 * 128 + 64 * 64), "n_embd 128 has two heads of 64: n_embd / head_size matrices.")
    require(two == 4 * (2 * 128 + 2 * 64 * 64), f"n_embd 128: 4 * (2 * 128 + 2 * 64 * 64), yours is {two:g}.")
    require(size(1, 128, 32) == 4 * (2 * 128 + 4 * 32 * 32), "Heads of 32: four of 32 x 32. Does head_size enter?")
    require(size(32, 4096, 64) == 4 * 8650752, "Eagle 7B: 4 * 8,650,752 bytes. Are whole numbers kept whole?")
    return f"Eagle 7B remembers any text in {report.size(4 * 8650752)}."


@exercise("9.2", "Eight bits and a scale", minutes=12, difficulty=3)
def quantise(answer):
    """answer(W) -> (numbers int8 (R, C), scales (R, 1)) with W close to numbers * scales."""

    def stored(W):
        kept = W.clone()
        found = answer(W)
        good = isinstance(found, tuple) and len(found) == 2 and all(isinstance(x, torch.Tensor) for x in found)
        require(good, f"quantise(W) gave {type(found).__name__}; return two tensors: numbers, scales.")
        require(torch.equal(W, kept), "Your function changed W itself: work on a copy.")
        return found

    W = torch.tensor([[1.0, -0.5, 0.25], [0.01, 0.02, -0.04]])
    numbers, scales = stored(W)
    require(numbers.dtype == torch.int8, f"numbers are {numbers.dtype}; .to(torch.int8) at the end stores a byte each.")
    require(numbers.shape == W.shape, f"numbers have shape {tuple(numbers.shape)}, W has {tuple(W.shape)}.")
    require(scales.numel() != 1, "One scale for the whole matrix: the second row, with its small weights, loses all.")
    require(tuple(scales.shape) == (2, 1), f"scales have shape {tuple(scales.shape)}; one a row is (2, 1): keepdim?")
    back = numbers.float() * scales
    require(not torch.equal(back.sign(), -W.sign()), "The signs are turned round.")
    require(float(back[0, 0]) > 0, "The largest weight came back with another sign: a byte overflowed. 127 is the most "
                                   "that int8 holds.")
    top = numbers.int().abs().amax(1).tolist()
    require(min(top) >= 126, f"The largest of each row is {top}; let it become 127, so that all levels are used.")
    third = torch.tensor([[1.0, 0.0059, -0.0059]])  # 0.75 of a step
    numbers, scales = stored(third)
    require(numbers[0, 1:].tolist() != [0, 0], "0.75 of a step became 0: int8 cuts off; torch.round first.")
    require(numbers[0, 1:].tolist() == [1, -1], f"0.75 of a step must become 1, -1; yours {numbers[0, 1:].tolist()}.")
    numbers, scales = stored(torch.zeros(2, 3))
    require(bool(torch.isfinite(scales).all()), "A row of zeros gives NaN or infinity: do you divide by its largest?")
    require(not numbers.any(), "A row of zeros must come back as zeros.")
    g = torch.Generator().manual_seed(0)
    W = torch.randn(50, 200, generator=g) * torch.rand(50, 1, generator=g)
    numbers, scales = stored(W)
    require(bool(((numbers.float() * scales - W).abs() <= 0.501 * scales).all()), "Some weight is off by more than "
            "half a step. Is it numbers * scales that gives W back?")
    return "one byte a weight, and 4 for each row."


@exercise("9.3", "7B on a card of 8 GB", minutes=10, difficulty=3)
def small_card(answer):
    """answer: a strategy for Eagle 7B on SMALL_CARD."""
    require(isinstance(answer, str), f"Give the strategy as a text, such as 'cpu fp32'; this is {answer!r}.")
    if "your turn" in answer:
        raise NotImplementedError
    config = official("7B")
    try:
        plan = parse_strategy(answer, config.n_layer)
    except StrategyError as error:
        require(False, str(error))
    needed = memory_plan(plan, config)
    lacking = needed.lacking(SMALL_CARD)
    if lacking:
        where = ", ".join(f"{report.size(size)} on {name}" for name, size in lacking.items())
        advice = " Fewer layers on the card, or 8 bits?" if "cuda" in lacking else " bf16 has half the bytes of fp32."
        require(False, f"It does not fit, with a tenth to spare: {where} are missing.{advice}")
    speed, best = needed.tokens_per_second(SMALL_CARD), best_strategy(config, SMALL_CARD)
    limit = best.tokens_per_second(SMALL_CARD)
    found = f"{report.speed_text(speed)} tokens a second at most"
    require(set(needed.weights) != {"cpu"}, f"It fits, {found}, but the card has nothing to do. Give it layers.")
    require(not needed.streamed, f"It fits, {found}, but streaming sends weights over the slow bus for each token.")
    require(any(place.eight_bit for place in plan.places), f"It fits, {found}. More layers fit on the card in 8 bits.")
    on_cpu = {place.dtype for place in plan.places if place.device == "cpu"}
    good = speed > 0.9 * limit
    require(good or "float32" not in on_cpu, f"It fits, {found}. What the processor reads in fp32 is half in bf16.")
    require(good, f"It fits, {found}, of {report.speed_text(limit)} that are possible. Fill the card.")
    return f"{found}, by bandwidth."


@exercise("9.4", "Spot the wrong strategies", minutes=8, difficulty=2)
def spot(answer):
    """answer: the letters of the CLAIMS that are not true."""
    if answer == "your turn":
        raise NotImplementedError
    good = isinstance(answer, (str, set, list, tuple)) and all(isinstance(x, str) for x in answer)
    require(good, f"Give the letters as a text, such as 'ab'; this is {answer!r}.")
    letters = {x.strip().lower() for x in answer} - {"", ","}
    require(letters <= set(CLAIMS), f"The letters go from a to {max(CLAIMS)}; yours are {', '.join(sorted(letters))}.")
    for letter, (text, claim, true, hint) in CLAIMS.items():
        require(not (true and letter in letters), f"{letter} does what is claimed: {text!r} gives {claim}.")
        require(true or letter in letters, f"Look again at {letter}, {text!r}. {hint}")
    return "these four are asked about most often."

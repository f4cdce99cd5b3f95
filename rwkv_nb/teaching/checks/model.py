"""Checks of notebook 06: token shift, receptance, norm of the heads, a count of parameters, the size of a state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.teaching.checks import exercise, require
from rwkv_nb.teaching.model_sizes import OFFICIAL, official, state_numbers


def _draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _near(found: Tensor, right: Tensor) -> bool:
    return found.shape == right.shape and torch.allclose(found.double(), right.double(), rtol=1e-6, atol=1e-9)


def _has_shape(found: object, shape: tuple[int, ...], name: str) -> None:
    require(isinstance(found, Tensor), f"{name} should be a tensor, yours is {type(found).__name__}.")
    require(tuple(found.shape) == shape, f"{name} should have shape {shape}, yours has {tuple(found.shape)}.")


def _shift(x: Tensor, x_prev: Tensor) -> Tensor:
    return torch.cat([x_prev[:, None], x[:, :-1]], dim=1)


@exercise("6.1", "Token shift with a state", minutes=8, difficulty=2)
def token_shift(answer):
    """answer(x, x_prev, mu) -> (mixture (B, T, D), the next x_prev (B, D))."""
    B, T, D = 3, 5, 4
    x, x_prev = _draw((B, T, D), (B, D))
    ones, zeros, mu = torch.ones(D).double(), torch.zeros(D).double(), torch.linspace(0.1, 0.9, D).double()

    def run(x: Tensor, x_prev: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        kept = x.clone(), x_prev.clone()
        pair = answer(x, x_prev, mu)
        require(isinstance(pair, tuple) and len(pair) == 2, "Return two things: the mixture, and the next x_prev.")
        require(torch.equal(x, kept[0]) and torch.equal(x_prev, kept[1]), "Your function changed its arguments.")
        _has_shape(pair[0], tuple(x.shape), "The mixture")
        _has_shape(pair[1], tuple(x_prev.shape), "The next x_prev")
        return pair

    present, _ = run(x, x_prev, ones)
    require(not _near(present, _shift(x, x_prev)),
            "With mu = 1 you give the step before. mu is the share of the present.")
    require(_near(present, x), "With mu = 1 the mixture should be x itself.")
    past, last = run(x, x_prev, zeros)
    require(not _near(past[:, :-1], x[:, 1:]), "With mu = 0 you look into the future: step t should see x at t - 1.")
    require(not _near(past[0, 1:], x[0, 1:]) and not _near(past[1:], x[:-1]),
            "You shifted along the batch: each text should see its own past. Time is axis 1.")
    require(not _near(past[:, 0], x[:, -1]), "The first step sees the last one: torch.roll goes round in a circle.")
    require(not _near(past[:, 0], torch.zeros(B, D)), "The first step sees zeros. Before it there is x_prev.")
    require(_near(past, _shift(x, x_prev)), "With mu = 0 the mixture should be x_prev, then x without its last step.")
    mixed, after = run(x, x_prev, mu)
    require(_near(mixed, x * mu + _shift(x, x_prev) * (1 - mu)),
            "mu = 0 and mu = 1 are right, but not what lies between: x mu + before (1 - mu).")
    require(not _near(after, mixed[:, -1]), "The next x_prev is the last x, not the last mixture.")
    require(not _near(after, x_prev), "You return the old x_prev. The next call's past is the last x of this one.")
    require(_near(after, x[:, -1]) and _near(last, x[:, -1]), "The next x_prev should be x[:, -1].")
    first, middle = run(x[:, :2], x_prev, mu)
    second, _ = run(x[:, 2:], middle, mu)
    single, _ = run(x[:, :1], x_prev, mu)
    require(_near(torch.cat([first, second], 1), mixed) and _near(single, mixed[:, :1]),
            "One text in two pieces should give the same as the whole.")
    return "one text or two pieces of it, the same numbers."


@exercise("6.2", "The receptance", minutes=8, difficulty=2)
def receptance(answer):
    """answer(x, mu, W, H) -> r (B, T, H, N), from a text's start."""
    B, T, D, H, N = 2, 5, 6, 3, 4
    x, W = _draw((B, T, D), (H * N, D), seed=1)
    mu = torch.linspace(0.2, 0.8, D).double()
    r = answer(x, mu, W, H)
    _has_shape(r, (B, T, H, N), "r (with B = 2, T = 5, H = 3, N = 4)")
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    flat = (x * mu + before * (1 - mu)) @ W.T
    require(not _near(r, (x @ W.T).view(B, T, H, N)), "The token before is missing: mix x with its shift first.")
    swapped = (before * mu + x * (1 - mu)) @ W.T
    require(not _near(r, swapped.view(B, T, H, N)), "The shares are swapped. mu belongs to the present.")
    require(not _near(r, flat.view(B, T, N, H).transpose(2, 3)),
            "The channels are dealt out in turns. A head owns neighbours: the first N of the H N channels are head 0.")
    require(not _near(r, flat.view(B, H, T, N).transpose(1, 2)),
            "view(B, H, T, N) cuts through time. Split the last axis: view(B, T, H, N).")
    require(not _near(r, torch.sigmoid(flat).view(B, T, H, N)),
            "You applied a sigmoid. RWKV-4 did; in RWKV-5 only the channel mixing does.")
    require(_near(r, flat.view(B, T, H, N)), "The shape is right, the numbers are not: r = W applied to the mixture.")
    square, x = _draw((4, 4), (1, 2, 4), seed=2)
    mu = torch.ones(4).double()
    require(not _near(answer(x, mu, square, 2), (x @ square).view(1, 2, 2, 2)),
            "With a square matrix you multiply by W where W.T is due. Linear layers keep W as (out, in).")
    return "k, v and g are made in the same way."


@exercise("6.3", "The norm of the heads", minutes=10, difficulty=3)
def head_norm(answer):
    """answer(y, weight, bias, divisor) -> (B, T, H N)."""
    B, T, H, N, divisor = 2, 3, 3, 8, 8
    [y], [weight, bias] = _draw((B, T, H, N), seed=3), _draw((H * N,), (H * N,), seed=4)
    y = y * torch.tensor([0.03, 0.1, 5.0]).double()[:, None] + 0.02  # two quiet heads, so that eps counts

    def truth(eps: float, axes: int = 1, correction: int = 0, centre: bool = True) -> Tensor:
        flat = y if axes == 1 else y.flatten(2)
        mean = flat.mean(-1, keepdim=True) if centre else 0.0
        z = (flat - mean) / (flat.var(-1, keepdim=True, correction=correction) + eps).sqrt()
        return z.reshape(B, T, H * N) * weight + bias

    found = answer(y, weight, bias, divisor)
    _has_shape(found, (B, T, H * N), "The result")
    eps = 1e-5 * divisor**2
    require(not _near(found, truth(eps, axes=2)) and not _near(found, truth(1e-5, axes=2)),
            "All heads share one mean and variance. Each head should be normalised by itself, over its N channels.")
    require(not _near(found, truth(1e-5)), "The divisor has no effect. y / 8 is quieter, so eps weighs more.")
    require(not _near(found, truth(1e-5 * divisor)), "You multiply eps by the divisor. It takes its square.")
    require(not _near(found, truth(1e-5 / divisor**2)), "eps should grow with the divisor: it is y that is divided.")
    require(not _near(found, truth(eps, correction=1)), "Your variance divides by N - 1. Norms divide by N.")
    require(not _near(found, (truth(eps) - bias) / weight), "weight and bias are missing.")
    require(not _near(found, (truth(eps) - bias) / weight * weight + bias * weight), "The bias comes after the weight.")
    require(_near(found, truth(eps)), "The shape is right, the numbers are not. Mean 0 and variance 1 in each head, "
            "with eps = 1e-5 times the square of the divisor; then weight and bias.")
    return "dividing y is the same as a larger eps."


@exercise("6.4", "Counting a 3B model", minutes=12, difficulty=3)
def count_parameters(answer):
    """answer(L, D, V) -> number of parameters, with dim_att = D and the default dim_ffn."""
    def truth(L: int, D: int, V: int) -> int:
        return ModelConfig(L, D, V, head_size_a=32).n_params

    small = answer(1, 64, 0)  # one block and the norms around: no vocabulary
    block, ffn = truth(1, 64, 1) - 2 * 64, 224
    require(isinstance(small, int), f"A count is a whole number; yours is {type(small).__name__}. Use // and int().")
    for missing, hint in (
        (4 * 64, "ln0 and ln_out, 4 D numbers, are missing: they stand outside the blocks."),
        (2 * 64, "One of ln0 and ln_out is missing, or its bias."),
        (64 * 64, "One matrix of D by D is missing. Time mixing has five, channel mixing one more."),
        (64 * ffn, "Channel mixing has two matrices with F: D to F, and back."),
        (10 * 64, "The vectors of a block are missing: mixes, norms, decay, bonus."),
    ):
        require(block - small != missing, hint)
    require(small == block, f"With L = 1, D = 64, V = 0 the count is {block:,}, yours is {small:,}: "
            f"{abs(block - small):,} too {'few' if small < block else 'many'}. Go through the names one by one.")
    require(answer(1, 64, 10) != block + 640, "emb and head are two matrices: RWKV-5 does not share them.")
    require(answer(1, 64, 10) == truth(1, 64, 10), "emb and head should add 2 V D.")
    require(answer(3, 64, 10) != 3 * truth(1, 64, 10), "Only the blocks come L times.")
    require(answer(3, 64, 10) == truth(3, 64, 10), "Right for one layer, wrong for three: ln0 is there only once.")
    require(answer(1, 96, 10) == truth(1, 96, 10),
            "Right for D = 64, wrong for D = 96. F is 3.5 D, rounded down to a multiple of 32.")
    L, D = OFFICIAL["3B"]
    require(answer(L, D, 65536) == official("3B").n_params, "Wrong for the 3B model alone: is everything exact?")
    return f"RWKV-5 3B has {official('3B').n_params:,} parameters."


@exercise("6.5", "The size of a state", minutes=6, difficulty=2)
def state_size(answer):
    """answer(L, D, N) -> numbers in the state of one text (dim_att = D)."""
    for L, D, N in ((1, 64, 16), (3, 128, 32), (32, 4096, 64)):
        found, right = answer(L, D, N), state_numbers(ModelConfig(L, D, 10, head_size_a=N))
        heads, where = D // N, f"For L = {L}, D = {D}, N = {N}:"
        require(found != right // L or L == 1, f"{where} that is one layer. Every layer has its own state.")
        require(found != L * heads * N * N, f"{where} the matrices are there; token shift keeps something too.")
        require(found != L * (D + heads * N * N),
                f"{where} there are two token shifts in a layer, one in each kind of mixing.")
        require(found != L * (2 * D + N * N), f"{where} that is one head a layer. There are D / N.")
        require(found != L * (2 * D + D * D), f"{where} heads do not share a state: H matrices of N by N, not D by D.")
        require(found == right, f"{where} {right:,} numbers, yours is {found:,}.")
    return "the same after one token and after a million."

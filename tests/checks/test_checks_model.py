"""Each check of notebook 06 takes the notebook's own solution and names the mistake in plausible wrong ones."""

from __future__ import annotations

import re

import pytest
import torch
from notebook_solutions import solution

from rwkv_nb.teaching.checks import model as check

NOTEBOOK = "06_model"
EXERCISES = {
    "6.1": ("token_shift", "shift_and_mix"),
    "6.2": ("receptance", "receptance"),
    "6.3": ("head_norm", "norm_of_heads"),
    "6.4": ("count_parameters", "parameters"),
    "6.5": ("state_size", "state_numbers_of"),
}


@pytest.mark.parametrize(("number", "name", "answer"), [(n, *rest) for n, rest in EXERCISES.items()])
def test_solution_of_the_notebook_is_right_and_the_stub_is_open(number, name, answer):
    verdict = getattr(check, name)(solution(NOTEBOOK, number)[answer])
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number

    def stub(*_):
        raise NotImplementedError("your turn")

    assert getattr(check, name)(stub).state == "open"


def shift(x, x_prev, mu, before=None, blend=None, last=lambda x, x_prev, mixed: x[:, -1]):
    past = torch.cat([x_prev[:, None], x[:, :-1]], dim=1) if before is None else before(x, x_prev)
    mixed = x * mu + past * (1 - mu) if blend is None else blend(x, past, mu)
    return mixed, last(x, x_prev, mixed)


def in_place(x, x_prev, mu):
    answer = shift(x.clone(), x_prev, mu)
    x *= mu
    return answer


def only_five(x, x_prev, mu):  # right for the first pieces that were tried, and for no other length
    mixed, last = shift(x, x_prev, mu)
    return (mixed if x.shape[1] == 5 else 0 * mixed), last


def receptance(x, mu, W, H, before=True, act=lambda r: r, split=None, swap=False, transpose=True):
    past = torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0)) if before else x
    mixed = past * mu + x * (1 - mu) if swap else x * mu + past * (1 - mu)
    r = act(mixed @ (W.T if transpose or W.shape[0] != W.shape[1] else W))
    B, T, A = r.shape
    return r.view(B, T, H, A // H) if split is None else split(r, B, T, H, A // H)


def norm(y, weight, bias, divisor, eps=lambda d: 1e-5 * d**2, whole=False, correction=0, affine=None):
    x = y.flatten(2) if whole else y
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=correction) + eps(divisor)).sqrt()
    x = x.reshape(*y.shape[:2], -1)
    return x * weight + bias if affine is None else affine(x, weight, bias)


def count(L, D, V, outer=4, inner=14, square=6, wide=2, heads=2, per_layer=0, F=lambda D: int(3.5 * D) // 32 * 32):
    block = square * D * D + wide * D * F(D) + inner * D
    return heads * V * D + outer * D + L * (block + per_layer * D)


def changed(function, **changes):
    return lambda *args: function(*args, **changes)


WRONG = {
    "token_shift": [
        (changed(shift, blend=lambda x, past, mu: x * (1 - mu) + past * mu), "share of the present"),
        (changed(shift, before=lambda x, p: torch.cat([x[:, 1:], p[:, None]], 1)), "into the future"),
        (changed(shift, before=lambda x, p: torch.cat([torch.zeros_like(x[:1]), x[:-1]])), "along the batch"),
        (changed(shift, before=lambda x, p: x.roll(1, 1)), "torch.roll"),
        (changed(shift, before=lambda x, p: torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))), "sees zeros"),
        (changed(shift, blend=lambda x, past, mu: torch.where(mu < 0.5, past, x)), "between"),
        (changed(shift, last=lambda x, p, mixed: mixed[:, -1]), "not the last mixture"),
        (changed(shift, last=lambda x, p, mixed: p), "the old x_prev"),
        (changed(shift, last=lambda x, p, mixed: x[:, 0]), r"should be x\[:, -1\]"),
        (lambda *args: shift(*args)[0], "Return two things"),
        (changed(shift, last=lambda x, p, mixed: x[:, -1:]), "x_prev should have shape"),
        (in_place, "changed its arguments"),
        (lambda *args: (shift(*args)[0].tolist(), args[0][:, -1]), "should be a tensor"),
        (lambda *args: (shift(*args)[0][:, 1:], args[0][:, -1]), "The mixture should have shape"),
        (changed(shift, blend=lambda x, past, mu: 2 * x * mu + past * (1 - mu)), "should be x itself"),
        (changed(shift, before=lambda x, p: torch.cat([p[:, None], x[:, :1], x[:, :-2]], 1)), "without its last"),
        (only_five, "in two pieces"),
    ],
    "receptance": [
        (changed(receptance, before=False), "token before is missing"),
        (changed(receptance, swap=True), "shares are swapped"),
        (changed(receptance, split=lambda r, B, T, H, N: r.view(B, T, N, H).transpose(2, 3)), "dealt out in turns"),
        (changed(receptance, split=lambda r, B, T, H, N: r.view(B, H, T, N).transpose(1, 2)), "cuts through time"),
        (changed(receptance, split=lambda r, B, T, H, N: r.view(B, T, H, N).transpose(1, 2)), "should have shape"),
        (changed(receptance, split=lambda r, *_: r), "should have shape"),
        (changed(receptance, act=torch.sigmoid), "RWKV-4 did"),
        (changed(receptance, act=torch.tanh), "numbers are not"),
        (changed(receptance, transpose=False), r"W.T is due"),
    ],
    "head_norm": [
        (changed(norm, whole=True), "share one mean"),
        (changed(norm, eps=lambda d: 1e-5), "no effect"),
        (changed(norm, eps=lambda d: 1e-5 * d), "takes its square"),
        (changed(norm, eps=lambda d: 1e-5 / d**2), "should grow"),
        (changed(norm, correction=1), "Norms divide by N"),
        (changed(norm, affine=lambda x, w, b: x), "are missing"),
        (changed(norm, affine=lambda x, w, b: (x + b) * w), "comes after"),
        (changed(norm, affine=lambda x, w, b: x + b), "numbers are not"),
        (lambda y, *_: y, "should have shape"),
    ],
    "count_parameters": [
        (changed(count, outer=0), "ln0 and ln_out, 4 D"),
        (changed(count, outer=2), "One of ln0 and ln_out"),
        (changed(count, square=5), "One matrix of D by D"),
        (changed(count, wide=1), "two matrices with F"),
        (changed(count, inner=4), "vectors of a block"),
        (changed(count, inner=13), "too few"),
        (changed(count, F=lambda D: 4 * D), "too many"),
        (changed(count, heads=1), "does not share them"),
        (changed(count, heads=3), "should add 2 V D"),
        (lambda L, D, V: L * count(1, D, V), "Only the blocks"),
        (changed(count, outer=2, per_layer=2), "Right for one layer"),
        (changed(count, F=lambda D: int(3.5 * D)), "rounded down"),
        (lambda L, D, V: float(count(L, D, V)), "whole number"),
        (lambda L, D, V: count(L, D, V) + (L == 32), "3B model alone"),
    ],
    "state_size": [
        (lambda L, D, N: 2 * D + D * N, "Every layer has its own"),
        (lambda L, D, N: L * D * N, "token shift keeps something"),
        (lambda L, D, N: L * (D + D * N), "two token shifts"),
        (lambda L, D, N: L * (2 * D + N * N), "one head a layer"),
        (lambda L, D, N: L * (2 * D + D * D), "do not share a state"),
        (lambda L, D, N: L * (3 * D + D * N), "numbers, yours is"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, w, m) for n, cases in WRONG.items() for w, m in cases])
def test_wrong_answers_are_named(name, wrong, message):
    verdict = getattr(check, name)(wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message), verdict.message


def test_the_helpers_above_are_right_when_nothing_is_changed():
    right = [check.token_shift(shift), check.receptance(receptance), check.head_norm(norm)]
    for verdict in (*right, check.count_parameters(count)):
        assert verdict.state == "right", verdict

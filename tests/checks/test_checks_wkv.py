"""Each check of notebook 04 takes the notebook's own solution and names the mistake in plausible wrong ones."""

from __future__ import annotations

import math
import re

import pytest
import torch
from notebook_solutions import solution

from rwkv_nb.teaching.checks import wkv as check

NOTEBOOK = "04_wkv"
EXERCISES = {
    "4.1": ("half_lives", ["half_life", "raw_decay"]),
    "4.2": ("step", ["step"]),
    "4.3": ("weights", ["weights_of_pairs"]),
    "4.4": ("two_halves", ["in_two_halves"]),
}


@pytest.mark.parametrize(("number", "name", "answers"), [(n, *rest) for n, rest in EXERCISES.items()])
def test_solution_of_the_notebook_is_right_and_the_stub_is_open(number, name, answers):
    found = solution(NOTEBOOK, number)
    verdict = getattr(check, name)(*(found[answer] for answer in answers))
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number

    def stub(*_):
        raise NotImplementedError("your turn")

    assert getattr(check, name)(*[stub] * len(answers)).state == "open"


def half(w):
    return math.log(2) / math.exp(w)


def raw(steps):
    return math.log(math.log(2) / steps)


def through_d(w):
    return math.log(0.5) / math.log(math.exp(-math.exp(w)))


def step(
    r, k, v, w, u, S, d=lambda w: torch.exp(-torch.exp(w))[:, None], read=lambda r, S: r @ S, first=False, new=None,
    bonus=lambda u: u[:, None], store=lambda kv, u, d: kv, give=lambda y, S: (y, S),
):  # fmt: skip
    kv = torch.outer(k, v) if new is None else new(k, v)
    after = d(w) * S + store(kv, u[:, None], d(w))
    return give(read(r, (d(w) * S if first else S) + bonus(u) * kv), after)


def changed_step(**changes):
    return lambda *args: step(*args, **changes)


def in_place(r, k, v, w, u, S):
    y, after = step(r, k, v, w, u, S)
    S *= 0
    return y, after


def either(r, k, v, w, u, S):  # right for an empty state and for an empty pair, wrong for both together
    y, after = step(r, k, v, w, u, S)
    return (y + r @ S if S.any() and k.any() else y), after


def weights(r, k, w, u, shift=1, diagonal=lambda r, k, u: (r * u * k).sum(1), fade=lambda d, age: d**age, decay=None):
    d = torch.exp(-torch.exp(w)) if decay is None else decay(w)
    A = torch.diag(diagonal(r, k, u))
    for age in range(len(r) - 1):
        A = A + torch.diag((r[age + 1 :] * fade(d, age + 1 - shift) * k[: len(k) - 1 - age]).sum(1), -1 - age)
    return A


def split_powers(r, k, w, u):
    d, t = torch.exp(-torch.exp(w)), torch.arange(len(r))[:, None]
    return ((r * d ** (t - 1)) @ (k * d**-t).T).tril(-1) + torch.diag((r * u * k).sum(1))


def both_sides(r, k, w, u):
    return weights(r, k, w, u) + weights(r, k, w, u).tril(-1).T


def clamped(r, k, w, u):
    return weights(r, k, w, u, fade=lambda d, age: d.clamp(min=0.01) ** age)


def slices(x, part):
    return [tensor[:, part].contiguous() for tensor in x]


def halves(
    run, r, k, v, w, u, cut,
    state=lambda first: first, join=lambda a, b: torch.cat([a, b], 1), last=lambda a, b: b,
):  # fmt: skip
    a, first = run(*slices((r, k, v), slice(cut)), w, u)
    b, second = run(*slices((r, k, v), slice(cut, None)), w, u, state(first))
    return join(a, b), last(first, second)


def changed_halves(**changes):
    return lambda *args: halves(*args, **changes)


def fixed_cut(run, r, k, v, w, u, cut):
    return halves(run, r, k, v, w, u, 3)


def with_gaps(run, r, k, v, w, u, cut):
    a, state = run(r[:, :cut], k[:, :cut], v[:, :cut], w, u)
    b, state = run(r[:, cut:], k[:, cut:], v[:, cut:], w, u, state)
    return torch.cat([a, b], 1), state


WRONG = {
    "half_lives": [
        ((lambda w: 1 / math.exp(w), raw), "time until 1/e"),
        ((lambda w: -half(w), raw), "lose its sign"),
        ((lambda w: math.log(2) / math.exp(-math.exp(w)), raw), "You divided by d"),
        ((lambda w: math.log(2) * math.exp(w), raw), "A smaller w must give a longer"),
        ((lambda w: math.log(2) * (1 - w), raw), "inner exponential"),
        ((through_d, raw), "go through d"),
        ((lambda w: half(w) if w < 5 else math.inf, raw), "go through d"),
        ((lambda w: 3.0, raw), "should be ln 2"),
        ((half, lambda h: math.log(h / math.log(2))), "the sign is wrong"),
        ((half, lambda h: math.log(1 / h)), "It should undo half_life"),
        ((half, half), "It should undo half_life"),
    ],
    "step": [
        ((changed_step(read=lambda r, S: S @ r),), "summed over the columns"),
        ((changed_step(first=True),), "Reading comes first"),
        ((changed_step(d=lambda w: torch.ones_like(w)[:, None]),), "does not fade"),
        ((changed_step(d=lambda w: torch.exp(-torch.exp(w))),), "decay the columns"),
        ((changed_step(d=lambda w: torch.exp(-w)[:, None]),), r"you decay by exp\(-w\)"),
        ((changed_step(d=lambda w: torch.exp(w)[:, None]),), r"you decay by exp\(w\)"),
        ((changed_step(d=lambda w: w[:, None]),), "w itself"),
        ((changed_step(new=lambda k, v: torch.outer(v, k)),), "stored as"),
        ((changed_step(store=lambda kv, u, d: u * kv),), "store the bonus too"),
        ((changed_step(store=lambda kv, u, d: d * kv),), "has faded already"),
        ((changed_step(bonus=lambda u: 0.0),), "Where is the bonus u"),
        ((changed_step(bonus=lambda u: 1.0),), "read with weight 1"),
        ((changed_step(bonus=lambda u: u),), "multiplies the value channels"),
        ((changed_step(give=lambda y, S: y),), "Return two things"),
        ((changed_step(give=lambda y, S: (S, y)),), "y should have shape"),
        ((in_place,), "changed the state"),
        ((either,), "not their sum"),
    ],
    "weights": [
        ((lambda *a: weights(*a).T,), "transposed"),
        ((lambda *a: weights(*a)[0],), "shape"),
        ((both_sides,), "Above the diagonal"),
        ((lambda *a: weights(*a, diagonal=lambda r, k, u: (r * k).sum(1)),), "the bonus .* is missing"),
        ((lambda *a: weights(*a, diagonal=lambda r, k, u: torch.zeros(len(r)).double()),), "diagonal is empty"),
        ((lambda *a: weights(*a, diagonal=lambda r, k, u: (r + u + k).sum(1)),), "without decay"),
        ((lambda *a: weights(*a, shift=0),), "has faded once already"),
        ((lambda *a: weights(*a, fade=lambda d, age: 1),), "nothing fades"),
        ((lambda *a: weights(*a, fade=lambda d, age: d.mean() ** age),), "at its own rate"),
        ((lambda *a: weights(*a, decay=lambda w: torch.exp(-w)),), "at its own rate"),
        ((split_powers,), "infinities or NaNs"),
        ((clamped,), "wrong for 300"),
    ],
    "two_halves": [
        ((changed_halves(state=lambda first: None),), "starts with an empty memory"),
        ((changed_halves(state=lambda first: first.transpose(-1, -2).contiguous()),), "second half of y is wrong"),
        ((changed_halves(join=lambda a, b: b),), "join the halves"),
        ((changed_halves(join=lambda a, b: torch.cat([b, a], 1)),), "in order"),
        ((changed_halves(last=lambda a, b: a),), "not that after the last step"),
        ((changed_halves(last=lambda a, b: a + b),), "not that after the last step"),
        ((lambda run, r, k, v, w, u, cut: run(r, k, v, w, u),), "whole text at once"),
        ((lambda *args: halves(*args)[0],), "Return two things"),
        ((fixed_cut,), r"expected \[6, 1\]"),
        ((with_gaps,), "a view with gaps"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, w, m) for n, cases in WRONG.items() for w, m in cases])
def test_wrong_answers_are_named(name, wrong, message):
    verdict = getattr(check, name)(*wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message), verdict.message


def test_the_helpers_above_are_right_when_nothing_is_changed():
    for verdict in (check.half_lives(half, raw), check.step(step), check.weights(weights), check.two_halves(halves)):
        assert verdict.ok, verdict

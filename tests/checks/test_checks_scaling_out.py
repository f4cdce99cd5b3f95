"""Each check of notebook 10 takes the notebook's own solution and names the mistake in plausible wrong ones."""

from __future__ import annotations

import re

import pytest
from notebook_solutions import solution

from rwkv_nb.teaching.checks import scaling_out as check

NOTEBOOK = "10_scaling_out"
EXERCISES = {"10.1": ("n_steps", "n_steps_of"), "10.2": ("zero_bytes",) * 2, "10.3": ("training_hours",) * 2}


@pytest.mark.parametrize(("number", "names"), EXERCISES.items())
def test_solution_of_the_notebook_is_right_and_the_stub_is_open(number, names):
    verdict = getattr(check, names[0])(solution(NOTEBOOK, number)[names[1]])
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number

    def stub(*_):
        raise NotImplementedError("your turn")

    assert getattr(check, names[0])(stub).state == "open"


def zero(weights=2, gradients=2, optimizer=12, cut=(3, 2, 1)):
    def zero_bytes(P, n, stage):
        sizes = (weights, gradients, optimizer)
        return sum(P * size / (n if stage >= first else 1) for size, first in zip(sizes, cut, strict=True))

    return zero_bytes


WRONG = {
    "n_steps": [
        (lambda t, k, d, b, a, c: -(-t // (k * d * b * a)), "ctx_len enter"),
        (lambda t, k, d, b, a, c: -(-t // (k * d * a * c)), "micro_bsz enter"),
        (lambda t, k, d, b, a, c: -(-t // (k * b * a * c)), "devices enter"),
        (lambda t, k, d, b, a, c: -(-t // (d * b * a * c)), "num_nodes counts machines"),
        (lambda t, k, d, b, a, c: -(-t // (k * d * b * c)), "Does it enter"),
        (lambda t, k, d, b, a, c: -(-t * a // (k * d * b * c)), "fewer steps"),
        (lambda t, k, d, b, a, c: t // (k * d * b * a * c), "round up"),
        (lambda t, k, d, b, a, c: t / (k * d * b * a * c), "Whole steps only"),
        (lambda *_: None, "Is there a return"),
    ],
    "zero_bytes": [
        (zero(optimizer=4), "three float32 numbers"),
        (zero(weights=4, gradients=4), "16 bytes a parameter"),
        (zero(cut=(0, 0, 0)), "Stage 0 cuts nothing"),
        (zero(cut=(1, 1, 1)), "Stage 1 cuts Adam's"),
        (zero(cut=(3, 3, 1)), "same as stage 1"),
        (zero(cut=(4, 2, 1)), "same as stage 2"),
        (zero(cut=(2, 3, 1), gradients=4, weights=0), "Stage 2|5.5|stage 1"),
        (lambda P, n, stage: int(zero()(P, n, stage)) // 10**9 * 10**9 if n == 64 else zero()(P, n, stage), "7.5e9"),
    ],
    "training_hours": [
        (lambda P, t, n, peak, u: 6 * P * t / (n * peak * u), "in seconds"),
        (lambda P, t, n, peak, u: 2 * P * t / (n * peak * u) / 3600, "forward pass alone"),
        (lambda P, t, n, peak, u: 6 * P * t / (n * peak) * u / 3600, "longer, not less"),
        (lambda P, t, n, peak, u: 6 * P * t / (n * peak) / 3600, "Does utilisation enter"),
        (lambda P, t, n, peak, u: 6 * P * t / (peak * u) / 3600, "Does n enter"),
        (lambda P, t, n, peak, u: 6 * P * t * n / (peak * u) / 3600, "share the work"),
        (lambda P, t, n, peak, u: 8 * P * t / (n * peak * u) / 3600, "Is it 6"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, w, m) for n, cases in WRONG.items() for w, m in cases])
def test_wrong_answers_are_named(name, wrong, message):
    verdict = getattr(check, name)(wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message), verdict.message

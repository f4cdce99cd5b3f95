"""Each check of notebook 09 takes the notebook's own solution and names the mistake in plausible wrong ones."""

from __future__ import annotations

import re

import pytest
import torch
from notebook_solutions import solution

from rwkv_nb.teaching.checks import eagle_7b as check

NOTEBOOK = "09_eagle_7b"
FUNCTIONS = {"9.1": ("state_bytes",) * 2, "9.2": ("quantise",) * 2}
ANSWERS = {"9.3": ("small_card", "my_strategy"), "9.4": ("spot", "wrong_ones")}


@pytest.mark.parametrize(("number", "names"), [*FUNCTIONS.items(), *ANSWERS.items()])
def test_solution_of_the_notebook_is_right_and_the_stub_is_open(number, names):
    verdict = getattr(check, names[0])(solution(NOTEBOOK, number)[names[1]])
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number

    def stub(*_):
        raise NotImplementedError("your turn")

    assert getattr(check, names[0])(stub if number in FUNCTIONS else "your turn").state == "open"


def rows(W, top=127, how=torch.round, dtype=torch.int8, dim=1, keepdim=True):
    scales = W.abs().amax(dim, keepdim=keepdim).clamp_min(1e-30) / top
    return how(W / scales).to(dtype), scales


def in_place(W):
    W /= 2
    return rows(W)


WRONG = {
    "state_bytes": [
        (lambda L, D, N: L * (2 * D + D * N), "4 bytes"),
        (lambda L, D, N: 4 * L * D * N, "Token shift"),
        (lambda L, D, N: 4 * L * (D + D * N), "twice n_embd"),
        (lambda L, D, N: 2 * L * (2 * D + D * N), "yours is"),
        (lambda L, D, N: 4 * (2 * D + D * N), "n_layer enter"),
        (lambda L, D, N: 4 * L * (2 * D + D * D), "not one of 128"),
        (lambda L, D, N: 4 * L * (2 * D + N * N), "two heads of 64"),
        (lambda L, D, N: 4 * L * (2 * D + D * 64), "head_size enter"),
        (lambda *_: None, "Is there a return"),
    ],
    "quantise": [
        (lambda W: rows(W, dtype=torch.float32), "torch.int8"),
        (lambda W: (rows(W)[0].flatten(), rows(W)[1]), "numbers have shape"),
        (lambda W: rows(W, dim=(0, 1)), "whole matrix"),
        (lambda W: rows(W, dim=0), "one a row"),
        (lambda W: rows(W.T, dim=0, keepdim=False)[::-1], "numbers are|numbers have shape"),
        (lambda W: (rows(W)[0], rows(W)[1].flatten()), "keepdim"),
        (lambda W: (-rows(W)[0], rows(W)[1]), "signs"),
        (lambda W: rows(W, top=100), "127"),
        (lambda W: rows(W, top=128), "overflow"),
        (lambda W: rows(W, how=torch.trunc), "torch.round first"),
        (lambda W: (rows(W)[0], W.square().amax(1, True) / W.abs().amax(1, True) / 127), "row of zeros"),
        (lambda W: (rows(W)[0], 1 / rows(W)[1]), "came back wrong|half a step"),
        (lambda W: rows(W)[0], "return two tensors"),
        (in_place, "changed W itself"),
    ],
    "small_card": [
        ("cuda fp16", "does not fit.*on cuda.*Fewer layers"),
        ("cuda fp16i8", "does not fit.*97.9 MB on cuda"),
        ("cpu fp32", "does not fit.*bf16 has half"),
        ("cpu bf16", "the card has nothing to do"),
        ("cuda fp16i8 *0+ -> cpu bf16 *1", "slow bus"),
        ("cuda fp16 *14 -> cpu bf16", "in 8 bits"),
        ("cuda fp16i8 *20 -> cpu fp32", "half in bf16"),
        ("cuda fp16i8 *20 -> cpu bf16", "Fill the card"),
        ("cuda:1 fp16i8 *32 -> cpu bf16", "cuda:1 are missing"),
        ("cuda fp8", "'fp8' is no format"),
        (8, "as a text"),
    ],
    "spot": [
        ("abdeg", "a does what is claimed"),
        ("bdegf", "f does what is claimed"),
        ("deg", "Look again at b"),
        ("beg", "Look again at d.*share|Look again at d.*two entries"),
        ({"b", "d", "g"}, "Look again at e.*notes"),
        (["b", "d", "e"], "Look again at g"),
        ("", "Look again at b"),
        ("xyz", "from a to g"),
        (3, "as a text"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, w, m) for n, cases in WRONG.items() for w, m in cases])
def test_wrong_answers_are_named(name, wrong, message):
    verdict = getattr(check, name)(wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message, re.DOTALL), verdict.message


def test_other_good_answers_are_taken():
    assert check.small_card("cuda bf16i8 *32 -> cpu bf16").ok and check.spot({"b", "d", "e", "g"}).ok
    assert check.small_card("cuda:0 fp16i8 *31 -> cpu fp16").ok and check.spot("B, D, E, G").ok

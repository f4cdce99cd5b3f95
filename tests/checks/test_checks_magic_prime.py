"""Each check of notebook 03 takes the notebook's own solution and names the mistake in plausible wrong ones."""

from __future__ import annotations

import re

import numpy as np
import pytest
from notebook_solutions import solution

from rwkv_nb.data.magic_prime import chunk_of, golden_factor, is_prime
from rwkv_nb.teaching.checks import magic_prime as check

NOTEBOOK = "03_magic_prime"
EXERCISES = {"3.1": "magic_prime", "3.2": "when_visited", "3.3": "numbers_of_rank", "3.4": "chunks_int64"}


@pytest.mark.parametrize(("number", "name"), EXERCISES.items())
def test_solution_of_the_notebook_is_right_and_the_stub_is_open(number, name):
    verdict = getattr(check, name)(solution(NOTEBOOK, number)[name])
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number

    def stub(*_):
        raise NotImplementedError("your turn")

    assert getattr(check, name)(stub).state == "open"


def search(first=lambda slots: slots - 1, fits=lambda c: c % 3 == 2 and is_prime(c), small=3, down=True, stop=1):
    def magic_prime(n_tokens, ctx_len):
        if n_tokens < small * ctx_len:
            return None
        candidates = range(first(n_tokens // ctx_len), stop, -1)
        return next((c for c in (candidates if down else candidates[::-1]) if fits(c)), None)

    return magic_prime


def rounded_up(n_tokens, ctx_len):
    return search()(-(-n_tokens // ctx_len) * ctx_len, ctx_len)


WRONG = {
    "magic_prime": [
        (search(fits=is_prime), "forget the condition"),
        (search(fits=lambda c: c % 3 == 2), "not a prime"),
        (search(first=lambda slots: slots), "start at slots"),
        (search(first=lambda slots: slots - 2), "first candidate skipped"),
        (search(down=False), "search downwards"),
        (search(stop=2, small=0), "search stop before 2|the only even prime"),
        (rounded_up, "round up"),
        (lambda n, c: search()(n, c) or 0, "Return None"),
        (lambda n, c: search()(n, 1), "divide n_tokens"),
        (lambda n, c: float(search()(n, c)), "an integer was expected"),
        (lambda n, c: None if n > 10**9 else search()(n, c), "minipile"),
    ],
    "when_visited": [
        (lambda c, p: chunk_of(p, c), "walked forward"),
        (lambda c, p: pow(c, (2 * p - 1) // 3, p), "not the factor"),
        (lambda c, p: pow(c, (2 * p - 1) // 3, p) * pow(golden_factor(p), -1, p) % p, "order matters"),
        (lambda c, p: c * pow(golden_factor(p), -1, p) % p, "cube root"),
        (lambda c, p: pow(c * pow(golden_factor(p), -1, p) % p, (2 * p - 1) // 3, p), "ii = p = 47"),
        (lambda c, p: pow(c * pow(golden_factor(p), -1, p) % p, (p - 1) // 3, p), "Is your exponent d"),
        (lambda c, p: [chunk_of(p, i) for i in range(1, 1000)].index(c) + 1 if p < 1000 else 0, "works for small p"),
        (lambda c, p: None, "no return"),
    ],
    "numbers_of_rank": [
        (lambda e, r, w, s: list(range(e * s + r, (e + 1) * s, w)), "start at 1"),
        (lambda e, r, w, s: list(range(1 + r, s + 1, w)), "epoch enter"),
        (lambda e, r, w, s: list(range(1 + e * s + r * (s // w), 1 + e * s + (r + 1) * (s // w))), "blocks"),
        (lambda e, r, w, s: [1 + e * s + i * w + r for i in range(s)], "counts all ranks"),
        (lambda e, r, w, s: list(range(1 + e * s, (e + 1) * s + 1, w)), "Together 3 ranks"),
        (lambda e, r, w, s: list(range(1 + e * (s // w) + r, 1 + e * (s // w) + s, w)), "samples_per_epoch"),
        (lambda e, r, w, s: list(range(1 + e * s + w - 1 - r, 1 + (e + 1) * s, w)), "Rank r starts at"),
    ],
    "chunks_int64": [
        (lambda p, ii: golden_factor(p) * ii**3 % p, r"f \* ii\*\*3 passes"),
        (lambda p, ii: golden_factor(p) * (ii**3 % p) % p, r"ii\*\*3 alone"),
        (lambda p, ii: golden_factor(p) * (ii * ii % p * ii % p) % p, r"ii\*\*2 alone"),
        (lambda p, ii: golden_factor(p) * (ii % p) * (ii % p) * (ii % p) % p, r"f \* ii\*\*3 passes"),
        (lambda p, ii: (golden_factor(p) / p * ii.astype(float) ** 3 * p % p).astype(np.int64), "Wrong already|passes"),
        (lambda p, ii: np.array([chunk_of(p, i) for i in ii.tolist()], dtype=object), "dtype is object"),
        (lambda p, ii: ii * ii % p * ii % p, "Wrong already"),
        (lambda p, ii: [chunk_of(p, i) for i in ii.tolist()], "array of shape"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, w, m) for n, cases in WRONG.items() for w, m in cases])
def test_wrong_answers_are_named(name, wrong, message):
    verdict = getattr(check, name)(wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message), verdict.message


def test_a_changed_argument_is_noticed():
    def in_place(p, ii):
        ii %= p
        return golden_factor(p) * (ii * ii % p * ii % p) % p

    assert "changed the array" in check.chunks_int64(in_place).message


def test_product_of_three_residues_is_noticed():
    def three(p, ii):
        r = ii % p
        cube = (r * r * r if p > 2**30 else r * r % p * r) % p
        return golden_factor(p) * cube % p

    assert "a product of three does not" in check.chunks_int64(three).message

"""Notebook 00: each check accepts the notebook's own solution and rejects plausible wrong answers by name."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from notebook_solutions import solution

from rwkv_nb.teaching.checks import start_here as check

NOTEBOOK = "00_start_here"


def unwritten(*args):
    raise NotImplementedError("your turn")


def nats_right(loss):
    return loss / math.log(2)


def unigram(train, test, log=math.log2, count_in=None, over=None, mean=True, sign=-1):
    counts = Counter(count_in or train)
    total = sum(counts.values())
    over = over or test
    bits = sign * sum(log(counts[c] / total) for c in over)
    return bits / len(over) if mean else bits


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def in_place(logits, temperature):
    logits /= temperature
    logits -= logits.max() + 0.5
    e = np.exp(logits)
    return e / e.sum()


def naive(logits, temperature):
    e = np.exp(logits / temperature)
    return e / e.sum()


def test_solutions_are_right():
    ns = solution(NOTEBOOK, "0.1")
    assert check.units(ns["bits"], ns["perplexity"]).ok
    assert check.unigram_bits(solution(NOTEBOOK, "0.2")["unigram_bits"]).ok
    assert check.probabilities(solution(NOTEBOOK, "0.3")["probabilities"]).ok


def test_stubs_are_open():
    verdicts = [check.units(unwritten, unwritten), check.unigram_bits(unwritten), check.probabilities(unwritten)]
    assert [v.state for v in verdicts] == ["open"] * 3


@pytest.mark.parametrize(
    ("bits", "perplexity", "word"),
    [
        (lambda x: x * math.log(2), math.exp, "divide"),
        (lambda x: x / math.log(10), math.exp, "base 10"),
        (lambda x: x + 1, math.exp, "0 nats"),
        (lambda x: x, math.exp, "2 / ln 2"),
        (nats_right, lambda x: 2**x, "in nats"),
        (nats_right, lambda x: x, "e to the loss"),
    ],
)
def test_wrong_units(bits, perplexity, word):
    verdict = check.units(bits, perplexity)
    assert verdict.state == "wrong" and word in verdict.message


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda a, b: unigram(a, b, count_in=b), "count in `test`"),
        (lambda a, b: unigram(a, b, over=a), "those of `train`"),
        (lambda a, b: unigram(a, b, log=math.log), "nats"),
        (lambda a, b: unigram(a, b, mean=False), "divide by its length"),
        (lambda a, b: unigram(a, b, sign=1), "positive"),
        (lambda a, b: 1.5, "yours says"),
    ],
)
def test_wrong_unigram(answer, word):
    verdict = check.unigram_bits(answer)
    assert verdict.state == "wrong" and word in verdict.message


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (in_place, "changed the logits"),
        (lambda x, t: np.exp(x / t), "add up to 1"),
        (lambda x, t: softmax(x), "no effect"),
        (lambda x, t: softmax(x * t), "sharpen"),
        (lambda x, t: softmax(x) ** (1 / t), "before the exponential"),
        (naive, "overflows"),
        (lambda x, t: softmax(x)[:2], "shape"),
    ],
)
def test_wrong_probabilities(answer, word):
    verdict = check.probabilities(answer)
    assert verdict.state == "wrong" and word in verdict.message


def test_an_exception_in_the_answer_becomes_a_message():
    verdict = check.unigram_bits(lambda a, b: {}["x"])
    assert verdict.state == "wrong" and "KeyError" in verdict.message

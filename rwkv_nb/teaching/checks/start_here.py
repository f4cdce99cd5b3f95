"""Checks of the exercises in notebook 00: units of the loss, the unigram yardstick, one step of sampling."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from rwkv_nb.teaching.checks import exercise, require


def close(a: float, b: float) -> bool:
    return math.isclose(float(a), b, rel_tol=1e-6, abs_tol=1e-9)


@exercise("0.1", "Nats, bits and perplexity", minutes=3, difficulty=1)
def units(bits, perplexity) -> str:
    """bits(loss) and perplexity(loss) of a loss in nats per character."""
    require(close(bits(0.0), 0.0), "A loss of 0 nats is 0 bits: did you add something?")
    got = bits(2.0)
    require(not close(got, 2.0 * math.log(2)), "One bit is ln 2 = 0.69 nats, so there are more bits than nats: divide.")
    require(
        not close(got, 2.0 / math.log2(10)) and not close(got, 2.0 / math.log(10)),
        "Is your logarithm to base 10? Bits need ln 2.",
    )
    require(close(got, 2.0 / math.log(2)), f"bits(2.0) should be 2 / ln 2 = {2 / math.log(2):.4f}; yours is {got:.4f}.")
    require(not close(perplexity(2.0), 4.0), "2 ** loss is right for a loss in bits; this one is in nats.")
    require(close(perplexity(2.0), math.exp(2.0)), "Perplexity is e to the loss in nats.")
    return "a loss of ln 96 nats is log2 96 bits and a perplexity of 96: pure guessing."


@exercise("0.2", "The unigram yardstick", minutes=8, difficulty=2)
def unigram_bits(answer) -> str:
    """answer(train, test): bits per character of `test` under the character frequencies of `train`."""
    train, test = "aaab" * 50, "ab" * 20
    frequencies = {c: n / len(train) for c, n in Counter(train).items()}
    want = -sum(math.log2(frequencies[c]) for c in test) / len(test)
    got = float(answer(train, test))
    own = Counter(test)
    entropy_of_test = -sum(n / len(test) * math.log2(n / len(test)) for n in own.values())
    require(not close(got, entropy_of_test), "Did you count in `test`? The model has only seen `train`.")
    entropy_of_train = -sum(p * math.log2(p) for p in frequencies.values())
    require(not close(got, entropy_of_train), "Average over the characters of `test`, not over those of `train`.")
    require(not close(got, want * math.log(2)), "This is in nats: use log2 for bits.")
    require(not close(got, want * len(test)), "This is the sum over the text: divide by its length.")
    require(not close(got, -want), "Bits are positive: the logarithm of a probability is negative.")
    require(
        close(got, want), f"For train = 'aaab' * 50 and test = 'ab' * 20 it is {want:.4f} bits; yours says {got:.4f}."
    )
    require(close(answer("abcd" * 9, "dcba"), 2.0), "Four equally frequent characters cost 2 bits each.")
    return "this is the level that a model passes as soon as it knows which characters are common."


@exercise("0.3", "One step of sampling", minutes=8, difficulty=2)
def probabilities(answer) -> str:
    """answer(logits, temperature): softmax of logits / temperature as a NumPy array."""
    logits = np.array([2.0, 1.0, 0.0, -3.0])
    kept = logits.copy()

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    one = np.asarray(answer(logits, 1.0), dtype=float)
    require(np.array_equal(logits, kept), "Your function changed the logits it was given: work on a copy.")
    require(
        one.shape == logits.shape,
        f"{logits.size} logits give {logits.size} probabilities; yours has shape {one.shape}.",
    )
    require(abs(one.sum() - 1) < 1e-6, "Probabilities add up to 1: divide by the sum of the exponentials.")
    require(np.allclose(one, softmax(logits)), "At temperature 1 it is exp(logit) over the sum of all exp(logit).")
    half = np.asarray(answer(logits, 0.5), dtype=float)
    require(not np.allclose(half, one), "The temperature has no effect: where does it enter?")
    require(not np.allclose(half, softmax(logits * 0.5)), "Divide by the temperature: 0.5 must sharpen, not flatten.")
    require(np.allclose(half, softmax(logits / 0.5)), "The temperature divides the logits before the exponential.")
    with np.errstate(over="ignore", invalid="ignore"):
        large = np.asarray(answer(np.array([2000.0, 1999.0]), 1.0), dtype=float)
    require(
        bool(np.isfinite(large).all()), "exp(2000) overflows: subtract the largest logit first, the result is the same."
    )
    return "subtracting the maximum changes nothing but the overflow."

"""n-gram cross entropies against hand computation, a brute-force model and known limits; compressors."""

from __future__ import annotations

import bz2
import gzip
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data import entropy as room
from rwkv_nb.data.entropy import compressed_bits, entropy, ngram_cross_entropy


def brute_force(train: list[int], history: tuple[int, ...], token: int, vocab_size: int, delta: float) -> float:
    """p(token | history) by formula (1), counting with a loop."""
    n = len(history) + 1
    grams = Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
    total = sum(count for gram, count in grams.items() if gram[:-1] == history)
    lower = 1 / vocab_size if n == 1 else brute_force(train, history[1:], token, vocab_size, delta)
    return (grams[history + (token,)] + delta * lower) / (total + delta)


def brute_force_bits(train, test, vocab_size, order, delta):
    histories = [tuple(test[max(0, i - order + 1) : i]) for i in range(len(test))]
    bits = [-math.log2(brute_force(train, h, t, vocab_size, delta)) for h, t in zip(histories, test, strict=True)]
    return sum(bits) / len(test)


def test_by_hand():
    train, test = np.array([0, 0, 1, 0]), np.array([0, 1])
    assert ngram_cross_entropy(train, test, 2, 1, delta=0) == pytest.approx((-math.log2(3 / 4) - math.log2(1 / 4)) / 2)
    # delta 2, p_1: (3 + 1) / 6, (1 + 1) / 6; after 0 came 0 and 1 once each: (1 + 2 / 3) / (2 + 2)
    expected = (-math.log2(4 / 6) - math.log2((1 + 2 / 3) / 4)) / 2
    assert ngram_cross_entropy(train, test, 2, 2, delta=2) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.5, 1.0, 7.0]), st.booleans(), st.integers(1, 7), st.data()
)
def test_against_brute_force(vocab_size, order, delta, sparse, chunk, data):
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=14)
    train, test = data.draw(ids), data.draw(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "CHUNK", chunk)
        patch.setattr(room, "DENSE_LIMIT", 0 if sparse else 1 << 24)
        measured = ngram_cross_entropy(np.array(train, np.uint8), np.array(test, np.uint8), vocab_size, order, delta)
    assert measured == pytest.approx(brute_force_bits(train, test, vocab_size, order, delta), abs=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_is_normalised_over_all_texts_of_a_length(order):
    train = np.array([0, 1, 2, 0, 0, 1, 1, 2, 0])
    texts = [np.array(text) for text in itertools.product(range(3), repeat=5)]
    total = sum(2 ** (-5 * ngram_cross_entropy(train, text, 3, order, delta=1.5)) for text in texts)
    assert total == pytest.approx(1, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200))
def test_unigram_on_itself_is_the_entropy(ids):
    ids = np.array(ids)
    frequencies = [count / len(ids) for count in Counter(ids.tolist()).values()]
    expected = -sum(f * math.log2(f) for f in frequencies)
    assert entropy(ids, 10) == pytest.approx(expected, abs=1e-12)
    assert ngram_cross_entropy(ids, ids, 10, 1, delta=0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_uniform_noise_costs_log2_v(order):
    rng = np.random.default_rng(1)
    train, test = rng.integers(0, 20, 400_000), rng.integers(0, 20, 50_000)
    assert ngram_cross_entropy(train, test, 20, order) == pytest.approx(math.log2(20), abs=2e-3)


def test_bigram_reaches_the_entropy_rate_of_a_markov_chain():
    rng = np.random.default_rng(2)
    transition = np.array([[0.8, 0.1, 0.1], [0.05, 0.05, 0.9], [0.3, 0.6, 0.1]])
    stationary = np.linalg.matrix_power(transition, 200)[0]
    rate = -(stationary[:, None] * transition * np.log2(transition)).sum()
    chain, uniform, cumulative = [0], rng.random(300_000), transition.cumsum(axis=1)
    for u in uniform:
        chain.append(min(int(np.searchsorted(cumulative[chain[-1]], u)), 2))
    train, test = np.array(chain[:200_000]), np.array(chain[200_000:])
    assert ngram_cross_entropy(train, test, 3, 2) == pytest.approx(rate, abs=0.01)
    assert ngram_cross_entropy(train, test, 3, 3) == pytest.approx(rate, abs=0.01)
    assert ngram_cross_entropy(train, test, 3, 1) > rate + 0.3


def test_large_vocabulary_takes_the_sparse_path():
    train = np.array([65535, 7, 65535, 7, 65535, 7, 9], dtype=np.uint16)
    bits = ngram_cross_entropy(train, np.array([65535, 7], dtype=np.uint16), 65536, 2, delta=1.0)
    assert bits == pytest.approx(brute_force_bits(train.tolist(), [65535, 7], 65536, 2, 1.0), abs=1e-12)
    assert math.isfinite(ngram_cross_entropy(train, train, 65536, 3))


def test_raw_frequencies_give_infinity_for_the_unseen():
    assert ngram_cross_entropy(np.array([0, 0]), np.array([1]), 2, 1, delta=0) == math.inf
    assert ngram_cross_entropy(np.array([0, 0]), np.array([1]), 2, 1, delta=0.1) < math.inf


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (([0, 1], [0, 2], 2, 1), "test_ids"),
        (([0, -1], [0], 2, 1), "train_ids"),
        (([], [0], 2, 1), "train_ids"),
        (([0.5], [0], 2, 1), "integers"),
        (([[0]], [0], 2, 1), "shape"),
        (([0], [0], 2, 0), "order=0"),
        (([0], [0], 65536, 4), "order=4"),
        (([0], [0], 2, 1, -1), "delta=-1"),
        (([0], [0], 2, 1, float("nan")), "delta=nan"),
    ],
)
def test_bad_input_is_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        ngram_cross_entropy(*arguments)


def test_compressed_bits():
    text = "the same again " * 1000
    assert compressed_bits(text, "gzip") == 8 * len(gzip.compress(text.encode(), 9, mtime=0)) / len(text)
    noise = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 20_000)))
    for method in ("gzip", "bz2", "xz"):
        assert compressed_bits(text, method) < 0.1
        assert math.log2(95) - 0.01 < compressed_bits(noise, method) < 8
    assert compressed_bits("é" * 9, "bz2") == 8 * len(bz2.compress("é".encode() * 9)) / 9  # characters, not bytes
    with pytest.raises(ValueError, match="zip"):
        compressed_bits("a", "zip")
    with pytest.raises(ValueError, match="empty"):
        compressed_bits("")

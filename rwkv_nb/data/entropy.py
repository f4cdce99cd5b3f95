r"""How well is text guessed without a neural network? n-gram cross entropies and everyday compressors as yardsticks.

Symbols: a, the next token; h, the n - 1 tokens before it; h', h without its first token; c(h a), how often h a occurs
in the training text, c(h) = sum_a c(h a); V, the number of different tokens; delta, the strength of the prior.

    p_0(a)     = 1 / V
    p_n(a | h) = (c(h a) + delta * p_{n-1}(a | h')) / (c(h) + delta)            (1)

Interpolated smoothing with a Dirichlet prior: after a frequent history the counts decide, after a rare one the
shorter history, and every p_n sums to 1 over a. For n = 1 it is additive smoothing with delta / V for every token.
Source: MacKay and Peto, "A hierarchical Dirichlet language model", Natural Language Engineering 1 (1995), equation
for the predictive distribution.

    cross entropy = -(1 / T) * sum_t log2 p_n(x_t | the n - 1 tokens before it)      bits per token              (2)

The first n - 1 tokens of the test text use the shorter histories that they have, so that (2) is -log2 p(text) / T of
a model that is normalised over all texts of that length. What it is not: a good language model (Kneser-Ney would be a
better n-gram).
"""

from __future__ import annotations

import numpy as np

DENSE_LIMIT = 1 << 24  # counts up to this many cells lie in one table (128 MiB); beyond it only the n-grams that occur
CHUNK = 1 << 22  # tokens counted at a time, so that the keys of a long text never lie in memory at once


def entropy(ids: np.ndarray, vocab_size: int) -> float:
    """Entropy of the frequencies of `ids`, in bits per token: -sum_a f(a) log2 f(a), f(a) = c(a) / N."""
    counts = np.bincount(_checked(ids, vocab_size, "ids"), minlength=vocab_size)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log2(frequencies)).sum()) + 0.0  # + 0.0: never "-0.0"


def ngram_cross_entropy(
    train_ids: np.ndarray, test_ids: np.ndarray, vocab_size: int, order: int, delta: float = 5.0
) -> float:
    """Bits per token (2) of `test_ids` under the n-gram model (1) counted on `train_ids`.

    train_ids, test_ids: (N,), (T,) integers in [0, vocab_size). order: 1 unigram, 2 bigram, 3 trigram, and so on while
    vocab_size ** order < 2 ** 63. delta >= 0: strength of the prior; 0 means raw frequencies, and then infinity as
    soon as something occurs that the training text lacks. Raises ValueError for anything else.
    """
    train, test = _checked(train_ids, vocab_size, "train_ids"), _checked(test_ids, vocab_size, "test_ids")
    if order < 1 or vocab_size**order >= 2**63:
        raise ValueError(f"order={order}: must be at least 1, with vocab_size ** order < 2 ** 63 ({vocab_size=})")
    if not delta >= 0:
        raise ValueError(f"delta={delta}: must be 0 or more")
    probability = np.full(len(test), 1.0 / vocab_size)  # p_0
    for n in range(1, min(order, len(test)) + 1):
        ngrams, histories = _counts(train, _keys(test, vocab_size, n), vocab_size, n)
        shorter = probability[n - 1 :]  # p_{n-1} where n - 1 tokens come before; the other positions keep theirs
        with np.errstate(divide="ignore", invalid="ignore"):
            longer = (ngrams + delta * shorter) / (histories + delta)
        probability[n - 1 :] = np.where(histories + delta > 0, longer, shorter)  # delta 0, unseen history
    with np.errstate(divide="ignore"):
        return float(-np.log2(probability).mean()) + 0.0


def _checked(ids: np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: shape {ids.shape}, dtype {ids.dtype}; must be a non-empty row of integers")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{name}: values from {ids.min()} to {ids.max()}; must lie in 0 .. {vocab_size - 1}")
    return ids


def _keys(ids: np.ndarray, vocab_size: int, n: int) -> np.ndarray:
    """(len(ids) - n + 1,) int64: every n-gram as one number, the tokens its digits in base vocab_size."""
    length = max(len(ids) - n + 1, 0)
    keys = np.zeros(length, dtype=np.int64)
    for start in range(n):
        keys *= vocab_size
        keys += ids[start : start + length].astype(np.int64)
    return keys


def _counts(train: np.ndarray, wanted: np.ndarray, vocab_size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """c(h a) and c(h) in `train` for every key h a in `wanted`, both of wanted's shape."""
    if vocab_size**n <= DENSE_LIMIT:
        table = np.zeros(vocab_size**n, dtype=np.int64)
        for start in range(0, len(train) - n + 1, CHUNK):  # neighbouring chunks share n - 1 tokens and no n-gram
            table += np.bincount(_keys(train[start : start + CHUNK + n - 1], vocab_size, n), minlength=len(table))
        return table[wanted], table.reshape(-1, vocab_size).sum(axis=1)[wanted // vocab_size]
    keys, counts = np.unique(_keys(train, vocab_size, n), return_counts=True)
    histories, first = np.unique(keys // vocab_size, return_index=True)
    totals = np.add.reduceat(counts, first) if len(first) else counts
    return _lookup(keys, counts, wanted), _lookup(histories, totals, wanted // vocab_size)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values at the sorted `keys`, 0 where a wanted key is missing."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[position] == wanted, values[position], 0)


def compressed_bits(text: str, method: str = "xz") -> float:
    """Bits per character of the UTF-8 text after the compressor "gzip", "bz2" or "xz", each at its highest level.

    8 * (bytes of the compressed file) / (characters). The file holds everything that is needed to restore the text,
    whereas an n-gram's counts came from other text and are not paid for. gzip looks back 32 KiB, bz2 sorts 900 kB at
    a time, xz looks back 64 MiB. Raises ValueError for empty text, another method, or a Python built without that
    method's module.
    """
    if not text:
        raise ValueError("compressed_bits: the text is empty")
    if method not in ("gzip", "bz2", "xz"):
        raise ValueError(f"method={method!r}: choose 'gzip', 'bz2' or 'xz'")
    data = text.encode("utf-8")
    try:
        if method == "gzip":
            import gzip

            packed = gzip.compress(data, compresslevel=9, mtime=0)
        elif method == "bz2":
            import bz2

            packed = bz2.compress(data, compresslevel=9)
        else:
            import lzma

            packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    except ModuleNotFoundError as error:
        raise ValueError(f"method={method!r}: this Python lacks {error.name}; choose another method") from None
    return 8 * len(packed) / len(text)

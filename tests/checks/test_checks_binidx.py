"""The checks of notebook 02 accept its own solutions and name the mistake in plausible wrong ones."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from notebook_solutions import solution

from rwkv_nb.teaching.checks import binidx

EXERCISES = {"2.1": "parse_header", "2.2": "item_bytes", "2.3": "document_of", "2.4": "crossing_windows"}


def stub(*_):
    raise NotImplementedError("your turn")


@pytest.mark.parametrize("number, name", EXERCISES.items())
def test_solution_is_right_and_stub_is_open(number, name):
    check = getattr(binidx, name)
    verdict = check(solution("02_binidx", number)[name])
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number
    assert check(stub).state == "open"


def header(fmt="<9sQBQQ", pick=(1, 2, 3, 4), magic=True):
    def answer(idx):
        fields = struct.unpack_from(fmt, idx)
        if magic and fields[0] != b"MMIDIDX\0\0":
            raise ValueError("magic")
        return tuple(fields[i] for i in pick)
    return answer


@pytest.mark.parametrize("wrong, word", [
    (header("9sQBQQ"), "begin with '<'"),  # padding
    (header(">9sQBQQ"), "begin with '<'"),  # byte order
    (header("<9sQcQQ"), "'B', not 'c'"),
    (header(pick=(1, 2, 4, 3)), "wrong way round"),
    (header("<9sQBI4xI4x"), "eight"),
    (header("<9sQBII"), "eight bytes each"),
    (header(magic=False), "another magic"),
    (header(pick=(1, 2, 3)), "four numbers"),
    (lambda idx: (1, idx[18], 3, 4), "number 17"),
])
def test_parse_header_rejects(wrong, word):
    verdict = binidx.parse_header(wrong)
    assert verdict.state == "wrong" and word in verdict.message, verdict


def item(start=lambda n, m, i: 34 + 4 * n + 8 * i, size=(lambda i: 34 + 4 * i, "<i"), width=None, stop=None,
         pointer="<q"):
    def answer(idx, i):
        n, m = struct.unpack_from("<QQ", idx, 18)
        first = struct.unpack_from(pointer, idx, start(n, m, i))[0]
        count = struct.unpack_from(size[1], idx, size[0](i))[0]
        bytes_each = width or {8: 2, 4: 4}[idx[17]]
        return (first, first + count * bytes_each) if stop is None else stop(first, count, bytes_each)
    return answer


def test_item_bytes_accepts_the_unbroken_one():
    assert binidx.item_bytes(item()).ok


@pytest.mark.parametrize("wrong, word", [
    (item(start=lambda n, m, i: 34 + 8 * i), "behind ALL sizes"),
    (item(start=lambda n, m, i: 34 + 4 * n + 4 * i), "eight bytes"),
    (item(start=lambda n, m, i: 34 + 4 * (m - 1) + 8 * i), "depend on N alone"),
    (item(stop=lambda first, count, each: (first, first + count)), "sizes count tokens"),
    (item(stop=lambda first, count, each: (first // each, first // each + 7 * each)), "in bytes"),
    (item(width=2), "int32"),
    (item(size=(lambda i: 34 + 8 * i, "<q")), "four bytes"),
])
def test_item_bytes_rejects(wrong, word):
    verdict = binidx.item_bytes(wrong)
    assert verdict.state == "wrong" and word in verdict.message, verdict


def document(side="right", place=lambda offset, ends, sizes, d: offset - (ends[d] - sizes[d]), shift=0, harm=False):
    def answer(sizes, offset):
        ends = np.cumsum(sizes)
        d = min(int(np.searchsorted(ends, offset, side=side)) + shift, len(sizes) - 1)
        result = d, place(offset, ends, sizes, d)
        if harm:
            sizes += 1
            sizes -= 1
            sizes[-1] += 0 if offset < 13 else 1
        return result
    return answer


def by_starts(sizes, offset):
    """Right but for documents without tokens."""
    starts = np.cumsum(sizes) - sizes
    d = int(np.searchsorted(starts, offset, side="right")) - 1
    while d and starts[d - 1] == starts[d]:
        d -= 1
    return d, offset - starts[d]


@pytest.mark.parametrize("wrong, word", [
    (document(side="left"), "side="),
    (document(shift=1), "first token of the first document"),
    (document(place=lambda offset, ends, sizes, d: offset), "from the document's start"),
    (document(place=lambda offset, ends, sizes, d: ends[d] - offset), "expected (0, 0)"),
    (document(place=lambda offset, ends, sizes, d: offset - ends[d]), "expected (0, 0)"),
    (document(harm=True), "changed the sizes"),
    (by_starts, "a document without tokens"),
])
def test_document_of_rejects(wrong, word):
    verdict = binidx.document_of(wrong)
    assert verdict.state == "wrong" and word in verdict.message, verdict


def crossing(length=1, step=0, last=1, count=None, harm=False):
    """length, step: added to ctx_len for the window's length and distance; last: n_tokens - last is divided."""
    def answer(sizes, ctx_len):
        owner = np.repeat(np.arange(len(sizes)), sizes)
        n = (len(owner) - last) // ctx_len if not step else (len(owner) - ctx_len - 1) // (ctx_len + step) + 1
        starts = np.arange(n) * (ctx_len + step)
        ends = np.minimum(starts + ctx_len + length - 1, len(owner) - 1)
        if harm:
            sizes[0] += 1
        crosses = owner[ends] - owner[starts]
        return count(owner) if count else int((crosses > 0).sum())
    return answer


def test_crossing_windows_accepts_the_unbroken_one():
    assert binidx.crossing_windows(crossing()).ok


@pytest.mark.parametrize("wrong, word", [
    (crossing(length=0), "ctx_len + 1"),
    (crossing(length=2), "and does not cross"),
    (crossing(step=1), "share one token"),
    (crossing(count=lambda owner: int(owner[-1])), "not boundaries"),
    (crossing(count=lambda owner: len(set(owner))), "single document"),
    (crossing(last=0), "room for one window"),
    (crossing(harm=True), "changed the sizes"),
])
def test_crossing_windows_rejects(wrong, word):
    verdict = binidx.crossing_windows(wrong)
    assert verdict.state == "wrong" and word in verdict.message, verdict

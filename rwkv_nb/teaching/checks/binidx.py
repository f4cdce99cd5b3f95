"""Checks of notebook 02's exercises: header, byte ranges, documents of offsets, windows that cross.

Truth comes by other paths than the solutions': fields put together with int.to_bytes, label arrays, brute force.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rwkv_nb.teaching.checks import exercise, require


def _index(sizes: list[int], width: int, code: int, n_bounds: int | None = None) -> bytes:
    """An index file put together byte by byte. width: bytes a token."""
    def little(value: int, length: int) -> bytes:
        return value.to_bytes(length, "little")

    n_bounds = len(sizes) + 1 if n_bounds is None else n_bounds
    parts = [b"MMIDIDX\0\0", little(1, 8), little(code, 1), little(len(sizes), 8), little(n_bounds, 8)]
    parts += [little(size, 4) for size in sizes]
    parts += [little(sum(sizes[:i]) * width, 8) for i in range(len(sizes))]
    parts += [little(min(i, len(sizes)), 8) for i in range(n_bounds)]
    return b"".join(parts)


@exercise("2.1", "The header", minutes=8, difficulty=2)
def parse_header(answer: Callable) -> str:
    """answer(idx) -> (version, dtype_code, n_items, n_bounds)."""
    idx = _index([2, 5, 2], width=2, code=8)
    got = answer(idx)
    require(isinstance(got, tuple | list) and len(got) == 4,
            f"return four numbers (version, dtype_code, n_items, n_bounds); yours is {got!r}.")
    version, code, n_items, n_bounds = got
    require(version == 1, f"version is {version!r}, the file says 1. Does your format begin with '<'? Without "
                          "it struct reads the machine's byte order and inserts padding, and this file has none.")
    require(not isinstance(code, bytes), f"dtype_code is {code!r}; it should be a number: 'B', not 'c' or 's'.")
    require(code == 8, f"dtype_code is {code!r}, expected 8: it is the single byte number 17.")
    require((n_items, n_bounds) != (4, 3), "n_items and n_bounds are the wrong way round: N, the items, is first.")
    require((n_items, n_bounds) == (3, 4), f"n_items, n_bounds are {n_items!r}, {n_bounds!r}; this file has 3 items "
                                           "and 4 bounds. Both are u64: eight bytes each, from byte 18 on.")
    large = idx[:18] + (2**32 + 7).to_bytes(8, "little") + (2**32 + 8).to_bytes(8, "little")
    require(tuple(answer(large)[2:]) == (2**32 + 7, 2**32 + 8),
            "a header with more than 2**32 items comes out wrong: did you read four bytes (I) instead of eight (Q)?")
    try:
        answer(b"NOTANIDX\0" + idx[9:])
    except ValueError:
        return "a header of 34 bytes, and you can read each of them."
    require(False, "a file with another magic was accepted; raise a ValueError, or a picture will be read as an index.")
    return ""


@exercise("2.2", "Where item i lies", minutes=10, difficulty=3)
def item_bytes(answer: Callable) -> str:
    """answer(idx, i) -> (start, stop), the byte range of item i in .bin."""
    sizes = [7, 300, 11, 5]
    idx = _index(sizes, width=2, code=8)
    got = tuple(answer(idx, 0))
    require(got[0] == 0, f"item 0 starts at byte {got[0]}, expected 0. Do the pointers begin behind ALL sizes, "
                         "at 34 + 4 * N?")
    require(got[1] != 7, "item 0 stops at byte 7, but it has 7 tokens of two bytes each: sizes count tokens, "
                         "pointers count bytes.")
    require(got[1] == 14, f"item 0 stops at byte {got[1]}, expected 14. Sizes are four bytes each (i), from byte 34.")
    got = tuple(answer(idx, 2))
    require(got[0] != 307, "item 2 starts at byte 307? So many tokens are before it; the pointer is in bytes.")
    require(got == (614, 636), f"item 2 is {got}, expected (614, 636). A pointer is eight bytes: the i-th is at "
                               "34 + 4 * N + 8 * i.")
    wide = _index(sizes, width=4, code=4)
    require(tuple(answer(wide, 2)) == (1228, 1272),
            f"with dtype code 4 (int32) item 2 is {tuple(answer(wide, 2))}, expected (1228, 1272). "
            "Did you take two bytes a token for granted? Byte 17 knows better.")
    more_bounds = _index(sizes, width=2, code=8, n_bounds=9)
    require(tuple(answer(more_bounds, 3)) == (636, 646), "with more document bounds than items the answer changes; "
                                                         "it should depend on N alone.")
    return "any item of a file of any size, with two small reads."


@exercise("2.3", "Whose token is it?", minutes=8, difficulty=2)
def document_of(answer: Callable) -> str:
    """answer(sizes, offset) -> (document, place in it) of the token at `offset` in .bin."""
    sizes = np.array([4, 1, 6, 3], dtype=np.int32)
    kept = sizes.copy()
    owner = [(d, p) for d, size in enumerate(kept.tolist()) for p in range(size)]

    def got(offset: int) -> tuple:
        return tuple(int(number) for number in answer(sizes, offset))

    require(got(0) == (0, 0), f"token 0 is {got(0)}, expected (0, 0): the first token of the first document.")
    require(got(2)[0] == 0, f"token 2 is said to be in document {got(2)[0]}; document 0 has 4 tokens.")
    require(got(2) == (0, 2), f"token 2 is at place {got(2)[1]} of document 0, expected 2.")
    require(got(3) == (0, 3), f"token 3, the last of document 0, is {got(3)}, expected (0, 3).")
    require(got(4)[0] != 0, "token 4 is the first of document 1, not of document 0: look at side= of np.searchsorted "
                            "(a token that equals an end lies behind it).")
    require(got(4) == (1, 0), f"token 4 is {got(4)}, expected (1, 0). Is the place counted from the document's start?")
    for offset, expected in enumerate(owner):
        require(got(offset) == expected, f"token {offset} is {got(offset)}, expected {expected}.")
    require((sizes == kept).all(), "your function changed the sizes it was given.")
    with_empty = np.array([0, 2, 0, 1], dtype=np.int32)
    require(tuple(int(n) for n in answer(with_empty, 2)) == (3, 0),
            "sizes 0, 2, 0, 1: token 2 belongs to document 3; a document without tokens owns none.")
    return "one binary search, however many documents."


@exercise("2.4", "Windows that cross", minutes=12, difficulty=3)
def crossing_windows(answer: Callable) -> str:
    """answer(sizes, ctx_len) -> how many windows hold tokens of more than one document."""
    def truth(sizes: list[int], ctx_len: int) -> int:
        owner = np.repeat(np.arange(len(sizes)), sizes).tolist()
        starts = range(0, len(owner) - ctx_len, ctx_len)
        return sum(len(set(owner[start:start + ctx_len + 1])) > 1 for start in starts)

    require(int(answer(np.array([40]), 8)) == 0, "with a single document no window crosses; yours counts some.")
    got = int(answer(np.array([8, 8]), 8))
    require(got != 0, "sizes 8 and 8, ctx_len 8: the first window has tokens 0 to 8, nine of them (ctx_len + 1), and "
                      "the ninth belongs to document 1.")
    require(got == 1, f"sizes 8 and 8, ctx_len 8: you count {got}; only one window fits, and it crosses.")
    got = int(answer(np.array([2, 2, 2, 2, 2, 30]), 20))
    require(got != 5, "five boundaries in one window are one window that crosses: count windows, not boundaries.")
    got = int(answer(np.array([8, 7, 1]), 8))
    require(got == 1, f"sizes 8, 7 and 1, ctx_len 8: you count {got}; 16 tokens have room for one window of nine, "
                      "not for two.")
    got = int(answer(np.array([9, 8]), 8))
    require(got != 0, "sizes 9 and 8, ctx_len 8: you count 0. The second window starts at token 8, not 9: "
                      "windows start at multiples of ctx_len and share one token.")
    require(got == 1, f"sizes 9 and 8, ctx_len 8: you count {got}, expected 1. Window 0 ends exactly on a document's "
                      "end and does not cross; window 1 begins on that last token and does.")
    generator = np.random.default_rng(2)
    for ctx_len in (5, 16, 33):
        sizes = generator.integers(1, 60, size=80)
        kept = sizes.copy()
        got, expected = int(answer(sizes, ctx_len)), truth(kept.tolist(), ctx_len)
        require(got == expected, f"80 documents, ctx_len {ctx_len}: you count {got} windows, brute force {expected}. "
                                 "The last window must fit whole: there are (n_tokens - 1) // ctx_len.")
        require((sizes == kept).all(), "your function changed the sizes it was given.")
    return "you know now what share of training starts in one document and ends in another."

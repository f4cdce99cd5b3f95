"""Checks of notebook 01's exercises: parse a line, longest match, fewest tokens, decoding a stream.

Truth comes another way than the solutions: fixed vectors, a breadth-first search, Python's own whole-text decoder.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from rwkv_nb.teaching.checks import exercise, require
from rwkv_nb.teaching.widgets.tokenizer import fewest_tokens_split


def _is_pair(answer) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2


@exercise("1.1", "A line of the vocabulary", minutes=6, difficulty=1)
def parse_line(answer: Callable) -> str:
    got = answer("33155 'Hello' 5")
    require(_is_pair(got), f"return a tuple (id, bytes); you returned {type(got).__name__}.")
    require(type(got[0]) is int, f"the id should be an int, yours is {type(got[0]).__name__}.")
    require(isinstance(got[1], bytes), "the entry should be bytes. Did you encode the str that the literal gives?")
    require(got == (33155, b"Hello"), f"for 33155 'Hello' 5 expected (33155, b'Hello'), got {got}. "
                                      "Are the quotes still there?")
    require(answer("10 '\\t' 1") == (10, b"\t"), "an escape such as \\t in the file stands for one character. "
                                               "Did you read the literal, or only cut off its quotes?")
    got = answer("5 '  ' 2")
    require(got == (5, b"  "), "an entry may itself contain spaces. Is your cut at the first and at the *last* space?")
    require(answer('7 "it\'s" 4') == (7, b"it's"), "some literals stand in double quotes.")
    require(answer("9 '今' 3") == (9, b"\xe4\xbb\x8a"), "今 has three bytes. Which encoding did you use? It is UTF-8.")
    require(answer("9 b'\\xe4\\xbb' 2") == (9, b"\xe4\xbb"), "some literals are bytes already: leave them as they are.")
    try:
        answer("9 'a'*3 3")
    except (ValueError, SyntaxError):
        return "spaces, quotes, escapes and bytes, and nothing in the file gets executed."
    require(False, "'a'*3 is an expression, not a literal, and you computed it. A file must not be able to run code: "
                   "did you use eval?")
    return ""


@exercise("1.2", "Longest match", minutes=8, difficulty=2)
def longest_match(answer: Callable) -> str:
    vocabulary = {b"a": 1, b"ab": 2, b"abcde": 3, b"b": 4, b"c": 5, b"\xe4": 6, b"\xe4\xbb": 7}
    before = dict(vocabulary)
    got = answer(b"cx", 0, vocabulary)
    require(_is_pair(got), f"return a tuple (id, end); you returned {type(got).__name__}.")
    require(got == (5, 1), f"for b'cx' expected (5, 1): entry b'c' ends at 1; got {got}.")
    got = answer(b"abx", 0, vocabulary)
    require(got != (1, 1), "did you stop at the first match? b'a' fits, but b'ab' is longer.")
    require(got == (2, 2), f"for b'abx' expected (2, 2), got {got}.")
    got = answer(b"abcdef", 0, vocabulary)
    require(got != (2, 2), "did you stop at the first gap? b'abc' is no entry, yet the longer b'abcde' is.")
    require(got == (3, 5), f"for b'abcdef' expected (3, 5), got {got}.")
    got = answer(b"ab", 0, vocabulary)
    require(got == (2, 2), f"near the end of the data: expected (2, 2), got {got}. "
                            "Does a slice beyond the end fool you?")
    got = answer(b"cab", 1, vocabulary)
    require(got != (5, 1), "do you look at the data from `start` on, or from its beginning?")
    require(got != (2, 2), "end is a position in the data, not the length of the entry: add `start`.")
    require(got == (2, 3), f"for b'cab' from 1 expected (2, 3), got {got}.")
    require(answer(b"\xe4\xbb\x8a", 0, vocabulary) == (7, 2), "bytes, not characters: b'\\xe4\\xbb' is an entry too.")
    require(answer(b"xa", 0, vocabulary) == (None, 0), "where nothing fits, return (None, start).")
    require(vocabulary == before, "you changed the vocabulary that was passed in.")
    return "the longest entry wins, gaps on the way included."


def _greedy(data: bytes, vocabulary: dict[bytes, int], from_right: bool) -> int:
    count = 0
    while data:
        size = max(n for n in range(1, len(data) + 1) if (data[-n:] if from_right else data[:n]) in vocabulary)
        data = data[:-size] if from_right else data[size:]
        count += 1
    return count


@exercise("1.3", "The fewest tokens", minutes=15, difficulty=3)
def fewest_tokens(answer: Callable) -> str:
    letters = {bytes([byte]): byte for byte in b"abcd"}
    require(answer(b"abcd", letters) == 4, "with single letters only, b'abcd' takes 4 tokens.")
    require(answer(b"", letters) == 0, "no bytes need no tokens: expected 0.")
    require(answer(b"abcd", letters | {b"abcd": 9}) == 1, "a whole entry is 1 token. Does the last position count?")
    got = answer(b"abcd", letters | {b"ab": 9, b"bcd": 10})
    require(got != 3, "3 tokens for b'abcd' with entries ab and bcd: is that still greedy? a + bcd are 2.")
    require(got == 2, f"b'abcd' with entries ab and bcd: expected 2, got {got}.")
    got = answer(b"abcd", letters | {b"abc": 9, b"cd": 10})
    require(got != 3, "3 tokens for b'abcd' with entries abc and cd: greedy from the right is greedy too, "
                      "and abc + d are 2.")
    rng = random.Random(1)
    for _ in range(60):
        entries = [bytes(rng.choices(b"abcd", k=rng.randint(2, 6))) for _ in range(12)]
        vocabulary = letters | {entry: 256 + i for i, entry in enumerate(entries)}
        data = b"".join(rng.choices([*entries, b"a", b"d"], k=5))
        before, expected, got = dict(vocabulary), len(fewest_tokens_split(data, vocabulary)), answer(data, vocabulary)
        require(vocabulary == before, "you changed the vocabulary that was passed in.")
        if got != expected:
            either = {_greedy(data, vocabulary, False), _greedy(data, vocabulary, True)}
            require(got not in either, f"{data} can be cut into {expected}, you say {got}, as greedy does.")
            require(False, f"{data} with {sorted(vocabulary)}: expected {expected}, got {got}. "
                           "Do you try every entry that ends (or begins) at a position, long ones included?")
    require(answer(b"ab" * 1500, letters | {b"ab": 9}) == 1500, "3000 bytes with the entry ab: expected 1500.")
    return "never more than greedy, at the price of looking at every position."


@exercise("1.4", "Half a character", minutes=12, difficulty=3)
def feed(answer: Callable) -> str:
    got = answer(b"", b"Hi")
    require(_is_pair(got), f"return a tuple (text, pending); you returned {type(got).__name__}.")
    require(got == ("Hi", b""), f"complete text should come out at once: expected ('Hi', b''), got {got}.")
    got = answer(b"", b"\xc3")
    require(not (isinstance(got[0], str) and "\ufffd" in got[0]),
            "b'\\xc3' may yet become é: hold it back instead of showing U+FFFD.")
    require(got == ("", b"\xc3"), f"b'\\xc3' begins a character: expected ('', b'\\xc3'), got {got}. Did you drop it?")
    require(answer(b"\xc3", b"\xa9") == ("é", b""), "b'\\xc3' was pending and b'\\xa9' completes é. "
                                                  "Do you put `pending` before the new bytes?")
    got = answer(b"", b"ab\xc3")
    require(got == ("ab", b"\xc3"), f"ab is complete, only the rest must wait: expected ('ab', b'\\xc3'), got {got}.")
    got = answer(b"", b"\xffab")
    require(got[0] != "", "b'\\xff' can never become a character; waiting for it would silence you for ever.")
    require(got == ("\ufffdab", b""), f"an invalid byte is shown as U+FFFD: expected ('\ufffdab', b''), got {got}.")
    require(answer(b"\xc3", b"a") == ("\ufffda", b""), "after b'\\xc3' comes an a: the half is lost for good, "
                                                     "show U+FFFD and go on.")
    require(answer(b"", "x\ufffd".encode()) == ("x\ufffd", b""), "a genuine U+FFFD in the text is a character like any "
                                                             "other: is it a reason for you to wait?")
    rng = random.Random(2)
    for _ in range(200):
        stream = b"".join(rng.choices([b"a", "é".encode(), "今".encode(), "😀".encode(), b"\xff", b"\xf0\x9f"], k=6))
        text, pending, at = "", b"", 0
        while at < len(stream):
            step = rng.randint(1, 3)
            piece, pending = answer(pending, stream[at:at + step])
            text, at = text + piece, at + step
        text += pending.decode("utf-8", "replace")
        require(text == stream.decode("utf-8", "replace"), f"{stream} in pieces gave {text!r}, at once it is "
                                                           f"{stream.decode('utf-8', 'replace')!r}.")
    return "nothing too early, nothing lost, never silent."

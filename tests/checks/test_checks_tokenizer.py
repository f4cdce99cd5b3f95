"""Notebook 01's checks: each accepts the notebook's own solution and names the mistake of plausible wrong ones."""

from __future__ import annotations

import ast

import pytest
from notebook_solutions import solution

from rwkv_nb.teaching.checks import tokenizer as check

NAMES = {"1.1": "parse_line", "1.2": "longest_match", "1.3": "fewest_tokens", "1.4": "feed"}


def stub(*_):
    raise NotImplementedError("your turn")


@pytest.mark.parametrize(("number", "name"), NAMES.items())
def test_right_and_open(number, name):
    verdict = getattr(check, name)(solution("01_tokenizer", number)[name])
    assert verdict.ok, verdict
    assert getattr(check, name)(stub).state == "open"
    assert getattr(check, name).about.number == number


def rejects(name, wrong, word):
    verdict = getattr(check, name)(wrong)
    assert verdict.state == "wrong", verdict
    assert word in verdict.message, verdict.message


# 1.1
def cut_literal(line):
    return line[line.index(" ") + 1:line.rindex(" ")]


def by_split(line):
    number, literal, _ = line.split(" ")
    value = ast.literal_eval(literal)
    return int(number), value.encode() if isinstance(value, str) else value


def by_eval(line):
    value = eval(cut_literal(line))  # noqa: S307  the mistake under test
    return int(line.split()[0]), value.encode() if isinstance(value, str) else value


def encoded_as(encoding):
    def wrong(line):
        value = ast.literal_eval(cut_literal(line))
        return int(line.split()[0]), value.encode(encoding, "replace") if isinstance(value, str) else value
    return wrong


@pytest.mark.parametrize(("wrong", "word"), [
    (by_split, "ValueError"),
    (lambda line: by_split(" ".join([line.split()[0], line.split(" ", 2)[1], "1"])), "SyntaxError"),
    (lambda line: (int(line.split()[0]), ast.literal_eval(cut_literal(line))), "bytes"),
    (lambda line: (line.split()[0], b"Hello"), "int"),
    (lambda line: (int(line.split()[0]), cut_literal(line).encode()), "quotes"),
    (lambda line: (int(line.split()[0]), cut_literal(line)[1:-1].encode()), "escape"),
    (lambda line: (int(line.split()[0]), cut_literal(line)[1:-1].encode().decode("unicode_escape").encode()), "UTF-8"),
    (encoded_as("latin-1"), "Which encoding"),
    (encoded_as("utf-16-le"), "expected"),
    (lambda line: (int(line.split()[0]), ast.literal_eval(cut_literal(line)).encode()), "AttributeError"),
    (by_eval, "eval"),
    (lambda line: None, "tuple"),
])
def test_parse_line_rejects(wrong, word):
    rejects("parse_line", wrong, word)


# 1.2
def ends(data, start, order):
    return range(start + 1, len(data) + 1) if order > 0 else range(len(data), start, -1)


def first_match(data, start, ids_of):
    return next(((ids_of[data[start:e]], e) for e in ends(data, start, 1) if data[start:e] in ids_of), (None, start))


def first_gap(data, start, ids_of):
    token, end = None, start
    while end < len(data) and data[start:end + 1] in ids_of:
        end += 1
        token = ids_of[data[start:end]]
    return token, end


def from_beginning(data, start, ids_of):
    return next(((ids_of[data[:e]], e) for e in ends(data, 0, -1) if data[:e] in ids_of), (None, start))


def length_for_end(data, start, ids_of):
    return next(((ids_of[data[start:e]], e - start) for e in ends(data, start, -1) if data[start:e] in ids_of),
                (None, start))


def fooled_by_slices(data, start, ids_of):
    for size in range(6, 0, -1):
        if data[start:start + size] in ids_of:
            return ids_of[data[start:start + size]], start + size
    return None, start


def no_hit_raises(data, start, ids_of):
    return next((ids_of[data[start:e]], e) for e in ends(data, start, -1) if data[start:e] in ids_of)


def pops(data, start, ids_of):
    found = first_solution()(data, start, ids_of)
    ids_of[b"zz"] = 99
    return found


def first_solution():
    return solution("01_tokenizer", "1.2")["longest_match"]


def characters(data, start, ids_of):
    text = data[start:].decode("utf-8", "replace")
    for size in range(len(text), 0, -1):
        piece = text[:size].encode()
        if piece in ids_of:
            return ids_of[piece], start + len(piece)
    return None, start


@pytest.mark.parametrize(("wrong", "word"), [
    (first_match, "first match"), (first_gap, "first gap"), (from_beginning, "from `start` on"),
    (length_for_end, "add `start`"), (fooled_by_slices, "slice"), (no_hit_raises, "StopIteration"),
    (characters, "not characters"), (pops, "changed the vocabulary"), (lambda *_: 3, "tuple"),
])
def test_longest_match_rejects(wrong, word):
    rejects("longest_match", wrong, word)


# 1.3
def greedy(data, ids_of):
    return check._greedy(data, ids_of, False)


def greedy_from_right(data, ids_of):
    return check._greedy(data, ids_of, True)


def dynamic(longest, last):
    def wrong(data, ids_of):
        f = [0]
        for j in range(1, len(data) + 1):
            f.append(1 + min(f[i] for i in range(max(0, j - longest), j) if data[i:j] in ids_of))
        return f[last] if data else 0
    return wrong


def recursive(data, ids_of):
    if not data:
        return 0
    return 1 + min(recursive(data[n:], ids_of) for n in range(1, min(6, len(data)) + 1) if data[:n] in ids_of)


@pytest.mark.parametrize(("wrong", "word"), [
    (greedy, "still greedy"), (greedy_from_right, "from the right"), (dynamic(3, -1), "a whole entry"),
    (dynamic(4, -1), "long ones included"), (dynamic(9, -2), "4 tokens"), (lambda data, _: len(data), "whole entry"),
    (lambda data, ids_of: min(greedy(data, ids_of), greedy_from_right(data, ids_of)), "greedy does"),
    (lambda data, ids_of: min(map(len, [data])) or 1, "expected 0"),
])
def test_fewest_tokens_rejects(wrong, word):
    rejects("fewest_tokens", wrong, word)


def test_fewest_tokens_names_what_recursion_raises():
    small = recursive

    def wrong(data, ids_of):
        return small(data, ids_of) if len(data) < 5 else (_ for _ in ()).throw(RecursionError("too deep"))

    rejects("fewest_tokens", wrong, "RecursionError")


# 1.4
def waits_for_no_mark(pending, new):
    data = pending + new
    text = data.decode("utf-8", "replace")
    return ("", data) if "\ufffd" in text else (text, b"")


def all_or_nothing(pending, new):
    data = pending + new
    try:
        return data.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        return ("", data) if error.reason == "unexpected end of data" else (data.decode("utf-8", "replace"), b"")


def ignores_errors(pending, new):
    text, pending = solution("01_tokenizer", "1.4")["feed"](pending, new)
    return text.replace("\ufffd", ""), pending


def waits_for_genuine_mark(pending, new):
    text, rest = solution("01_tokenizer", "1.4")["feed"](pending, new)
    return ("", pending + new) if text.endswith("x\ufffd") else (text, rest)


@pytest.mark.parametrize(("wrong", "word"), [
    (lambda pending, new: (new.decode("utf-8", "replace"), b""), "hold it back"),
    (lambda pending, new: (new.decode("utf-8", "ignore"), b""), "Did you drop it"),
    (lambda pending, new: solution("01_tokenizer", "1.4")["feed"](new, pending), "before the new bytes"),
    (waits_for_no_mark, "only the rest must wait"), (all_or_nothing, "only the rest must wait"),
    (ignores_errors, "U+FFFD"), (waits_for_genuine_mark, "genuine"),
    (lambda pending, new: (pending + new).decode("utf-8", "replace"), "tuple"),
])
def test_feed_rejects(wrong, word):
    rejects("feed", wrong, word)

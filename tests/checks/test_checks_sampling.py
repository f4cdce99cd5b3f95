"""Each check of notebook 08 takes the notebook's own solution and names the mistake in plausible wrong ones."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from notebook_solutions import solution
from rwkv.utils import PIPELINE

from rwkv_nb.teaching.checks import sampling as check

NOTEBOOK = "08_sampling"
EXERCISES = {
    "8.1": ("top_p", "keep_top_p"),
    "8.2": ("cutoff", "how_many_stay"),
    "8.3": ("penalties", "penalties_after"),
    "8.4": ("temperature", "sharpen"),
    "8.5": ("may_show", "may_show"),
}


@pytest.mark.parametrize(("number", "name", "answer"), [(n, *rest) for n, rest in EXERCISES.items()])
def test_solution_of_the_notebook_is_right_and_the_stub_is_open(number, name, answer):
    verdict = getattr(check, name)(solution(NOTEBOOK, number)[answer])
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number

    def stub(*_):
        raise NotImplementedError("your turn")

    assert getattr(check, name)(stub).state == "open"


def test_the_package_is_greedy_where_the_check_says_so(monkeypatch):
    drawn = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: drawn.append(int((p > 0).sum())) or 0)
    PIPELINE.sample_logits(object.__new__(PIPELINE), check.rounds_below_one().log(), 1.0, 1.0, 0)
    assert drawn == [1]


def keep(p, limit, stable=True, whole=True, extra=1, reached="<", by_value=False, sums=1.0, scale=None, place=True):
    ordered, order = torch.sort(p.double() if whole else p, descending=True, stable=True)
    if not stable:
        order = torch.cat([order[ordered == v].flip(0) for v in ordered.unique().flip(0)])
    total = ordered.cumsum(0)
    n = min(len(p), max(0, int((total < limit).sum() if reached == "<" else (total <= limit).sum()) + extra))
    if whole and limit == 1.0:
        n = len(p)
    if by_value and limit < 1:
        n = int((ordered >= ordered[n - 1]).sum())
    found = torch.zeros_like(p)
    ids = order[:n] if place else torch.arange(n)
    found[ids] = p[order[:n]] if scale is None else scale(p[order[:n]])
    return found / found.sum() * sums if n and sums else found


def in_place(p, limit):
    found = keep(p, limit)
    p[:] = 0
    return found


def stay(ordered, limit, ask=True, plus=1, side="left", only_one=False, kind=int):
    sums = np.cumsum(ordered)
    if only_one:
        return len(ordered) if limit == 1 else int(np.argmax(sums >= limit)) + 1
    if ask and sums[-1] < limit:
        return kind(len(ordered))
    return kind(np.argmax(sums >= limit if side == "left" else sums > limit) + plus)


def lost(tokens, free, presence, frequency, decay, order=("fade", "add"), own=False, twice=False, skip=False,
         keep_presence=True, forget=False, everyone=False):  # fmt: skip
    counts, times = {}, {}
    for token in tokens:
        for step in order:
            if step == "fade":
                counts = {t: c * (decay if not own or t == token else 1) for t, c in counts.items()}
                times = times if keep_presence else {t: n * decay for t, n in times.items()}
            else:
                counts[token] = (0 if forget else counts.get(token, 0)) + (token not in free)
                times[token] = times.get(token, 0) + 1 if twice or not keep_presence else 1
    return {t: presence * times[t] + frequency * c for t, c in counts.items() if not (skip and t in free)} | (
        {99: presence} if everyone else {}
    )


def sharp(p, T, power=lambda T: 1 / T, zero=True, safe=True, soft=False, floor=0.0, scale=True):
    if soft:
        return torch.softmax(p / max(T, 1e-9), 0)
    if T == 0 and zero:
        return torch.nn.functional.one_hot(p.argmax(), len(p)).double()
    if T == 0:
        return (p == p.max()).double() / (p == p.max()).sum()
    q = ((p + floor) / (p.max() if safe else 1)) ** power(T)
    return q / q.sum() if scale else q


def visible(text, stop, last=False, hold=True, longest=True, after=0):
    at = (text.rfind if last else text.find)(stop)
    if at >= 0:
        return at + after
    sizes = range(1, len(stop)) if not longest else range(len(stop) - 1, 0, -1)
    return len(text) - next((n for n in sizes if text.endswith(stop[:n])), 0) if hold else len(text)


def changed(function, **changes):
    return lambda *args: function(*args, **changes)


WRONG = {
    "top_p": [
        (changed(keep, extra=0), "before the token that crosses"),
        (changed(keep, place=False), "places of the sorted list"),
        (changed(keep, reached="<="), "need not be passed"),
        (changed(keep, by_value=True), "cut by the value"),
        (changed(keep, stable=False), "stable=True"),
        (changed(keep, sums=0.0), "sum 1 again"),
        (changed(keep, scale=lambda q: torch.ones_like(q)), "proportions"),
        (in_place, "changed its argument"),
        (lambda p, limit: keep(p, limit).tolist(), "return a tensor"),
        (lambda p, limit: keep(p, limit)[:2], "a number for each token"),
        (lambda p, limit: p * 0, "nothing is left"),
        (lambda p, limit: keep(p, limit) / 0 * 0, "NaN"),
        (lambda p, limit: p, "keeps \\[0, 1, 2, 3\\]"),
        (lambda p, limit: keep(p, limit - 1e-9) if limit < 1 else keep(p, 0.5), "top_p = 1 should keep"),
    ],
    "cutoff": [
        (changed(stay, ask=False), "argmax of nothing but False"),
        (changed(stay, only_one=True), "mended top_p = 1 alone"),
        (changed(stay, plus=0), "One too few"),
        (changed(stay, side="right"), "0.75 exactly"),
        (lambda ordered, limit: int(np.searchsorted(np.cumsum(ordered), limit)) + 1, "More than there are"),
        (changed(stay, kind=float), "whole number"),
        (lambda ordered, limit: stay(ordered, limit) if limit < 1 else len(ordered) // 2, "top_p = 1"),
        (lambda ordered, limit: stay(ordered, limit) + (limit == 0), "top_p = 0"),
    ],
    "penalties": [
        (changed(lost, order=("add", "fade")), "The newest token counts in full"),
        (changed(lost, twice=True), "counts once"),
        (changed(lost, own=True), "also when another token"),
        (changed(lost, keep_presence=False), "presence"),
        (changed(lost, skip=True), "but it was drawn"),
        (changed(lost, forget=True), "2 \\* 0.25"),
        (lambda tokens, free, *rest: lost(tokens, set(), *rest), "is not counted"),
        (changed(lost, everyone=True), "never drawn"),
        (lambda tokens, *rest: list(lost(tokens, *rest).items()), "dictionary"),
        (lambda tokens, free, presence, frequency, decay: lost(tokens, free, 0, frequency, decay), "drawn once"),
    ],
    "temperature": [
        (changed(sharp, power=lambda T: T), "below 1 a temperature sharpens"),
        (changed(sharp, soft=True), "probabilities already"),
        (changed(sharp, safe=False), "Divide by the largest|zero by zero"),
        (changed(sharp, zero=False), "lower id wins"),
        (changed(sharp, scale=False), "sum|change nothing"),
        (changed(sharp, floor=1e-12), "What was cut stays cut"),
        (lambda p, T: sharp(p.mul_(1.0 if T != 0.5 else 0.5), T), "changed its argument"),
        (lambda p, T: sharp(p, T).tolist(), "return a tensor"),
        (lambda p, T: sharp(p, max(T, 0.05)), "likeliest"),
        (lambda p, T: p, "T = 0.5"),
    ],
    "may_show": [
        (changed(visible, hold=False), "hold it back"),
        (changed(visible, last=True), "the first counts"),
        (changed(visible, after=6), "show the stop text itself"),
        (changed(visible, longest=False), "longest piece"),
        (lambda text, stop: len(text), "and you show it"),
        (lambda text, stop: max(0, visible(text, stop) - len(stop)), "show everything"),
        (lambda text, stop: text[: visible(text, stop)], "whole number"),
        (lambda text, stop: visible(text, stop) if stop in text else len(text) - (text[-1:] == stop[0]),
         "hold it back"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, w, m) for n, cases in WRONG.items() for w, m in cases])
def test_wrong_answers_are_named(name, wrong, message):
    verdict = getattr(check, name)(wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message), verdict.message


def test_the_helpers_above_are_right_when_nothing_is_changed():
    right = [check.top_p(keep), check.cutoff(stay), check.penalties(lost), check.temperature(sharp)]
    for verdict in (*right, check.may_show(visible)):
        assert verdict.state == "right", verdict

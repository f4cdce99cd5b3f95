"""Each check of notebook 05 takes the notebook's own solution and names the mistake in plausible wrong ones."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from notebook_solutions import solution, solution_sources

from rwkv_nb.teaching import kernel_source
from rwkv_nb.teaching.checks import Verdict
from rwkv_nb.teaching.checks import wkv_kernel as check
from rwkv_nb.wkv import emulated

NOTEBOOK = "05_wkv_kernel"
EXERCISES = {
    "5.1": ("forward_kernel", ["my_kernel"]),
    "5.2": ("gradient_of_u", ["gradient_of_u"]),
    "5.3": ("chunk_boundary", ["carry", "carry_back"]),
    "5.4": ("backward_numbers", ["backward_numbers"]),
}
needs_compiler = pytest.mark.skipif(emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}")


def answers(number: str) -> list:
    found = solution(NOTEBOOK, number)
    return [found[name] for name in EXERCISES[number][1]]


@pytest.mark.parametrize("number", ["5.2", "5.3", *(pytest.param(n, marks=needs_compiler) for n in ("5.1", "5.4"))])
def test_solution_of_the_notebook_is_right(number):
    verdict = getattr(check, EXERCISES[number][0])(*answers(number))
    assert verdict.state == "right", verdict
    assert verdict.exercise.number == number


@pytest.mark.parametrize("number", EXERCISES)
def test_stub_is_open(number):
    def stub(*_):
        raise NotImplementedError("your turn")

    name, names = EXERCISES[number]
    stubs = ["__global__ void my_wkv() {\n    // your turn\n}"] if number == "5.1" else [stub] * len(names)
    assert getattr(check, name)(*stubs).state == "open"


BARRIER = "        __syncthreads();\n"
READ_S = "            sum += r_t[j] * (S[j] + bonus[j] * kv);\n"
WRITE_S = "            S[j] = d[j] * S[j] + kv;\n"
WRONG_KERNELS = [  # (text in the solution, what stands there instead, which occurrence, a word of the message)
    (BARRIER, "", 1, "shared array [rk]_t.*A __syncthreads.. is missing"),
    (BARRIER, "", 2, "shared array .*A __syncthreads.. is missing"),
    (BARRIER, "        if (i < 8) __syncthreads();\n", 2, "reached by all threads"),
    (" + bonus[j] * kv", "", 1, "bonus u k v is missing"),
    (READ_S + WRITE_S, WRITE_S + READ_S, 1, "update the state before you read"),
    ("d[j] * S[j] + kv", "d[j] * (S[j] + kv)", 1, "has faded already"),
    ("d[j] * S[j] + kv", "d[j] * d[j] * S[j] + kv", 1, "faded twice"),
    ("expf(-expf(", "expf(-(", 1, r"decay by exp\(-w\)"),
    ("first = blockIdx.x * T * N", "first = blockIdx.x / H * T * H * N + h * N", 1, "begins at n T N"),
    ("t * N + i", "t * H * N + i", 1, "out of bounds.* N numbers further"),
    ("h * N + i", "i", 1, "own w and u|For w and u it is h N"),
    ("y[first + t * N + i] = sum;", "y[first + t * N] = sum;", 1, "Two threads write one element"),
    ("t++", "t += 0", 1, "Does the loop over t end"),
    ("float kv = ", "kv = ", 1, "does not compile, line"),
]


@pytest.fixture(scope="module")
def verdicts():
    """The verdicts on all wrong kernels; two compilers at a time."""
    [right] = answers("5.1")

    def judge(case: tuple) -> Verdict:
        old, new, which, _ = case
        return check.forward_kernel(kernel_source.edit(right, old, new, which))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(WRONG_KERNELS, pool.map(judge, WRONG_KERNELS), strict=True))


@needs_compiler
@pytest.mark.parametrize("case", WRONG_KERNELS, ids=lambda case: case[3])
def test_wrong_kernels_are_named(verdicts, case):
    assert verdicts[case].state == "wrong", verdicts[case]
    assert re.search(case[3], verdicts[case].message, re.DOTALL), verdicts[case].message


def dot(v, gy):
    return (v * gy).sum(-1, keepdim=True)


def powers(w, n):
    return torch.exp(-torch.exp(w) * n[:, None])


def carry(whole=lambda L: L, pair=lambda L, s: L - 1 - s, swap=False):
    def function(k, v, w, S):
        L, s = len(k), torch.arange(len(k))
        pairs = (k * powers(w, pair(L, s))).T @ v
        return torch.exp(-torch.exp(w) * whole(L))[:, None] * S + (pairs.T if swap else pairs)

    function.__name__ = "carry"
    return function


def carry_back(whole=lambda L: L, reading=lambda L, t: t):
    def function(r, gy, w, Q):
        L, t = len(r), torch.arange(len(r))
        return torch.exp(-torch.exp(w) * whole(L))[:, None] * Q + (r * powers(w, reading(L, t))).T @ gy

    function.__name__ = "carry_back"
    return function


def split_powers(k, v, w, S):  # d^(L-1) times d^-s: right on paper, infinite in floating point
    L, s = len(k), torch.arange(len(k))
    whole = torch.exp(-torch.exp(w) * (L - 1))[:, None]
    return torch.exp(-torch.exp(w) * L)[:, None] * S + whole * ((k * powers(w, -s)).T @ v)


WRONG = {
    "gradient_of_u": [
        (lambda r, k, v, gy: r * k * dot(v, gy), "sum over both"),
        (lambda r, k, v, gy: (r * k * dot(v, gy)).sum(1), "should have shape"),
        (lambda r, k, v, gy: (r * k * v * gy).sum((0, 1)), "entry by entry"),
        (lambda r, k, v, gy: (dot(r, k) * v * gy).sum((0, 1)), "keep the values"),
        (lambda r, k, v, gy: (k * dot(v, gy)).sum((0, 1)), r"r\[j\] is missing"),
        (lambda r, k, v, gy: (r * dot(v, gy)).sum((0, 1)), r"k\[j\] is missing"),
        (lambda r, k, v, gy: (r * k * dot(v, gy)).mean((0, 1)), "average"),
        (lambda r, k, v, gy: (r * k * dot(v, gy)).sum(1)[0], "all texts"),
        (lambda r, k, v, gy: r.sum((0, 1)) * k.sum((0, 1)) * dot(v, gy).sum((0, 1)), "before multiplying"),
        (lambda r, k, v, gy: -(r * k * dot(v, gy)).sum((0, 1)), "sign"),
        (lambda r, k, v, gy: None, "Return a tensor"),
    ],
    "chunk_boundary": [
        ((carry(whole=lambda L: L - 1), carry_back()), r"you take d\^\(L-1\)"),
        ((carry(whole=lambda L: 16), carry_back()), r"d\^16"),
        ((carry(whole=lambda L: 0), carry_back()), "has not faded"),
        ((carry(whole=lambda L: 1), carry_back()), "one step only"),
        ((carry(pair=lambda L, s: L - s), carry_back()), "faded L - s times"),
        ((carry(pair=lambda L, s: s), carry_back()), r"you take d\^s"),
        ((carry(pair=lambda L, s: 0 * s), carry_back()), "steps of the chunk come after it"),
        ((carry(swap=True), carry_back()), "value, key"),
        ((split_powers, carry_back()), "inf or NaN"),
        ((carry(), carry_back(whole=lambda L: -L)), r"divide by d\^L"),
        ((carry(), carry_back(whole=lambda L: L - 1)), r"carry_back.*you take d\^\(L-1\)"),
        ((carry(), carry_back(reading=lambda L, t: t + 1)), "reads before it fades"),
        ((carry(), carry_back(reading=lambda L, t: L - 1 - t)), "as for pairs"),
        ((carry(), lambda r, gy, w, Q: Q[0]), "one .N, N. tensor"),
    ],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, w, m) for n, cases in WRONG.items() for w, m in cases])
def test_wrong_answers_are_named(name, wrong, message):
    verdict = getattr(check, name)(*wrong) if isinstance(wrong, tuple) else getattr(check, name)(wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message), verdict.message


def numbers(timed=17, states=6, size=1, extra=0):
    return lambda B, T, H, N: size * (timed * B * T * H * N + states * B * H * N * N) + extra


@needs_compiler
@pytest.mark.parametrize(("wrong", "message"), [
    (numbers(7, 3), "each array once"),
    (numbers(size=4), "You give bytes"),
    (numbers(states=0), "states are missing"),
    (numbers(timed=0), "arrays with a T are missing"),
    (numbers(timed=16), "Its count is"),
    (lambda B, T, H, N: numbers()(1, T, H, N), "B H divides|Its count is"),
    (numbers(extra=7), "divides|Its count"),
])  # fmt: skip
def test_wrong_counts_are_named(wrong, message):
    verdict = check.backward_numbers(wrong)
    assert verdict.state == "wrong"
    assert re.search(message, verdict.message), verdict.message


def test_the_notebook_has_a_solution_for_each_exercise():
    assert set(solution_sources(NOTEBOOK)) == set(EXERCISES)


@pytest.mark.parametrize(("name", "answer"), [("forward_kernel", "void my_wkv() {}"), ("backward_numbers", numbers())])
def test_without_a_compiler_the_check_says_what_is_missing(monkeypatch, name, answer):
    monkeypatch.setattr(emulated, "why_not", lambda: "needs a C++ compiler: get one")
    verdict = getattr(check, name)(answer)
    assert verdict.state == "wrong" and "needs a C++ compiler" in verdict.message

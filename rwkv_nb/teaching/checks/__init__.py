"""Instant feedback on exercises: what is right, or which mistake it looks like.

One module a notebook; here is what they share. A check takes the reader's answer and returns a Verdict, whose repr is
what the notebook shows. It never raises for a wrong answer.

    @exercise("1.1", "Longest match", minutes=8, difficulty=2)
    def longest_match(answer):
        require(answer(b"abc", {b"a", b"ab"}) == 2, "Did you stop at the first match? The longest one wins.")

What it is not: a test suite. tests/checks proves that each check accepts the notebook's own solution and rejects a
list of plausible wrong ones, each with a message that names the mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    """What the exercise box in the notebook says."""

    number: str  # "1.1": notebook, then place in it
    title: str
    minutes: int
    difficulty: int  # 1 to 5


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check. state: "right", "wrong" or "open" (not written yet)."""

    exercise: Exercise
    state: str
    message: str

    @property
    def ok(self) -> bool:
        return self.state == "right"

    def __repr__(self) -> str:
        mark = {"right": "[right]", "wrong": "[not yet]", "open": "[to do]"}[self.state]
        return f"{mark} {self.exercise.number} {self.exercise.title}: {self.message}"


class Mistake(Exception):
    """Raised by `require` inside a check; `exercise` turns it into a Verdict."""


REGISTRY: dict[str, Callable] = {}  # number -> check, for tests and reports; filled when a check module is imported
LISTENERS: list[Callable[[Verdict, tuple], None]] = []  # called with each verdict and the answers that it is about


def require(condition: bool, message: str) -> None:
    """Stop the check with `message` unless `condition` holds. The message asks about the likely mistake."""
    if not condition:
        raise Mistake(message)


def exercise(number: str, title: str, minutes: int, difficulty: int) -> Callable:
    """Turn a function that calls `require` into a check that returns a Verdict."""
    about = Exercise(number, title, minutes, difficulty)

    def decorate(function: Callable) -> Callable:
        def judge(answers: tuple) -> Verdict:
            try:
                praise = function(*answers)
            except NotImplementedError:
                return Verdict(
                    about, "open", f"not written yet (about {minutes} min). Fill in the cell above, run both."
                )
            except Mistake as mistake:
                return Verdict(about, "wrong", str(mistake))
            except Exception as error:  # noqa: BLE001  the reader's code may raise anything; the lesson goes on
                return Verdict(about, "wrong", f"your code raised {type(error).__name__}: {error}")
            return Verdict(about, "right", praise or "well done.")

        @functools.wraps(function)
        def check(*answers) -> Verdict:
            verdict = judge(answers)
            for listen in LISTENERS:
                listen(verdict, answers)
            return verdict

        check.about = about
        REGISTRY[number] = check
        return check

    return decorate

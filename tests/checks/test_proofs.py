"""At the end of the proofs: every check of the course was seen to reject at least three wrong answers, each in words of
its own. conftest.py lets these tests run last."""

from __future__ import annotations

import pytest

from rwkv_nb.teaching import exercises
from rwkv_nb.wkv import emulated

EVERY = exercises.exercises()


@pytest.mark.parametrize("number", [about.number for about in EVERY])
def test_at_least_three_wrong_answers_were_rejected(number, rejected, pytestconfig):
    options = pytestconfig.option
    chosen = options.keyword or options.markexpr or getattr(options, "lf", False)
    if chosen or any("::" in argument for argument in pytestconfig.args):
        pytest.skip("only a part of the proofs ran")
    if number not in rejected and not any(n.split(".")[0] == number.split(".")[0] for n in rejected):
        pytest.skip("the proofs of this notebook did not run")
    if number in ("5.1", "5.4") and emulated.why_not():
        pytest.skip(f"the emulator {emulated.why_not()}")
    assert len(rejected.get(number, {})) >= 3, rejected.get(number)


def test_at_least_thirty_exercises():
    assert len(EVERY) >= 30
    assert all(1 <= about.difficulty <= 5 and about.minutes > 0 and about.title for about in EVERY)

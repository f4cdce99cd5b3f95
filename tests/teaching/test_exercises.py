"""The list of exercises and the report of the wrong answers: taken from checks and proofs, with no list of its own."""

from __future__ import annotations

import math
import re

import pytest

from rwkv_nb import __main__ as door
from rwkv_nb.teaching import checks, exercises
from rwkv_nb.teaching.checks import start_here

PROOF = """
import math
from rwkv_nb.teaching.checks import start_here

def twice(x):
    return 2 * x

def test_rejects():
    assert start_here.units(lambda x: x * math.log(2), math.exp).state == "wrong"
    assert start_here.units(twice, math.exp).state == "wrong"
"""


def test_the_list_has_every_check_once_and_in_order(capsys):
    assert door.main(["checks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = [line.split()[0] for line in lines[:-1]]
    assert set(numbers) == set(checks.REGISTRY) and len(numbers) == len(set(numbers))
    assert numbers == sorted(numbers, key=lambda number: [int(part) for part in number.split(".")])
    assert re.search(r"^ 0\.2  ●●○○○   8 min  The unigram yardstick +00_start_here\.ipynb$", "\n".join(lines), re.M)
    assert lines[-1].startswith(f"{len(numbers)} exercises")


def test_a_rejected_answer_is_recorded_with_its_source():
    listeners = list(checks.LISTENERS)
    with exercises.recorded() as found:
        start_here.units(lambda x: x * math.log(2), math.exp)
        start_here.units(lambda x: x / math.log(2), math.exp)  # right: not recorded
    [(message, words)] = found["0.1"].items()
    assert words == "lambda x: x * math.log(2), exp" and "divide" in message
    assert listeners == checks.LISTENERS


def test_two_lambdas_on_one_line_are_told_apart():
    pair = (lambda x: x + 1, lambda x: x + 2)
    assert [exercises.describe(answer) for answer in pair] == ["lambda x: x + 1", "lambda x: x + 2"]


def test_the_report_runs_the_proofs(tmp_path, monkeypatch):
    (tmp_path / "test_one.py").write_text(PROOF, encoding="utf-8")
    found = exercises.run_proofs(tmp_path)
    assert list(found) == ["0.1"] and len(found["0.1"]) == 2
    report = exercises.table(found)
    assert "- lambda x: x * math.log(2), exp\n" in report and "- twice, exp\n" in report
    assert "2 wrong answers rejected" in report


def test_a_failing_proof_ends_the_report(tmp_path):
    (tmp_path / "test_one.py").write_text("def test_no():\n    assert 1 == 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)a proof failed.*1 == 2"):
        exercises.run_proofs(tmp_path)


def test_without_a_clone_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="in a clone of the repository"):
        exercises.run_proofs(tmp_path / "missing")

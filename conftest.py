"""What a run over the notebooks adds to pytest: seconds per notebook against its own promise, and what was compared.

A notebook's head says `N min on two CPU cores`. Executing it may take at most twice that, or the run fails.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest

BUDGET = re.compile(r"\*\*Run time\*\*[^|]*\|\s*(\d+(?:\.\d+)?) min on two CPU cores")
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
seconds_of: dict[Path, float] = defaultdict(float)


def budget_minutes(path: Path) -> float:
    """The minutes that the head of a notebook promises. ValueError if it promises none."""
    head = nbformat.read(path, as_version=4).cells[0].source
    promise = BUDGET.search(head)
    if not promise:
        raise ValueError(f"{path.name}: the first cell has no line '**Run time** | N min on two CPU cores'")
    return float(promise.group(1))


def compared_cells(path: Path) -> tuple[int, int]:
    """(cells whose text output strict nbval compares, code cells with output)."""
    compared = with_output = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or not cell.outputs:
            continue
        with_output += 1
        texts = [
            o
            for o in cell.outputs
            if o.output_type == "stream" or any(k.startswith("text/") for k in o.get("data", {}))
        ]
        compared += bool(texts) and not UNCOMPARED & set(cell.metadata.get("tags", []))
    return compared, with_output


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = Path(report.nodeid.split("::")[0])
    if path.suffix == ".ipynb" and report.when != "teardown":  # the last teardown also closes what other tests used
        seconds_of[path] += report.duration


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    for path, seconds in seconds_of.items():
        full = session.config.rootpath / path
        if full.parent.name == "notebooks" and seconds > 120 * budget_minutes(full):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    lessons = {path: config.rootpath / path for path in seconds_of if path.parent.name == "notebooks"}
    if not lessons:
        return
    terminalreporter.section("notebooks")
    total = [0, 0]
    for path, full in lessons.items():
        budget, (compared, outputs) = budget_minutes(full), compared_cells(full)
        total = [total[0] + compared, total[1] + outputs]
        verdict = "OVER TWICE ITS PROMISE" if seconds_of[path] > 120 * budget else "ok"
        terminalreporter.write_line(
            f"{path.name:<28} {seconds_of[path]:6.1f} s of {60 * budget:.0f} s promised: {verdict}; "
            f"{compared} of {outputs} output cells compared"
        )
    terminalreporter.write_line(f"strict comparison covers {total[0]} of {total[1]} cells with output")

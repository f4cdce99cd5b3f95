"""Running a reader's kernel for a check: what went wrong becomes a message that names the array, the line, the remedy.

What it is not: a check of numbers; that comes after the run, in the check of each exercise.
"""

from __future__ import annotations

from rwkv_nb.teaching.checks import require
from rwkv_nb.wkv import emulator

HINTS = {
    "uninitialised": "Did every thread write its own element, and does a barrier come before others read it?",
    "divergent barrier": "__syncthreads() must be reached by all threads: not inside an if that some skip.",
    "step limit": "Does the loop over t end?",
}
MISSING_BARRIER = (
    "A __syncthreads() is missing. It takes two in each step: one after writing, before others read, and one after "
    "reading, before the next step overwrites."
)
ONE_ELEMENT = "Two threads write one element: is the index different for every thread, and for every block?"
OWN_ELEMENT = "Each thread should fill its own element of the shared arrays."


def run_answer(source: str, launch: emulator.Launch, schedule: str, layout: str) -> emulator.Report:
    """Launch a kernel that a reader wrote; Mistake if it does not compile, stops early, or holds a race.

    layout: what to say about an index that leaves its array, or meets another block's.
    """
    try:
        report = emulator.launch(source, [launch], schedule=schedule, limit=3_000_000, seconds=20)
    except emulator.KernelError as error:
        require(False, str(error))
    stops = [p for p in report.problems if p.kind != "uninitialised"]
    if stops:  # before races: a barrier that some threads miss causes those too
        hints = HINTS | {"out of bounds": layout}
        require(False, f"{stops[0]}. {hints.get(stops[0].kind, '')}".strip())
    if report.races:
        race = report.races[0]
        if race.space == "global":
            hint = f"{ONE_ELEMENT} {layout}"
        else:
            hint = MISSING_BARRIER if len(set(race.kinds)) == 2 else OWN_ELEMENT
        require(False, f"{race}. {hint}")
    if report.problems:
        require(False, f"{report.problems[0]}. {HINTS['uninitialised']}")
    return report

"""Sections of benchmarks/RESULTS.md, shown in a notebook: figures measured on a machine that the reader may not have.

    measured.section("GPU")          the first section whose title has this word, as Markdown, or None
    measured.table("GPU")            the rows of its first table, each as column -> text

What it is not: a measurement. Each section names its machine, its date and the command that measures it again.
"""

from __future__ import annotations

import re
from pathlib import Path

from IPython.display import Markdown

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "RESULTS.md"


def section(*words: str, file: Path = RESULTS) -> Markdown | None:
    """The first section with all `words` in its title; None if there is none, or no such file (an installed package).

    Its heading becomes one of the fourth level, so that it does not break the order of a notebook's headings.
    """
    if not file.exists():
        return None
    for part in re.split(r"^## ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title = part.splitlines()[0]
        if all(re.search(rf"\b{re.escape(word)}", title, re.IGNORECASE) for word in words):
            return Markdown(re.sub(r"^#+ ", "#### ", "## " + part, flags=re.MULTILINE).strip())
    return None


def table(*words: str, file: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of the first table of `section(*words)`: heading of a column -> text. No section: no rows.

    An empty cell of the first column stands for the one above it. Of two columns with one heading the first counts.
    """
    found = section(*words, file=file)
    text = re.search(r"(?:^\|.*\n?)+", found.data if found else "", re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text[0].splitlines()] if text else [[]]
    heads, rows, above = cells[0], [], ""
    for row in cells[2:]:
        above = row[0] = row[0] or above
        rows.append(dict(zip(reversed(heads), reversed(row), strict=True)))
    return rows

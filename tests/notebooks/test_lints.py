"""What every committed notebook promises its readers, checked on the files alone (nbval executes them)."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
KNOWN_TAGS = {"nbval-ignore-output", "nbval-skip", "raises-exception"}
PATHS = re.compile(r"(?:/(?:home|root|Users|tmp|var|usr/lib)/|[A-Z]:\\\\?Users)[\w./\\-]*")
NUMBER = re.compile(r"(?<![\w.,/#-])\d[\d,]*(?:\.\d+)?(?![\w/]|\.\d)")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def texts(cell) -> str:
    """Everything that a cell printed or showed as text."""
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        parts.extend(str(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))
    return "\n".join(parts)


# Each lint returns complaints, so that the tests below can also prove that it complains.


def lint_executed(notebook) -> list[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        return [f"execution counts are {counts}: run `make refresh`"]
    return []


def lint_outputs_present(notebook) -> list[str]:
    cells = code_cells(notebook)
    shown = sum(bool(cell.outputs) for cell in cells)
    return [] if shown >= 0.6 * len(cells) else [f"only {shown} of {len(cells)} code cells show something"]


def lint_no_stderr(notebook) -> list[str]:
    return [f"stderr: {o.text[:80]!r}" for c in code_cells(notebook) for o in c.outputs if o.get("name") == "stderr"]


def lint_no_errors(notebook) -> list[str]:
    return [
        f"error {o.ename} in a cell without the tag raises-exception"
        for c in code_cells(notebook)
        for o in c.outputs
        if o.output_type == "error" and "raises-exception" not in tags(c)
    ]


def lint_no_paths(notebook) -> list[str]:
    found = []
    for cell in notebook.cells:
        text = cell.source + ("\n" + texts(cell) if cell.cell_type == "code" else "")
        found += [f"a path of one machine: {m.group(0)}" for m in PATHS.finditer(text)]
    return found


def lint_tags(notebook) -> list[str]:
    unknown = {tag for cell in notebook.cells for tag in tags(cell)} - KNOWN_TAGS
    comments = [c.source.splitlines()[0] for c in code_cells(notebook) if re.search(r"^\s*#\s*NBVAL", c.source, re.M)]
    return [f"unknown tag {tag}" for tag in sorted(unknown)] + [f"use a tag, not {line!r}" for line in comments]


def lint_cell_length(notebook) -> list[str]:
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    complaints = [f"a cell of {n} lines" for n in lengths if n > 40]
    if statistics.median(lengths) > 8:
        complaints.append(f"median cell of {statistics.median(lengths)} lines")
    return complaints


def lint_figures(notebook) -> list[str]:
    complaints = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("image/png", {}).get("alt", "")
                if len(alt.split()) < 5:
                    complaints.append(f"a figure without alt text after {cell.source.splitlines()[-1]!r}")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            complaints += [f"an image without alt text: {m}" for m in re.findall(r"!\[\s*\]\([^)]*\)", cell.source)]
    return complaints


def lint_prose_numbers(notebook) -> list[str]:
    """A number of three or more digits (or a decimal) in prose that the next code cells print was typed in by hand."""
    complaints = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        prose = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$|\([^)]*\.ipynb[^)]*\)|https?://\S+", " ", cell.source, flags=re.S)
        prose = re.sub(r"<details>.*?</details>", " ", prose, flags=re.S)
        prose = re.sub(r"(?:Exercise|Solution) \d+\.\d+|\[\d+\.\d+ [^\]]*\]\(#Exercise", " ", prose)
        near = [c for c in notebook.cells[max(0, i - 3) : i + 4] if c.cell_type == "code"]
        printed = {n.replace(",", "") for c in near for n in NUMBER.findall(texts(c))}
        given = {n.replace(",", "") for c in near for n in NUMBER.findall(c.source)}  # an input is no result
        for number in NUMBER.findall(prose):
            plain = number.replace(",", "").rstrip(".")
            telling = "." in plain or len(plain) >= 4
            if telling and plain in printed and plain not in given | FORMAT_CONSTANTS:
                complaints.append(f"{number} in prose is also printed nearby: let the cell say it")
    return complaints


# Golden numbers that define formats, vocabularies and official data sets: prose may name them.
FORMAT_CONSTANTS = {
    "65536", "65535", "65530", "65529", "40320", "4096", "1024", "2048", "32768", "1498226207", "2926181", "2926222",
    "2023", "2024", "2404.05892", "0.99", "0.9",
}  # fmt: skip


def lint_head(notebook) -> list[str]:
    head = notebook.cells[0].source
    rows = ["**You will be able to**", "**Before this**", "**Run time**", "**Downloads**", "**Previous, next**"]
    complaints = [f"the head has no row {row}" for row in rows if row not in head]
    if (
        not head.startswith("# ")
        or sum(c.source.startswith("# ") for c in notebook.cells if c.cell_type == "markdown") != 1
    ):
        complaints.append("exactly one first-level heading, at the start")
    end = "\n".join(c.source for c in notebook.cells[-6:] if c.cell_type == "markdown")
    complaints += [
        f"the end has no section {s}" for s in ("## Summary", "## What can go wrong", "## Read next") if s not in end
    ]
    return complaints


def lint_metadata(notebook) -> list[str]:
    complaints = []
    if notebook.metadata.kernelspec.name != "python3":
        complaints.append(f"kernel {notebook.metadata.kernelspec.name!r}: must be python3")
    if "widgets" in notebook.metadata or "version" in notebook.metadata.get("language_info", {}):
        complaints.append("widget state or a Python version is stored: run `make refresh`")
    return complaints


LINTS = [value for name, value in list(globals().items()) if name.startswith("lint_")]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"00_start_here", "01_tokenizer", "02_binidx", "03_magic_prime"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("lint", LINTS, ids=lambda f: f.__name__)
def test_lint(lint, path):
    assert lint(read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_and_files_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)", cell.source):
                assert (path.parent / target).exists(), f"{path.name}: link to {target}"


# Proof that each lint can fail: one planted fault each.


def specimen():
    """A copy of a real notebook to plant a fault in."""
    return read(NOTEBOOKS[1])


def first_with_output(notebook):
    return next(cell for cell in code_cells(notebook) if cell.outputs)


def strip_outputs(nb):
    for cell in code_cells(nb):
        cell.outputs = []


def add_output(nb, **output):
    first_with_output(nb).outputs.append(nbformat.from_dict(output))


PLANTS = {
    "lint_executed": lambda nb: first_with_output(nb).update(execution_count=99),
    "lint_outputs_present": strip_outputs,
    "lint_no_stderr": lambda nb: add_output(nb, output_type="stream", name="stderr", text="warning"),
    "lint_no_errors": lambda nb: add_output(nb, output_type="error", ename="KeyError", evalue="x", traceback=[]),
    "lint_no_paths": lambda nb: add_output(nb, output_type="stream", name="stdout", text="/home/ann/x.bin"),
    "lint_tags": lambda nb: first_with_output(nb).metadata.update(tags=["nbval-ignore-ouput"]),
    "lint_cell_length": lambda nb: first_with_output(nb).update(source="x = 1\n" * 41),
    "lint_figures": lambda nb: add_output(nb, output_type="display_data", data={"image/png": ""}, metadata={}),
    "lint_prose_numbers": lambda nb: (
        add_output(nb, output_type="stream", name="stdout", text="the answer is 12,345.6"),
        nb.cells.insert(nb.cells.index(first_with_output(nb)), nbformat.v4.new_markdown_cell("It is 12345.6 then.")),
    ),
    "lint_head": lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("**Run time**", "")),
    "lint_metadata": lambda nb: nb.metadata.kernelspec.update(name="my-kernel"),
}


@pytest.mark.parametrize("lint", LINTS, ids=lambda f: f.__name__)
def test_each_lint_finds_a_planted_fault(lint):
    notebook = specimen()
    assert lint(notebook) == []
    PLANTS[lint.__name__](notebook)
    assert lint(notebook) != []

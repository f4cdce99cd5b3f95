"""One head, one end, one grain: what every notebook of the course has in common, checked on the committed files."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest

from rwkv_nb.teaching import exercises

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
ABOUT = {about.number: about for about in exercises.exercises()}
HEAD = [
    r"# \d\d · [^\n]+", "", r"\*[^*\n]+[.?]\*", "", r"\| \| \|", r"\|:--\|:--\|",
    r"\| \*\*You will be able to\*\* \| [^\n]+; [^\n]+ \|",
    r"\| \*\*Before this\*\* \| [^\n]+ \|",
    r"\| \*\*Run time\*\* \| [\d.]+ min on two CPU cores; (no GPU needed|[^\n|]*GPU[^\n|]*) \|",
    r"\| \*\*Downloads\*\* \| (none|[^\n|]+ (KB|MB|GB))[^\n|]* \|",
    r"\| \*\*Previous, next\*\* \| [^\n]+ \|",
    r"\| \*\*Elsewhere\*\* \| [^\n]+ \|",
]  # fmt: skip
END = ["## Summary", "## Exercises at a glance", "## What can go wrong", "## Read next"]
BOX = re.compile(
    r"^### Exercise (\d+\.\d+) · (.*)\n"
    r"\*\*Difficulty\*\* ([●○]{5}) · \*\*Importance\*\* [●○]{5} · \*\*about (\d+) minutes\*\* · roughly (\d+) lines?$",
    re.M,
)


def load(name: str):
    """A module of scripts/, which is no package."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "scripts"))


notebook_shape, frame = load("notebook_shape"), load("frame")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


@each
def test_the_head_has_its_rows_in_order(path):
    lines = read(path).cells[0].source.splitlines()
    for line, pattern in zip(lines, HEAD, strict=False):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"
    assert len(lines) >= len(HEAD)


@each
def test_the_end_has_its_sections_in_order(path):
    headings = re.findall(r"^## .*$", prose(path), re.M)
    assert headings[-4:] == END
    last = prose(path).rpartition("## Read next")[2]
    assert "https://arxiv.org/abs/2404.05892" in last


@each
def test_previous_and_next_are_the_files_before_and_after(path):
    place = NOTEBOOKS.index(path)
    expected = [other.name for other in NOTEBOOKS[max(0, place - 1) : place + 2] if other != path]
    [row] = [line for line in read(path).cells[0].source.splitlines() if line.startswith("| **Previous, next**")]
    assert re.findall(r"\(([^)]+\.ipynb)\)", row) == expected


@each
def test_every_exercise_has_a_box_a_hint_a_solution_and_a_line_at_the_end(path):
    text = prose(path)
    boxes = BOX.findall(text)
    number = str(int(path.stem[:2]))
    assert [box[0] for box in boxes] == [n for n in ABOUT if n.split(".")[0] == number] and len(boxes) >= 3
    glance = text.rpartition(END[1])[2].partition(END[2])[0]
    parts = BOX.split(text)[6::6]  # what follows each box
    for (number, title, dots, minutes, _), part in zip(boxes, parts, strict=True):
        about = ABOUT[number]
        assert (title, int(minutes), dots.count("●")) == (about.title, about.minutes, about.difficulty)
        assert "<summary>Hint" in part and f"<summary>Solution {number}</summary>" in part, number
        assert re.search(rf"\| \[{re.escape(f'{number} {title}')}\]\([^)]*\) \| {dots} \| {minutes} \|", glance)


@each
def test_cells_are_short_and_show_something(path):
    assert notebook_shape.shape(read(path)).complaints() == []


@each
def test_the_frame_is_up_to_date(path):
    notebook = read(path)
    frame.frame(notebook, path, frame.repository())
    assert nbformat.writes(notebook) == nbformat.writes(read(path)), "run `python scripts/frame.py`"


def code(source: str, *kinds: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, outputs=[
        nbformat.v4.new_output("display_data", data={kind: "x"}) for kind in kinds])  # fmt: skip


def test_the_shape_counts_what_it_should():
    cells = [code("import os"), code("# a comment\n\nx = 1\nprint(x)", "text/plain"), code("draw()", "image/png"),
             code("def f():\n    return 1"), code("assert f() == 1")]  # fmt: skip
    shape = notebook_shape.shape(nbformat.v4.new_notebook(cells=cells))
    assert (shape.cells, shape.computing, shape.median, shape.p90) == (5, 3, 1, 2)
    assert (round(shape.visible, 2), round(shape.pictures, 2)) == (0.67, 0.33)
    assert [text.split()[0] for text in shape.complaints()] == ["67%"]
    long = nbformat.v4.new_notebook(cells=[code("f()\n" * 21, "text/plain")])
    assert len(notebook_shape.shape(long).complaints()) == 3


def test_with_an_address_the_head_has_badges_and_a_cell_that_installs(tmp_path):
    for path in NOTEBOOKS:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / NOTEBOOKS[1].name
    plain = read(path)
    frame.frame(plain, path, None)  # as they are while pyproject.toml knows no address
    notebook = read(path)
    frame.frame(notebook, path, "https://github.com/ann/eagle")
    head, setup = notebook.cells[0].source, notebook.cells[1]
    assert f"(https://colab.research.google.com/github/ann/eagle/blob/main/notebooks/{path.name})" in head
    assert f"(https://mybinder.org/v2/gh/ann/eagle/main?labpath=notebooks%2F{path.name})" in head
    for badge in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", head):
        assert (ROOT / "notebooks" / badge).is_file()
    assert "git clone -q --depth 1 https://github.com/ann/eagle course" in setup.source
    assert "build_data" in setup.source and not plain.cells[1].source.startswith("import importlib")
    once = nbformat.writes(notebook)
    frame.frame(notebook, path, "https://github.com/ann/eagle")
    assert nbformat.writes(notebook) == once  # a second time changes nothing
    frame.frame(notebook, path, None)
    assert nbformat.writes(notebook) == nbformat.writes(plain)  # and all of it can be taken back


def test_without_an_address_nothing_pretends_to_know_one():
    if frame.repository() is None:
        for path in NOTEBOOKS:
            assert "colab.research" not in prose(path) and "mybinder" not in prose(path)

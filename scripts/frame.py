"""Write the parts of a notebook's head and end that follow from other files, so that nobody types them twice.

    python scripts/frame.py [NOTEBOOK ...]      all of notebooks/ without arguments
    python scripts/frame.py --check             changes nothing; exit code 1 if something would change

It writes: the rows "Previous, next" and "Elsewhere" of the head, and the table "Exercises at a glance" before "What can
go wrong". Nothing is executed, outputs stay as they are.

The public address of the repository stands in one place, pyproject.toml: `Repository` under [project.urls]. While it is
not known there, "Elsewhere" leads to the README. Once it is, this script puts badges for Colab and Binder there, and a
cell below the head that installs the course on Colab; then run `make refresh`, for that cell is a new one.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

import nbformat
from refresh import stable_ids

from rwkv_nb.teaching import exercises

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
GLANCE = "## Exercises at a glance"
WITHOUT_ADDRESS = 'Colab, Binder, conda, Windows: "Without make" in the [README](../README.md)'
SETUP = """import importlib.util

if importlib.util.find_spec("rwkv_nb") is None:  # on Colab: fetch and install the course; elsewhere nothing happens
    !git clone -q --depth 1 {address} course
    %pip install -q ./course
    %cd -q course/notebooks
    !cd .. && python -m rwkv_nb build_data"""


def repository() -> str | None:
    """The public address of this repository, if pyproject.toml knows it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls.get("Repository", "").removesuffix("/").removesuffix(".git") or None


def short_title(path: Path) -> str:
    """"03 The magic prime" of "# 03 · The magic prime: every chunk once ..."."""
    first = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
    return first.removeprefix("# ").split(":")[0].replace(" · ", " ")


def neighbours(path: Path) -> str:
    """The row "Previous, next": the files before and after `path` in the folder."""
    every = sorted(path.parent.glob("[0-9]*.ipynb"))
    place = [other.name for other in every].index(path.name)
    before, after = every[:place][-1:], every[place + 1 :][:1]
    links = [f"{word}: [{short_title(other)}]({other.name})" for word, found in (("previous", before), ("next", after))
             for other in found]  # fmt: skip
    ends = ["this is the first"] * (not before) + links + ["this is the last"] * (not after)
    return f"| **Previous, next** | {'; '.join(ends)} |"


def elsewhere(name: str, address: str | None) -> str:
    """The row "Elsewhere": badges that lead to this notebook on Colab and Binder, or to the README."""
    if not address:
        return f"| **Elsewhere** | {WITHOUT_ADDRESS} |"
    project = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{project}/blob/main/notebooks/{name}"
    binder = f"https://mybinder.org/v2/gh/{project}/main?labpath={quote(f'notebooks/{name}', safe='')}"
    return (f"| **Elsewhere** | [![Open in Colab](../images/badge-colab.svg)]({colab}) "
            f"[![Launch on Binder](../images/badge-binder.svg)]({binder}) |")  # fmt: skip


def anchor(heading: str) -> str:
    """The address of a heading inside a notebook, as Jupyter makes it.

    >>> anchor("## 4. Greedy longest match")
    '#4.-Greedy-longest-match'
    >>> anchor("### Why `top_p` = 1 was greedy")
    '#Why-top_p-=-1-was-greedy'
    """
    return "#" + re.sub(r"[`*$]", "", heading.lstrip("#").strip()).replace(" ", "-")


def glance(notebook: nbformat.NotebookNode) -> str:
    """The table of the notebook's exercises, from their headings and the registry of checks."""
    about = {one.number: one for one in exercises.exercises()}
    rows = [GLANCE, "", "| exercise | difficulty | minutes |", "|:--|:--|--:|"]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for heading in re.findall(r"^### Exercise \d.*$", text, re.M):
        number = heading.split()[2]
        one = about[number]
        rows.append(f"| [{number} {one.title}]({anchor(heading)}) | {exercises.dots(one.difficulty)} | {one.minutes} |")
    rows += ["", "`python -m rwkv_nb checks` lists those of all notebooks."]
    return "\n".join(rows) + "\n\n"


def put_row(head: str, row: str) -> str:
    """`head` with the row of the same name replaced, or with a new last row."""
    name = re.escape(row.split("**")[1])
    if re.search(rf"^\| \*\*{name}\*\*.*$", head, re.M):
        return re.sub(rf"^\| \*\*{name}\*\*.*$", lambda _: row, head, flags=re.M)
    lines = head.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("| **"))
    return "\n".join([*lines[: last + 1], row, *lines[last + 1 :]])


def frame(notebook: nbformat.NotebookNode, path: Path, address: str | None) -> None:
    """Write head, set-up cell and table of exercises into `notebook`, the content of `path`."""
    head = notebook.cells[0]
    for row in (neighbours(path), elsewhere(path.name, address)):
        head.source = put_row(head.source, row)
    old_setup = notebook.cells[1].cell_type == "code" and "git clone" in notebook.cells[1].source
    if old_setup and notebook.cells[1].source != SETUP.format(address=address):
        del notebook.cells[1]
        old_setup = False
    if address and not old_setup:
        notebook.cells.insert(1, nbformat.v4.new_code_cell(SETUP.format(address=address)))
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"^## What can go wrong", cell.source, re.M):
            cell.source = re.sub(rf"^{GLANCE}\n.*?(?=^## )", "", cell.source, flags=re.M | re.S)
            before, wrong, after = cell.source.partition("## What can go wrong")
            cell.source = before + glance(notebook) + wrong + after
    stable_ids(notebook)


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    paths = [Path(argument).resolve() for argument in arguments if argument != "--check"] or NOTEBOOKS
    address, changed = repository(), []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(text, as_version=4)
        frame(notebook, path, address)
        framed = nbformat.writes(notebook) + "\n"
        if framed != text:
            changed.append(path.name)
            if not check:
                part = path.with_name(f".{path.name}.part")
                part.write_text(framed, encoding="utf-8")
                part.replace(path)
    for name in changed:
        print(f"{name}: {'differs' if check else 'written'}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

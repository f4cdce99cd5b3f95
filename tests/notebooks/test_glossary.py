"""Glossary and questions: every name is the code's and taught where it says; every link leads to a heading."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
GLOSSARY = (FOLDER / "glossary.md").read_text(encoding="utf-8")
QUESTIONS = (FOLDER / "questions.md").read_text(encoding="utf-8")
OFFICIAL = ("https://github.com/BlinkDL/RWKV-LM/blob/main/RWKV-v5/",
            "https://github.com/BlinkDL/ChatRWKV/blob/main/rwkv_pip_package/src/")  # fmt: skip
ROWS = [
    [column.strip() for column in line.strip("|").split("|")]
    for line in GLOSSARY.splitlines() if line.startswith("| `")
]  # fmt: skip


def names_of(source: str) -> set[str]:
    """Every identifier of a module: what it defines, takes, reads and sets, and what it spells as a whole string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("name", "arg", "attr", "id"):
            if isinstance(getattr(node, field, None), str):
                found.add(getattr(node, field))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(node.value.split(".")) if " " not in node.value else set()
    return found


CODE = set().union(*(names_of(path.read_text(encoding="utf-8")) for path in (ROOT / "rwkv_nb").rglob("*.py")))
CODE |= {path.stem for path in (ROOT / "rwkv_nb").rglob("*.py")}


def anchors(path: Path) -> set[str]:
    """The anchors that Jupyter gives to the headings of a notebook."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    plain = (re.sub(r"[`*$]", "", heading) for heading in re.findall(r"^#+ (.*)$", text, re.M))  # as it is shown
    return {heading.strip().replace(" ", "-") for heading in plain}


ANCHORS = {path.name: anchors(path) for path in NOTEBOOKS}


@pytest.mark.parametrize(("name", "taught"), [(row[0].strip("`"), row[3]) for row in ROWS])
def test_a_name_of_the_glossary_is_in_the_code_and_in_its_notebook(name, taught):
    assert name in CODE
    [file] = re.findall(r"\(([^)#]+)#", taught)
    notebook = (FOLDER / file).read_text(encoding="utf-8")
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", notebook), f"{name} does not occur in {file}"


def test_the_glossary_is_complete_and_has_nothing_twice():
    names = [row[0] for row in ROWS]
    assert len(names) == len(set(names)) and all(len(row) == 5 and row[2] for row in ROWS)
    linked = set(re.findall(r"\(([^)#]+\.ipynb)#", GLOSSARY))
    assert {path.name for path in NOTEBOOKS} - {"00_start_here.ipynb"} <= linked
    for row in ROWS:
        assert not row[4] or re.search(r"\]\((.*)\)$", row[4])[1].startswith(OFFICIAL), row[4]


@pytest.mark.parametrize("text", [GLOSSARY, QUESTIONS], ids=["glossary", "questions"])
def test_every_link_leads_to_a_heading(text):
    links = re.findall(r"\]\(([^()\s]+)\)", text)
    assert len(links) > 40 and "](" in text
    for link in links:
        parts = urlsplit(link)
        if not parts.scheme:
            assert parts.path in ANCHORS and (not parts.fragment or parts.fragment in ANCHORS[parts.path]), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_ten_questions_for_each_notebook(path):
    assert f"]({path.name})\n" in QUESTIONS, f"questions.md has no section for {path.name}"
    part = QUESTIONS.split(f"]({path.name})\n")[1].split("\n## ")[0].strip().splitlines()
    assert [int(line.split(".")[0]) for line in part] == list(range(1, 11))
    for line in part:
        assert re.search(rf"[?.] \[→ [^\]]+\]\({re.escape(path.name)}#[^)]+\)$", line), line
    assert len(set(part)) == 10

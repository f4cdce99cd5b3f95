"""The README's table of notebooks agrees with the notebooks' own heads, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
root_conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(root_conftest)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_table_says_what_the_head_promises(path):
    [row] = [line for line in README.splitlines() if f"(notebooks/{path.name})" in line and line.startswith("|")]
    minutes = row.split("|")[3].strip()
    assert float(minutes) == root_conftest.budget_minutes(path)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "data/README.md"])
def test_links_and_pictures_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
    assert not re.search(r"!\[\s*\]", text), f"{name}: a picture without alt text"


def test_every_make_target_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (lab|test|bench|refresh|setup|lint|clean)\b", README)):
        assert re.search(rf"^{target}:", makefile, re.M)

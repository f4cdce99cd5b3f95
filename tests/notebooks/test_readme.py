"""README, CONTRIBUTING and the workflows: the table agrees with the notebooks' heads; links and targets exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
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


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f".github/workflows/{p.name}" for p in WORKFLOWS)])
def test_every_make_target_that_is_named_exists(name):
    makefile = (ROOT / "Makefile").read_text()
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|run: |^)make ([a-z]+)\b", text, re.M))
    assert named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_can_be_read_and_may_do_little(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"]["contents"] == "read" and workflow["jobs"]
    for job in workflow["jobs"].values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_binder_builds_the_data_after_installing():
    script = ROOT / "postBuild"
    assert script.stat().st_mode & 0o100 and "python -m rwkv_nb build_data" in script.read_text()

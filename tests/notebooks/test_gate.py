"""The gate itself: strict nbval must notice one changed output, and a stripped notebook must not slip through.

Strict nbval alone proves nothing about a notebook without outputs (it passes), so the lint must catch that one.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

LESSON = """# A notebook of four cells"""
FLAGS = ["--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
spec = importlib.util.spec_from_file_location("notebook_lints", Path(__file__).with_name("test_lints.py"))
lints = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lints)


def write(path: Path, printed: str | None) -> Path:
    """A tiny notebook with one computing cell whose stored output is `printed` (None: no output stored)."""
    cell = nbformat.v4.new_code_cell("print(6 * 7)", execution_count=1)
    if printed is None:
        cell.execution_count = None
    else:
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(LESSON), cell], metadata=metadata), path
    )
    return path


def nbval(path: Path) -> int:
    return subprocess.run(
        [sys.executable, "-m", "pytest", *FLAGS, path], cwd=path.parent, capture_output=True
    ).returncode


def test_true_output_passes_and_one_changed_output_fails(tmp_path):
    assert nbval(write(tmp_path / "true.ipynb", "42\n")) == 0
    assert nbval(write(tmp_path / "false.ipynb", "43\n")) == 1


def test_a_stripped_notebook_fools_nbval_but_not_the_lint(tmp_path):
    path = write(tmp_path / "stripped.ipynb", None)
    assert nbval(path) == 0
    assert lints.lint_executed(nbformat.read(path, as_version=4)) != []


@pytest.mark.parametrize("path", lints.NOTEBOOKS, ids=lambda p: p.stem)
def test_a_real_notebook_stripped_of_its_outputs_fails_the_lints(path):
    notebook = lints.read(path)
    lints.strip_outputs(notebook)
    assert lints.lint_outputs_present(notebook) != []
    for cell in lints.code_cells(notebook):
        cell.execution_count = None
    assert lints.lint_executed(notebook) != []

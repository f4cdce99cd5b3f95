"""The solutions that the notebooks fold away, taken from the notebooks themselves so that they cannot rot."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
BLOCK = re.compile(r"<summary>Solution (\d+\.\d+)</summary>\s*```python\n(.*?)```", re.S)


def solution_sources(notebook: str) -> dict[str, str]:
    """Number -> source of every solution block in `notebook` ("01_tokenizer")."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return dict(BLOCK.findall(text))


def solution(notebook: str, number: str) -> dict:
    """The namespace after executing one solution block, with numpy as np and torch at hand as in the notebooks."""
    import numpy as np
    import torch

    namespace: dict = {"np": np, "torch": torch}
    exec(compile(solution_sources(notebook)[number], f"{notebook} solution {number}", "exec"), namespace)
    return namespace

"""Print the shape of each notebook: how long its cells are, how many show something, how many a picture.

    python scripts/notebook_shape.py

The limits are the course's own and tests/notebooks holds them. A computing cell is one that does more than import,
define or name constants: those have nothing to show.
"""

from __future__ import annotations

import ast
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import nbformat

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("[0-9]*.ipynb"))


@dataclass(frozen=True)
class Shape:
    """What the limits are about. Lines: neither empty nor comments."""

    cells: int  # code cells
    computing: int
    median: float  # lines of code in a cell
    p90: int
    visible: float  # share of the computing cells that show something
    pictures: float  # share of them that show a picture

    def complaints(self) -> list[str]:
        """Which limits are broken, in words; an empty list if none is."""
        return [
            text for broken, text in (
                (self.median > 6, f"median cell of {self.median:g} lines, at most 6"),
                (self.p90 > 20, f"a tenth of the cells has {self.p90} lines or more, at most 20"),
                (self.visible < 0.7, f"{self.visible:.0%} of the computing cells show something, at least 70 %"),
                (self.pictures < 0.15, f"{self.pictures:.1%} of the computing cells show a picture, at least 15 %"),
            ) if broken
        ]  # fmt: skip


def is_constant(node: ast.AST) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def computes(source: str) -> bool:
    """Whether a cell does more than import, define and name constants.

    >>> computes("import os"), computes("SIZE = 3"), computes("print(1)")
    (False, False, True)
    """
    plain = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)
    passive = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Pass)
    return not all(
        isinstance(node, passive) or (isinstance(node, ast.Assign) and is_constant(node.value))
        for node in ast.parse(plain).body
    )


def lines(source: str) -> int:
    """Lines of code of a cell, without empty ones and comments."""
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines())


def shape(notebook: nbformat.NotebookNode) -> Shape:
    """Measure an executed notebook."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    lengths = sorted(lines(cell.source) for cell in cells)
    computing = [cell for cell in cells if computes(cell.source)]
    pictures = sum(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in computing)
    return Shape(
        cells=len(cells), computing=len(computing), median=statistics.median(lengths),
        p90=lengths[min(len(lengths) - 1, int(0.9 * len(lengths)))],
        visible=sum(bool(cell.outputs) for cell in computing) / len(computing), pictures=pictures / len(computing),
    )  # fmt: skip


def main() -> None:
    print(f"{'notebook':<24} cells computing  median  p90  visible  pictures")
    for path in NOTEBOOKS:
        s = shape(nbformat.read(path, as_version=4))
        print(f"{path.stem:<24} {s.cells:5} {s.computing:9} {s.median:7g} {s.p90:4} {s.visible:8.0%} {s.pictures:9.1%}")
        for complaint in s.complaints():
            print(f"    {complaint}")


if __name__ == "__main__":
    main()

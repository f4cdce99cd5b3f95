"""Figures in one style: white behind them in every theme, axes that say what they show, told apart without colour."""

from __future__ import annotations

import base64
import io
import itertools
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from rwkv_nb.teaching import plots

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb"))


def cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stored_figure_stands_on_white(path):
    """A transparent ground would put black axes on the black page of a dark theme."""
    found = 0
    for output in (output for cell in cells(path) for output in cell.outputs):
        if "image/png" in output.get("data", {}):
            found += 1
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGBA")
            width, height = picture.size
            for corner in itertools.product((0, width - 1), (0, height - 1)):
                assert picture.getpixel(corner) == (255, 255, 255, 255), output.data["text/plain"][:60]
            assert width <= 1200, f"{width} pixels wide: {output.data['text/plain'][:60]}"
    assert found >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_axes_have_names(path):
    """Both, where a cell draws curves; bars with named groups need one."""
    for cell in cells(path):
        source = cell.source
        if "plots.figure(" in source and not re.search(r"set_axis_off|axis\(.off", source):
            labels = {axis for axis in "xy" if re.search(rf"{axis}label\W", source)}
            assert labels == {"x", "y"} or (labels and ".bar" in source), source


def test_neighbours_differ_in_more_than_colour():
    for style, mark in ((plots.line, "linestyle"), (plots.bar, "hatch")):
        for i in range(len(plots.COLOURS) - 1):
            first, second = style(i), style(i + 1)
            assert first["color"] != second["color"] and first[mark] != second[mark]
    assert len({str(plots.line(i)) for i in range(len(plots.COLOURS))}) == len(plots.COLOURS)


def lightness(colour: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1 (WCAG)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_is_seen_on_white():
    for colour in plots.COLOURS:
        assert 1.05 / (lightness(colour) + 0.05) >= 2, colour


def test_the_style_is_used_wherever_a_picture_is_made():
    """matplotlib is called directly in plots.py alone; everything else asks it for figures and saves through it."""
    for path in (Path(plots.__file__).parent).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "plots.py":
            assert not re.search(r"plt\.|pyplot|\.savefig\(", text), path.name
    for path in NOTEBOOKS:
        for cell in cells(path):
            assert not re.search(r"plt\.|pyplot|\.savefig\(", cell.source), cell.source

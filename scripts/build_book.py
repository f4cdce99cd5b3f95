"""Build the static site of the course from the committed notebooks: nothing is executed, nothing is downloaded.

    python scripts/build_book.py [FOLDER]       build/book without an argument; open FOLDER/html/index.html

It copies notebooks and texts into FOLDER/source, puts a line in the place of each panel, writes the reference of the
package from the docstrings, and calls Sphinx, for which a link that leads nowhere is an error.
"""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("README.md", "CONTRIBUTING.md", "LICENSE", "environment.yml", "pyproject.toml", "constraints.txt",
         "data/*.md", "data/demo.jsonl", "benchmarks/RESULTS.md", "notebooks/*.md")  # fmt: skip
FOLDERS = ["images", "kernels", "scripts"]  # what texts link to
PANEL = "application/vnd.jupyter.widget-view+json"
INSTEAD = "*Here the notebook has a panel to play with. The next cell shows the same without one.*"
ROOMS = {
    "data": "From text to windows of tokens", "wkv": "The WKV-5 operator", "model": "The model",
    "training": "Training", "inference": "Writing", "teaching": "Figures, panels, checks",
}  # fmt: skip
REMEDY = "the book needs Sphinx and myst-nb; run `make setup`, or `pip install -c constraints.txt -e '.[docs]'`"


def without_panels(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with a line of text in the place of each panel, and each figure's alt text where myst-nb looks."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            if PANEL in data:
                output.data = nbformat.from_dict({"text/markdown": INSTEAD, "text/plain": INSTEAD})
            if "image/png" in data:  # text/plain is the alt text
                cell.metadata["mystnb"] = {"image": {"alt": data["text/plain"]}}
    return notebook


def public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes whose names do not begin with an underscore, in the order of the file."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def signature(node: ast.FunctionDef) -> str:
    """`def name(a: int) -> str` as the file has it."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def listing(text: str | None, language: str = "text") -> list[str]:
    """A fenced block, or nothing for an empty text."""
    return [f"````{language}", text, "````", ""] if text else []


def module_page(path: Path) -> str | None:
    """The reference of one module in Markdown, or None if it has nothing public."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = list(public(tree))
    if not found:
        return None
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    lines = [f"## `{name}`", "", *listing(ast.get_docstring(tree))]
    for node in found:
        lines += [f"### `{name.rpartition('.')[2]}.{node.name}`", ""]
        if isinstance(node, ast.FunctionDef):
            lines += [*listing(signature(node), "python"), *listing(ast.get_docstring(node))]
            continue
        bases = ", ".join(map(ast.unparse, node.bases))
        lines += listing(f"class {node.name}({bases})" if bases else f"class {node.name}", "python")
        lines += listing(ast.get_docstring(node))
        methods = [m for m in node.body if isinstance(m, ast.FunctionDef)
                   and (not m.name.startswith("_") or m.name == "__init__")]  # fmt: skip
        for method in methods:
            lines += [*listing(signature(method), "python"), *listing(ast.get_docstring(method))]
    return "\n".join(lines)


def write_reference(folder: Path) -> None:
    """One page for each room of the package, and an index."""
    folder.mkdir(parents=True)
    for room, title in ROOMS.items():
        pages = filter(None, map(module_page, sorted((ROOT / "rwkv_nb" / room).rglob("*.py"))))
        text = f"# `rwkv_nb.{room}`: {title.lower()}\n\n" + "\n\n".join(pages) + "\n"
        (folder / f"{room}.md").write_text(text, encoding="utf-8")
    rows = "\n".join(ROOMS)
    text = "What the notebooks import, room by room. Each room imports only from those above it."
    index = f"# The package\n\n{text}\n\n```{{toctree}}\n{rows}\n```\n"
    (folder / "index.md").write_text(index, encoding="utf-8")


def stage(folder: Path) -> None:
    """Put everything that Sphinx reads into `folder`, which must not exist yet."""
    shutil.copytree(ROOT / "book", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (path for pattern in TEXTS for path in sorted(ROOT.glob(pattern))):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        nbformat.write(without_panels(nbformat.read(path, as_version=4)), folder / "notebooks" / path.name)
    write_reference(folder / "reference")


def build(folder: Path) -> int:
    """Build the site in `folder`/html; returns Sphinx's exit code, 1 if a link or a page is broken."""
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("myst_nb") is None:
        print(REMEDY, file=sys.stderr)
        return 1
    for part in ("source", "html", "doctrees"):
        shutil.rmtree(folder / part, ignore_errors=True)
    stage(folder / "source")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html",
               "-d", str(folder / "doctrees"), str(folder / "source"), str(folder / "html")]  # fmt: skip
    return subprocess.run(command, check=False).returncode


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0] if arguments else ROOT / "build" / "book").resolve()
    code = build(folder)
    if code == 0:
        print(f"The book is in {folder / 'html' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

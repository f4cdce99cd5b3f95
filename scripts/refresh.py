"""Execute notebooks top to bottom in place and store them in the one form that is committed.

    python scripts/refresh.py [NOTEBOOK ...]        all of notebooks/ without arguments

Kept: outputs, counts 1..n, tags. Dropped: timestamps, widget state, the Python version: whatever would make two runs
differ for no reason. A notebook is replaced only after it ran to its end.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def merge_streams(outputs: list) -> list:
    """Join stdout pieces that the kernel happened to send apart, so that the file does not depend on timing."""
    merged: list = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream" and output.name == merged[-1].name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def stable_ids(notebook: nbformat.NotebookNode) -> None:
    """Cell ids from the cells' own text: a diff of one cell stays one cell."""
    seen: set[str] = set()
    for cell in notebook.cells:
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        while cell.id in seen:
            cell.id += "b"
        seen.add(cell.id)


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Strip what varies without meaning."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    stable_ids(notebook)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            for output in cell.outputs:
                output.pop("transient", None)


def refresh(path: Path) -> float:
    """Execute one notebook and replace it; returns the seconds it took. Raises CellExecutionError, file untouched."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", store_widget_state=False,
                            extra_arguments=["--IPKernelApp.log_level=40"],  # no advice on transports
                            resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    seconds = time.perf_counter() - started
    normalise(notebook)
    nbformat.validate(notebook)
    temporary = path.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)
    return seconds


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    for path in paths:
        print(f"{path.name}: {refresh(path):.1f} s", flush=True)


if __name__ == "__main__":
    main()

"""The second cell of every notebook: versions, device and seed on one line each.

What it is not: a place for set-up. A notebook that needs something says so in a cell of its own.
"""

from __future__ import annotations

import platform
from importlib.metadata import version

from rwkv_nb.teaching import plots


def start(*packages: str, seed: int | None = None) -> None:
    """Use the course's figure style, seed torch if asked, and print what this notebook runs on.

    packages: names of the distributions whose versions matter here, e.g. "torch", "rwkv".
    seed: if given, `torch.manual_seed(seed)`; a seed makes one machine repeatable, it does not make two alike.
    """
    plots.use_style()
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"Python {platform.python_version()}" + (f", {names}" if names else ""))
    if seed is not None:
        import torch

        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"device {device}, {torch.get_num_threads()} threads, seed {seed}")

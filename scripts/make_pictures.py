"""Draw images/pipeline.png, the picture in the README, with the function that notebook 00 shows.

    python scripts/make_pictures.py
"""

from __future__ import annotations

import os
from pathlib import Path

from rwkv_nb.teaching import pictures, plots

TARGET = Path(__file__).resolve().parent.parent / "images" / "pipeline.png"


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    temporary = TARGET.with_suffix(".tmp")
    temporary.write_bytes(plots.png(pictures.pipeline()))
    os.replace(temporary, TARGET)
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()

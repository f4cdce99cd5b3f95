"""What `download` knows: files on the Hugging Face hub, the folders that they belong into, and whether they are here.

    find("eagle-7b")        [Path("model/RWKV-v5-Eagle-….pth")], or None

What it is not: the transfer (`download.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Remote:
    """A file on the hub, and where else it is if not there."""

    repository: str
    path: str
    kind: str = "model"  # or "dataset"


@dataclass(frozen=True)
class Offer:
    """What `download NAME` fetches: for each local name the places that have it, the first found wins."""

    what: str
    folder: str
    files: dict[str, tuple[Remote, ...]]


_EAGLE = "RWKV-v5-Eagle-World-7B-v2-20240128-ctx4096.pth"
_MINIPILE = ("minipile.idx", "minipile.bin")
OFFERS = {
    "minipile": Offer(
        "1,498,226,207 tokens of the World tokenizer, 3 GB: the scripts' data set", "data",
        {n: (Remote("BlinkDL/minipile-tokenized", f"rwkv_vocab_v20230424/{n}", "dataset"),) for n in _MINIPILE},
    ),
    "eagle-7b": Offer(
        "the weights of Eagle 7B in bfloat16, 15 GB", "model",
        {_EAGLE: (Remote("RWKV/v5-Eagle-7B-pth", _EAGLE), Remote("RWKV/v5-Eagle-7B", _EAGLE),
                  Remote("BlinkDL/rwkv-5-world", "RWKV-5-World-7B-v2-20240128-ctx4096.pth"))},
    ),
}  # fmt: skip


def find(name: str, *folders: str | os.PathLike) -> list[Path] | None:
    """The files of an offer if all of them are here: in one of `folders` (default: its own), else in the hub's cache.

    Nothing is asked of the hub and nothing is checked. Raises ValueError for an unknown name.
    """
    from huggingface_hub import try_to_load_from_cache

    if name not in OFFERS:
        raise ValueError(f"{name!r}: nothing of this name; choose from {', '.join(OFFERS)}")
    offer, paths = OFFERS[name], []
    for local, remotes in offer.files.items():
        places = [Path(folder, local) for folder in folders or (offer.folder,)]
        cached = (try_to_load_from_cache(r.repository, r.path, repo_type=r.kind) for r in remotes)
        places += [Path(path) for path in cached if isinstance(path, str)]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            return None
        paths.append(path)
    return paths


def by_hand() -> str:
    """The address of each file and the place that it belongs into, a pair of lines a file."""
    lines = []
    for offer in OFFERS.values():
        for local, (remote, *_) in offer.files.items():
            kind = "datasets/" if remote.kind == "dataset" else ""
            lines.append(f"  https://huggingface.co/{kind}{remote.repository}/resolve/main/{remote.path}")
            lines.append(f"      -> {offer.folder}/{local}")
    return "\n".join(lines)

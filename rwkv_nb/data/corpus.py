"""Text to train on without a download: `data/demo.jsonl`, the reader's own Python, small stories, a reader's own file.

demo      `demo_path()`: question and answer documents about this course, written for it, in `data/` of a checkout.
Python    `standard_library_text()`: see `rwkv_nb.data.standard_library`.
stories   `rwkv_nb.data.stories`: generated, with a known entropy.
yours     `load_text(path)`: any `.txt`, or a `.jsonl` with a "text" in every line.

`split` sets a held-out part aside; `main` is `python -m rwkv_nb build_data`, which writes what the notebooks read.

What it is not: a streaming loader; everything here fits into memory. For large data: `make_data`, then `binidx`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_nb.data.standard_library import (
    ALPHABET,
    DOCUMENT_BREAK,
    CorpusError,
    reduce_characters,
    standard_library_text,
)

if TYPE_CHECKING:
    import numpy as np  # the functions that need it import it themselves

__all__ = [
    "ALPHABET",
    "DOCUMENT_BREAK",
    "CorpusError",
    "characters_to_ids",
    "demo_path",
    "ids_to_characters",
    "load_text",
    "main",
    "reduce_characters",
    "split",
    "standard_library_text",
]

DEMO_EPOCHS, DEMO_CTX_LEN, DEMO_SEED = 3, 512, 0  # three epochs in windows of 512 leave enough slots for a prime
STORIES, STORIES_SEED = 10_000, 0


def demo_path(path: str | os.PathLike | None = None) -> Path:
    """`path` if given, else `data/demo.jsonl` of the checkout. Raises CorpusError when there is no such file."""
    if path is not None:
        if Path(path).is_file():
            return Path(path)
        raise CorpusError(f"{path}: no such file; the current folder is {Path.cwd()}")
    # a checkout (editable install); else, for an installed wheel, the checkout whose notebook is running
    folders = (Path(__file__).parents[2], Path.cwd(), Path.cwd().parent)
    candidates = [folder / "data" / "demo.jsonl" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CorpusError(
        f"demo.jsonl not found (looked for {', '.join(map(str, candidates))}). It belongs to the repository, not to "
        "the installed package: run from a clone (git clone, then `make setup`), or pass the path of your own .jsonl"
    )


def characters_to_ids(text: str) -> np.ndarray:
    """(len(text),) uint8: position of every character in ALPHABET. Raises CorpusError for a character outside it."""
    import numpy as np

    position = text.isascii() or next(i for i, c in enumerate(text) if not c.isascii())
    if position is True:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
        outside = np.flatnonzero((codes != 10) & ((codes < 32) | (codes > 126)))
        if not outside.size:
            return np.where(codes == 10, np.uint8(0), codes - np.uint8(31))
        position = int(outside[0])
    where = f"character {text[position]!r} at position {position}"
    raise CorpusError(f"{where} is not in ALPHABET; apply reduce_characters first")


def ids_to_characters(ids: Iterable[int]) -> str:
    """Inverse of characters_to_ids; `ids` is any sequence of integers below 96."""
    return "".join(ALPHABET[int(i)] for i in ids)


def load_text(path: str | os.PathLike) -> str:
    """A reader's own text: from a `.jsonl` its "text" fields joined by newlines, from any other file all of it (UTF-8).

    Line ends become newlines, a byte order mark goes. Raises CorpusError (missing, empty, not UTF-8, a line without
    "text").
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder; name the file in it" if path.is_dir() else f"no such file; the current folder is {Path.cwd()}"
        raise CorpusError(f"{path}: {what}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}); save it again as "
            "UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8 (UTF-16 for Notepad's 'Unicode')"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        text = "\n".join(_json_line(path, number, line) for number, line in lines if line.strip())
    if not text.strip():
        raise CorpusError(f"{path}: holds no text; put some text into it, or name another file")
    return text


def _json_line(path: Path, number: int, line: str) -> str:
    remedy = 'every line must be one {"text": "..."}'
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {number}: not JSON ({error.msg}); {remedy}") from None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise CorpusError(f'{path}, line {number}: no string "text"; {remedy}')
    return document["text"]


def split(text: str, validation: float = 0.05) -> tuple[str, str]:
    """(training part, held-out part): whole blocks, spread over the text; `validation` is the held-out share.

    The end of a text is unlike its beginning (the library's last files are about XML and zip archives), so a held-out
    tail would measure that difference too. Single characters or lines, on the other hand, would be guessed from their
    neighbours in the training part. So the text is cut at document breaks (else at blank lines, lines, anywhere) into
    blocks of about a twentieth of the share or more, and the blocks with the smallest CRC-32 are held out: no seed,
    no chance, and a block that occurs twice stays together. Every character is in exactly one part, in the text's
    order.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation}: must lie between 0 and 1")
    share = int(len(text) * validation)
    for separator in (DOCUMENT_BREAK, "\n\n", "\n", ""):
        blocks = _blocks(text, separator, max(1, share // 20))
        if len(blocks) >= 2 / validation:
            break
    held, size = set(), 0
    for index in sorted(range(len(blocks)), key=lambda i: zlib.crc32(blocks[i].encode("utf-8", "surrogatepass"))):
        if size + len(blocks[index]) <= share:
            held.add(index)
            size += len(blocks[index])
    if not held or len(held) == len(blocks):
        raise CorpusError(f"{len(text)} characters are too few to hold out {validation:g} of them; use a longer text")
    parts = ["".join(b for i, b in enumerate(blocks) if (i in held) == wanted) for wanted in (False, True)]
    return parts[0], parts[1]


def _blocks(text: str, separator: str, smallest: int) -> list[str]:
    """`text` cut after every `separator` that completes a block of at least `smallest` characters ("": anywhere)."""
    blocks, start = [], 0
    while start < len(text):
        end = text.find(separator, max(start, start + smallest - len(separator)))
        end = len(text) if end < 0 else end + len(separator)
        blocks.append(text[start:end])
        start = end
    return blocks


def main(argv: list[str] | None = None) -> int:
    """`python -m rwkv_nb build_data`: builds the files that are not up to date. Errors are raised.

    demo.bin, demo.idx, demo.meta.json beside demo.jsonl (`make_data`: 3 epochs, ctx_len 512, seed 0), built/stdlib.txt
    (sources) and built/stories.txt. A file counts as up to date when built/state.json holds the BLAKE2b hash of its
    inputs (data, settings and the code that builds it) and of the outputs as they now are. Every file appears whole
    or not at all.
    """
    parser = argparse.ArgumentParser(prog="python -m rwkv_nb build_data", description="build the embedded data")
    parser.add_argument("--demo", help="a demo.jsonl elsewhere; the files are built beside it")
    parser.add_argument("--force", action="store_true", help="build also what is up to date")
    arguments = parser.parse_args(argv)
    _build(demo_path(arguments.demo), arguments.force)
    return 0


def _build(demo: Path, force: bool) -> None:
    from rwkv_nb.data import make_data, stories  # here: corpus itself needs neither

    prefix, built = demo.with_suffix(""), demo.parent / "built"
    built.mkdir(exist_ok=True)
    state_file = built / "state.json"
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none yet, or a damaged one: then nothing counts as up to date
        state = {}
    library = standard_library_text("sources")
    steps = [  # outputs, inputs, how
        (
            [Path(f"{prefix}{ending}") for ending in (".bin", ".idx", ".meta.json")],
            [demo.read_bytes(), DEMO_EPOCHS, DEMO_CTX_LEN, DEMO_SEED, _code()],
            lambda: make_data.make_data(demo, prefix, DEMO_EPOCHS, DEMO_CTX_LEN, seed=DEMO_SEED),
        ),
        ([built / "stdlib.txt"], [library.encode()], lambda: _write(built / "stdlib.txt", library)),
        (
            [built / "stories.txt"],
            [STORIES, STORIES_SEED, _code("stories.py"), _code("grammar.py")],
            lambda: _write(built / "stories.txt", stories.generate(STORIES, STORIES_SEED)),
        ),
    ]
    for outputs, inputs, build in steps:
        before = {"inputs": _hash(*inputs), "outputs": _outputs(outputs)}
        current = not force and state.get(outputs[0].name) == before
        if not current:
            build()
            state[outputs[0].name] = before | {"outputs": _outputs(outputs)}
            _write(state_file, json.dumps(state, indent=1))
        for path in outputs:
            print(f"{'up to date' if current else 'built':10}  {path.stat().st_size:>10,} bytes  {path}")


def _code(pattern: str = "*.py") -> bytes:
    """The source of this room's modules: what they build counts as out of date when they change."""
    return b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob(pattern)))


def _hash(*values: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # with the length: ("ab", "c") is not ("a", "bc")
    return digest.hexdigest()


def _outputs(paths: list[Path]) -> list[str | None]:
    return [_hash(path.read_bytes()) if path.is_file() else None for path in paths]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

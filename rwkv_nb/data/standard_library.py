"""The text that every Python carries: the sources and documentation of the standard library that runs this very code.

It is under the PSF licence, is read from the reader's own installation, and is not redistributed here. Here too: the 96
characters in which all embedded text is written (ALPHABET: the 95 printable ones of ASCII and the newline, so that a
character-level model has 96 tokens), and how other text is carried over to them.

What it is not: a cleaner for large crawled data. The rest of the corpora is in `corpus`, which offers these names as
well. Source of the layout: https://docs.python.org/3/library/sysconfig.html (path "stdlib").
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import tokenize
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # token id = position: newline 0, space 1, ... "~" 95
DOCUMENT_BREAK = "\n\n\n\n"

# Left out of the library's text. Tests: assertions about data rather than prose or programs, and more of them than of
# all the rest. encodings, entities, stringprep, _sysconfigdata: long generated tables of code points or build
# settings, which teach a model nothing but tables. pydoc_data: documentation inside one string literal; kind="docs"
# reads it as what it is. The rest of the directories are not the standard library, though they lie below it.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SKIPPED_DIRECTORIES |= {"encodings", "pydoc_data"}
SKIPPED_FILES = {"html/entities.py", "stringprep.py", "sitecustomize.py", "usercustomize.py"}
SKIPPED_PREFIXES = ("config-", "lib-dynload", "_sysconfigdata", "_sysconfig_vars")

TYPOGRAPHY = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2212": "-",
    "\u2026": "...", "\u2022": "*", "\u00d7": "x", "\u00df": "ss", "\u00e6": "ae", "\u00f8": "o", "\u0142": "l",
    "\u00a9": "(c)", "\u2192": "->", "\f": None, "\ufeff": None, "\u200b": None, "\u00ad": None,
})  # fmt: skip


class CorpusError(ValueError):
    """A text that cannot be used; the message names the file and the remedy."""


def reduce_characters(text: str) -> str:
    """`text` in the 96 characters of ALPHABET.

    Line ends become newlines, tabs run to columns of 8 (Python's own rule, so that sources stay correct), blanks at
    line ends go; typographic signs are written in ASCII and accents dropped (NFKD); a line that still holds another
    character is left out whole, because a line with a hole in it would teach something false.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(TYPOGRAPHY)
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in decomposed if not unicodedata.combining(c)).translate(TYPOGRAPHY)
    foreign = re.compile(r"[^ -~]")
    lines = (line.rstrip() for line in text.expandtabs(8).split("\n"))
    return "\n".join(line for line in lines if not foreign.search(line))


def _library_files() -> Iterator[tuple[str, Path]]:
    """(path relative to the library with forward slashes, file), sorted by the former: one order everywhere."""
    root = Path(sysconfig.get_path("stdlib"))  # in a virtual environment: that of the Python it was made from
    found = []
    for directory, subdirectories, names in os.walk(root):
        wanted = [d for d in subdirectories if d not in SKIPPED_DIRECTORIES and not d.startswith(SKIPPED_PREFIXES)]
        subdirectories[:] = wanted  # in place: os.walk goes on only into these
        for name in names:
            relative = Path(directory, name).relative_to(root).as_posix()
            if name.endswith(".py") and relative not in SKIPPED_FILES and not name.startswith(SKIPPED_PREFIXES):
                found.append((relative, Path(directory, name)))
    if not found:
        raise CorpusError(
            f"no .py files of the standard library below {root}: this Python comes without its sources (a zip or "
            "embedded edition). Use the one of python.org, conda, uv or your system, or load_text() with your own text"
        )
    return iter(sorted(found))


def _source(path: Path) -> str | None:
    """The file's text in the encoding it declares; None if it cannot be read as that."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def _docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions in the order of the source, without their indentation."""
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        # Definitions may stand below `if` or `try`; expressions hold none, and there are ten times as many of those.
        children = ast.iter_child_nodes(node)
        stack.extend(reversed([child for child in children if isinstance(child, ast.stmt | ast.excepthandler)]))


def _topics() -> Iterator[str]:
    """The chapters of the language reference that `help()` shows; none where a distribution leaves pydoc_data out."""
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if path.is_file():
        for statement in ast.parse(_source(path) or "").body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                yield from (inspect.cleandoc(text) for text in ast.literal_eval(statement.value).values())


def _documents(kind: str) -> Iterator[str]:
    seen: set[str] = set()  # a docstring that occurs twice is kept once: else held-out text would be trained on
    for _, path in _library_files():
        source = _source(path)
        if source is None:
            continue
        if kind == "sources":
            yield source
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files are not the reader's business
            try:
                docstrings = [text for text in _docstrings(source) if not (text in seen or seen.add(text))]
            except (SyntaxError, ValueError):  # templates that end in .py but are not Python
                continue
        yield "\n\n".join(docstrings)
    if kind == "docs":
        yield from _topics()


def standard_library_text(kind: str = "sources", max_chars: int | None = None) -> str:
    """Real text that every Python carries, in ALPHABET, the documents parted by DOCUMENT_BREAK.

    kind "sources": the programs of the standard library; "docs": their docstrings and the language reference of
    `help()`. max_chars: at most so many characters, cut after a line where there is one. Same text for the same
    Python; another version, another text. Raises ValueError for another kind, CorpusError where Python comes without
    sources.
    """
    if kind not in ("sources", "docs"):
        raise ValueError(f"kind={kind!r}: choose 'sources' or 'docs'")
    parts, total = [], 0
    for document in _documents(kind):
        document = re.sub(r"\n{4,}", "\n\n\n", reduce_characters(document)).strip("\n")
        if document:
            parts.append(document)
            total += len(document) + len(DOCUMENT_BREAK)
            if max_chars is not None and total > max_chars:
                break
    text = DOCUMENT_BREAK.join(parts) + "\n"
    if max_chars is not None and len(text) > max_chars:
        text = text[: text.rfind("\n", 0, max_chars) + 1] or text[:max_chars]
    return text

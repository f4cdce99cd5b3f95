"""All exercises of the course, and the wrong answers that their checks were seen to reject.

    python -m rwkv_nb checks              number, title, minutes, difficulty, notebook
    python -m rwkv_nb checks --report     the same, each with the wrong answers that its check rejects

The report keeps no list of its own. It runs the proofs in tests/checks and writes down every answer that a check
rejects while they run, with the message that a reader would see. So it needs a clone of the repository and pytest.

What it is not: a record of what a reader has solved; a check tells that, in the notebook.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rwkv_nb.teaching import checks
from rwkv_nb.teaching.checks import Exercise, Verdict

ROOT = Path(__file__).resolve().parents[2]
PROOFS = ROOT / "tests" / "checks"


def exercises() -> list[Exercise]:
    """Every exercise that has a check, in the order of the notebooks."""
    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"{checks.__name__}.{module.name}")
    return sorted(
        (check.about for check in checks.REGISTRY.values()),
        key=lambda about: tuple(map(int, about.number.split("."))),
    )


def notebook_of(number: str) -> str:
    """The file name of the notebook with exercise `number`, or its number alone where no notebooks are at hand."""
    lesson = number.split(".")[0].zfill(2)
    found = sorted((ROOT / "notebooks").glob(f"{lesson}_*.ipynb"))
    return found[0].name if found else f"notebook {lesson}"


def dots(difficulty: int) -> str:
    """Difficulty as the boxes in the notebooks show it.

    >>> dots(2)
    '●●○○○'
    """
    return "●" * difficulty + "○" * (5 - difficulty)


def describe(answer: object) -> str:
    """A wrong answer in a few words: the source of a lambda, the name of a function, the value of anything else."""
    if isinstance(answer, str) and "\n" in answer:
        return f"a source of {len(answer.splitlines())} lines"
    if not inspect.isfunction(answer):
        return getattr(answer, "__name__", None) or textwrap.shorten(repr(answer), 90)
    if answer.__name__ != "<lambda>":
        return answer.__name__
    code = answer.__code__
    try:
        tree = ast.parse(Path(code.co_filename).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return "lambda"
    places = [(line, column) for line, _, column, end in code.co_positions() if line and column != end]
    around = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Lambda) and all(
            (node.lineno, node.col_offset) <= place <= (node.end_lineno, node.end_col_offset) for place in places)
    ]  # fmt: skip
    if not around:
        return "lambda"
    innermost = max(around, key=lambda node: (node.lineno, node.col_offset))
    return textwrap.shorten(ast.unparse(innermost), 90)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, dict[str, str]]]:
    """While the context lasts, collects rejected answers: exercise number -> {message: the answer in a few words}."""
    found: dict[str, dict[str, str]] = {}

    def listen(verdict: Verdict, answers: tuple) -> None:
        if verdict.state == "wrong":
            words = ", ".join(map(describe, answers))
            found.setdefault(verdict.exercise.number, {}).setdefault(verdict.message, words)

    checks.LISTENERS.append(listen)
    try:
        yield found
    finally:
        checks.LISTENERS.remove(listen)


def run_proofs(folder: Path = PROOFS, run: Callable[[list[str]], int] | None = None) -> dict[str, dict[str, str]]:
    """Run the proofs in `folder` and return what `recorded` has collected. run: pytest.main, or a stand-in.

    Raises ValueError if there are none, if pytest is missing, or if a proof fails.
    """
    if not folder.is_dir():
        raise ValueError("tests/checks, the proofs of the checks, is not here; call this in a clone of the repository")
    if run is None:
        try:
            import pytest
        except ModuleNotFoundError as error:
            raise ValueError("the report runs the proofs with pytest, which is missing; run `make setup`") from error
        run = pytest.main
    output = io.StringIO()
    options = ["-q", "-p", "no:cacheprovider", "-c", os.fspath(ROOT / "pyproject.toml"), "--rootdir", os.fspath(ROOT)]
    with recorded() as found, contextlib.redirect_stdout(output):
        code = int(run([os.fspath(folder), *options]))
    if code:
        raise ValueError(f"a proof failed, so there is nothing to report:\n{output.getvalue()[-3000:]}")
    return found


def table(found: dict[str, dict[str, str]] | None = None) -> str:
    """The list of exercises; with `found` each is followed by the wrong answers that its check rejects."""
    rows, every = [], exercises()
    for about in every:
        head = f"{about.number:>4}  {dots(about.difficulty)} {about.minutes:3} min  {about.title:<32}"
        rows.append(f"{head} {notebook_of(about.number)}".rstrip())
        if found is not None:
            rejected = found.get(about.number, {})
            rows.append(f"      rejects {len(rejected)} wrong answers")
            for message, words in rejected.items():
                rows.append(f"      - {words}\n          {textwrap.shorten(message, 160)}")
    total = sum(about.minutes for about in every)
    rows.append(f"{len(every)} exercises, about {total / 60:.0f} hours")
    if found is not None:
        rows[-1] += f"; {sum(map(len, found.values()))} wrong answers rejected, each with a message of its own"
    return "\n".join(rows)


def main(argv: Sequence[str]) -> int:
    """The command line: `python -m rwkv_nb checks [--report]`."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_nb checks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run the proofs; list what they see rejected")
    arguments = parser.parse_args(argv)
    print(table(run_proofs() if arguments.report else None))
    return 0

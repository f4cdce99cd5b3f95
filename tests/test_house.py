"""The house: imports point down, modules stay short, the public interface is typed, examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rwkv_nb"
MODULES = sorted(PACKAGE.rglob("*.py"))
BELOW = {  # what each room may import from, besides itself
    "data": set(), "wkv": set(), "model": {"data", "wkv"}, "training": {"data", "wkv", "model"},
    "inference": {"data", "wkv", "model"}, "teaching": {"data", "wkv", "model", "training", "inference"},
}  # fmt: skip
TYPED = ["data", "wkv", "model", "training", "inference", "teaching/plots.py", "teaching/lesson.py",
         "teaching/exercises.py", "teaching/doctor.py"]  # fmt: skip


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of everything of this package that a module imports, wherever in it the import stands."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("rwkv_nb.")}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE], ids=dotted)
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0]
    others = {name.split(".")[1] for name in imports(path)} - {room}
    assert others <= BELOW[room], f"{dotted(path)} imports from {sorted(others - BELOW[room])}"


def test_every_room_is_in_the_list_and_relative_imports_are_seen(tmp_path):
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE} == set(BELOW)
    assert "rwkv_nb.inference.sampling.SamplingArgs" in imports(PACKAGE / "inference" / "generation.py")


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_is_short_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300, "split it: one subject a module"
    assert ast.get_docstring(ast.parse(text)), "a docstring that says what it is and what it is not"


def public_functions(module) -> list:
    """Functions and methods with a public name that are defined in this module itself."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            found.append(value)
        elif inspect.isclass(value):
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)  # of a classmethod or staticmethod
                own = inspect.isfunction(function) and function.__module__ == module.__name__
                if own and (method == "__init__" or not method.startswith("_")) and function.__name__ != "<lambda>":
                    found.append(function)
    return found


def untyped(function) -> list[str]:
    """The parameters without a type, and "return" where what comes back has none."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    missing = [p.name for p in parameters if p.annotation is p.empty]
    if signature.return_annotation is signature.empty and function.__name__ != "__init__":
        missing.append("return")
    return missing


TYPED_MODULES = [path for path in MODULES if path.relative_to(PACKAGE).as_posix().startswith(tuple(TYPED))]


@pytest.mark.parametrize("path", TYPED_MODULES, ids=dotted)
def test_the_public_interface_says_its_types(path):
    module = importlib.import_module(dotted(path))
    missing = {function.__qualname__: names for function in public_functions(module)
               if not function.__module__.endswith("__main__") and (names := untyped(function))}  # fmt: skip
    assert missing == {}


def test_untyped_sees_what_it_should():
    def f(self, a, b: int, *c, **d: str):
        pass

    assert untyped(f) == ["a", "c", "return"]


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "scripts").glob("*.py")), ROOT / "book" / "anchors.py"],
                         ids=lambda path: path.relative_to(ROOT).as_posix())  # fmt: skip
def test_examples_in_docstrings_run(path):
    if not re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.M):
        return
    if path.is_relative_to(PACKAGE):
        module = importlib.import_module(dotted(path))
    else:
        sys.path.insert(0, str(path.parent))
        try:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0

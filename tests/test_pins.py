"""pyproject.toml, constraints.txt and environment.yml say the same."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, exact, version = line.partition("==")
            assert exact, f"constraints.txt: {line!r} is not an exact pin"
            assert canonicalize_name(name) not in found, f"constraints.txt: {name} twice"
            found[canonicalize_name(name)] = version
    return found


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for texts in (PROJECT["dependencies"], *extras.values()) for text in texts]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_within_its_bound(requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(version), f"{requirement.name}: {version} is outside {requirement.specifier}"


OF_CUDA = ("nvidia-", "cuda-", "triton")  # a torch that is built for CUDA brings them along, in versions of its own


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="another environment may hold more")
def test_everything_installed_is_pinned():
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    wrong = {name: version for name, version in installed.items()
             if pins().get(name) != version.partition("+")[0] and not name.startswith(OF_CUDA)}  # fmt: skip
    assert set(wrong) <= {"pip", "rwkv-nb"}, f"constraints.txt does not have these: {wrong}"


def test_only_lower_bounds_in_pyproject():
    for requirement in requirements():
        assert all(s.operator == ">=" for s in requirement.specifier), f"{requirement}: a learner's newer one must do"


def test_torch_is_the_version_the_course_names():
    assert pins()["torch"] == "2.13.0"


def test_the_extras_that_the_readme_names_exist():
    extras = PROJECT["optional-dependencies"]
    assert {"test", "gpu", "docs"} <= set(extras)
    assert {Requirement(text).name for text in extras["gpu"]} == {"deepspeed", "ninja", "tensorboard", "wandb"}


def test_conda_installs_the_same_set():
    [python, pip, nested] = ENVIRONMENT["dependencies"]
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    assert pip == "pip"
    assert nested["pip"] == ["--constraint constraints.txt", "--editable .[test]"]


def test_no_pin_names_a_local_build():
    assert not [version for version in pins().values() if "+" in version]

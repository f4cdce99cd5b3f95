"""A small course with scripts/setup_env.py in it: packages of many little files in place of JupyterLab and torch.

Nothing comes from the network: pip finds wheels in a folder beside the course (PIP_NO_INDEX, PIP_FIND_LINKS), and the
course builds itself with a backend of its own, as a package that needs nothing to be built.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

PACKAGES = ("alpha", "beta", "gamma")
FILES = 150  # in each package

BACKEND = '''
import zipfile

def get_requires_for_build_editable(settings=None):
    return []

def build_editable(folder, settings=None, metadata=None):
    import os
    name, info = "small_course-1.0-py3-none-any.whl", "small_course-1.0.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: small-course", "Version: 1.0", "Provides-Extra: test",
                "Provides-Extra: docs", "Requires-Dist: alpha", "Requires-Dist: beta",
                'Requires-Dist: gamma; extra == "test"']
    members = {"small_course.pth": os.getcwd() + "\\n", f"{info}/METADATA": "\\n".join(metadata) + "\\n",
               f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: here\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    members[f"{info}/RECORD"] = "".join(f"{m},,\\n" for m in [*members, f"{info}/RECORD"])
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
    return name
'''
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "small-course"
version = "1.0"
"""
COMMAND = """
import os, sys, time, alpha, beta, gamma
time.sleep(0.2)
with open("built.tmp", "w") as file:
    file.write("built")
os.replace("built.tmp", "built")
"""


def wheel(folder: Path, name: str) -> None:
    """NAME with FILES modules, each of which says its number, and a command NAME."""
    info = f"{name}-1.0.dist-info"
    members = {f"{name}/part{i}.py": f"number = {i}\n" * 200 for i in range(FILES)}
    imports = "".join(f"from . import part{i}\n" for i in range(FILES))
    members[f"{name}/__init__.py"] = imports + "def main(): print('here')\n"
    members[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    members[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name} = {name}:main\n"

    def row(member: str, content: str) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        return f"{member},sha256={digest},{len(content)}\n"

    members[f"{info}/RECORD"] = "".join(row(*pair) for pair in members.items()) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        for member, content in members.items():
            file.writestr(member, content)


def build(course: Path, script: Path) -> dict[str, str]:
    """Lay out the course with a copy of the script; the environment variables that a set-up there needs."""
    wheels = course.parent / "wheels"
    for folder in (course / "scripts", course / "rwkv_nb", wheels):
        folder.mkdir(parents=True)
    shutil.copy(script, course / "scripts")
    files = {"backend.py": BACKEND, "pyproject.toml": PROJECT, "constraints.txt": "", "rwkv_nb/__init__.py": ""}
    for name, content in {**files, "rwkv_nb/__main__.py": COMMAND}.items():
        (course / name).write_text(content)
    for name in PACKAGES:
        wheel(wheels, name)
    foreign = ("PIP_", "PYTHON", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_NO_CACHE_DIR": "1"}


def uninstall(course: Path) -> None:
    """Take the packages out again, quickly."""
    for site in course.glob(".venv/lib/python*/site-packages"):
        for name in PACKAGES:
            shutil.rmtree(site / name)
            shutil.rmtree(site / f"{name}-1.0.dist-info")
            (course / ".venv" / "bin" / name).unlink()


def works(course: Path) -> bool:
    """Whether every part of every package is there, can be imported and has its command, and the data are built."""
    parts = (list(course.glob(f".venv/lib/python*/site-packages/{name}/part*.py")) for name in PACKAGES)
    sizes = all(len(part) == FILES for part in parts)
    python = course / ".venv" / "bin"
    imports = "; ".join(f"import {name}; assert {name}.part{FILES - 1}.number == {FILES - 1}" for name in PACKAGES)
    commands = [[str(python / "python"), "-c", imports], *([str(python / name)] for name in PACKAGES)]
    try:
        fine = all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)
    except OSError:
        return False
    return sizes and fine and (course / "built").read_text() == "built"

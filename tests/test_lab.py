"""`make lab`: JupyterLab as the Makefile starts it, on loopback alone, behind a token; nothing here turns that off."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
WEAKER = (  # what would open a server: an address that is not loopback, no token or password, no check of who asks
    r"ip=?\s*['\"]?(0\.0\.0\.0|\*|::)", r"token\s*=\s*(''|\"\"|None|\\?\s*$)", r"password\s*=\s*(''|\"\")",
    "disable_check_xsrf", "allow_unauthenticated_access", "allow_origin", "allow_remote_access", "NotebookApp.token",
)  # fmt: skip


def lab_command(*arguments: str) -> list[str]:
    """What `make lab` would run last, with this Python's Jupyter."""
    told = subprocess.run(["make", "--dry-run", "lab", f"ARGS={shlex.join(arguments)}"], cwd=ROOT, capture_output=True,
                          text=True, check=True).stdout.replace("\\\n", " ")  # fmt: skip
    words = shlex.split(next(line for line in told.splitlines() if "jupyter lab" in line))
    at = words.index("lab")
    return [sys.executable, "-m", "jupyterlab", *words[at + 1 :]]


def asked(address: str) -> tuple[int, str]:
    """Status and final address of a GET."""
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.status, answer.url
    except urllib.error.HTTPError as error:
        return error.code, address


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(process, port, token) of the running server, with settings of nobody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    own = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    with open(home / "log", "w") as log:
        command = lab_command("--no-browser", f"--ServerApp.port={port}")
        process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**environment, **own})
    try:
        token = None
        for _ in range(600):
            token = re.search(rf"http://127\.0\.0\.1:{port}/\S*[?&]token=([0-9a-f]+)", (home / "log").read_text())
            if token or process.poll() is not None:
                break
            time.sleep(0.1)
        assert token, (home / "log").read_text()[-2000:]
        yield process, port, token[1]
    finally:
        process.terminate()
        process.wait(30)


def test_it_listens_on_loopback_alone(server):
    process, port, _ = server
    for _ in range(100):  # the table of connections is read line by line and can miss an entry
        listening = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        if ("127.0.0.1", port) in listening:
            break
        time.sleep(0.1)
    assert (("127.0.0.1", port)) in listening
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_nobody_comes_in_without_the_token(server):
    _, port, token = server
    address = f"http://127.0.0.1:{port}"
    assert len(token) >= 40
    for path in ("/api/contents", "/api/kernels", "/api/terminals", "/files/README.md"):
        status, final = asked(address + path)
        assert status == 403 or "/login" in final, f"{path} answers {status} without a token"
        status, final = asked(f"{address}{path}?token={'0' * len(token)}")
        assert status == 403 or "/login" in final, f"{path} answers {status} with a wrong token"
    assert "/login" in asked(address + "/lab")[1]
    assert asked(f"{address}/api/contents?token={token}")[0] == 200
    assert "/login" not in asked(f"{address}/lab?token={token}")[1]


def test_the_command_names_loopback_and_no_token():
    words = lab_command("--no-browser")
    assert "--ServerApp.ip=127.0.0.1" in words
    assert not [word for word in words if "token" in word.lower() or "password" in word.lower()]


def test_nothing_in_the_repository_weakens_it():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    if names == [""]:
        pytest.skip("no git repository")
    found = []
    for name in filter(None, names):
        path = ROOT / name
        if path.suffix in (".png", ".pth", ".jsonl") or path == Path(__file__) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if "jupyter" in line.lower() or "ServerApp" in line or "IdentityProvider" in line:
                found += [f"{name}:{number}: {line[:100]}" for pattern in WEAKER if re.search(pattern, line)]
    assert found == []


@pytest.mark.parametrize("line", ["jupyter lab --ip=0.0.0.0", "jupyter lab --ServerApp.ip='*'",
                                  "jupyter lab --IdentityProvider.token=''",
                                  "c.ServerApp.disable_check_xsrf = True", 'c.ServerApp.password = ""'])  # fmt: skip
def test_the_search_knows_what_would_weaken_it(line):
    assert any(re.search(pattern, line) for pattern in WEAKER)

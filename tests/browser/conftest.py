"""A JupyterLab on loopback with a token, and a headless Chromium that looks at it.

Without a Chromium these tests are skipped with the remedy. Playwright's own browser is not downloaded: the system's is
used (Debian: apt install chromium; elsewhere set CHROMIUM=/path/to/chrome).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Resolves when the last cell has run: the sources of the cells that have not (an error before them stops the run).
RUN_ALL = """async () => {
    await window.jupyterapp.commands.execute('notebook:run-all-cells');
    return [...window.jupyterapp.shell.currentWidget.content.widgets]
        .filter(c => c.model.type === 'code' && c.model.sharedModel.execution_count === null)
        .map(c => c.model.sharedModel.source);
}"""


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def browser() -> Iterator:
    executable = chromium()
    if executable is None:
        pytest.skip("NO BROWSER: install one (Debian: apt install chromium) or set CHROMIUM=/path/to/chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield instance
        instance.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Iterator[str]:
    """Address of a running JupyterLab on a copy of the course: its autosave must not touch the originals."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "data"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "LICENSE", folder)  # notebook 01 cuts it into tokens
    port, token = free_port(), secrets.token_hex(16)
    options = [
        f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}", "--no-browser",
        f"--ServerApp.root_dir={folder}", "--allow-root", "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    log = open(folder / "lab.log", "w")  # noqa: SIM115  closed below, after the server
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{port}/lab/tree/notebooks/%s?reset&token={token}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start:\n" + (folder / "lab.log").read_text()[-2000:])
        yield address
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture
def run_notebook(browser, lab):
    """run_notebook("01_tokenizer") opens it in JupyterLab, runs all cells and returns the page."""
    contexts = []

    def run(stem: str, seconds: int = 120):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(lab % f"{stem}.ipynb")
        idle = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        page.wait_for_function(idle)  # a menu click before this is lost
        page.set_default_timeout(seconds * 1000)
        not_run = page.evaluate(RUN_ALL)
        assert not_run == [], f"{stem}: cells that did not run"
        page.set_default_timeout(20_000)
        return page

    yield run
    for context in contexts:
        context.close()


@pytest.fixture
def screenshot():
    """Keep a picture of what the reader sees: test-artefacts/NAME.png."""
    folder = ROOT / "test-artefacts"
    folder.mkdir(exist_ok=True)

    def take(page, name: str) -> None:
        page.screenshot(path=folder / (re.sub(r"\W+", "_", name) + ".png"))

    return take

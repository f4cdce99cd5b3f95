"""The static site: built once from the committed notebooks, every link followed, read without a network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    import build_book
finally:
    sys.path.remove(str(ROOT / "scripts"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The anchors of a page, where its links lead, what it loads, and the alt texts of its pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.alts: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in LOADED and found.get(LOADED[tag]) and found.get("rel") not in ("canonical", "search", "index", "next",
                                                                                 "prev"):  # fmt: skip
            self.loads.append(found[LOADED[tag]])
        if tag == "img":
            self.alts.append(found.get("alt") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("myst_nb", reason=build_book.REMEDY)
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, ROOT / "scripts" / "build_book.py", folder]
    environment = {**os.environ, "REPOSITORY": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_every_notebook_and_text_is_a_page(pages, site):
    names = {path.relative_to(site).as_posix() for path in pages}
    wanted = {f"notebooks/{path.stem}.html" for path in NOTEBOOKS}
    wanted |= {f"reference/{room}.html" for room in build_book.ROOMS}
    assert names >= wanted | {"index.html", "README.html", "notebooks/glossary.html", "notebooks/questions.html"}


def test_every_link_inside_leads_somewhere_and_every_other_is_an_address(pages):
    broken, inside = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                if not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc) or " " in link:
                    broken.append((path.name, link))
                continue
            inside += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (parts.fragment and target in pages
                                        and unquote(parts.fragment) not in pages[target].anchors):  # fmt: skip
                broken.append((path.name, link))
    assert broken == [] and inside > 500


def test_nothing_is_loaded_from_the_network(pages, site):
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            assert address.startswith("data:") or (path.parent / unquote(urlsplit(address).path)).is_file(), address
    assert (site / "_static" / "mathjax" / "tex-chtml.js").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_shows_what_the_notebook_has_stored(path, pages, site):
    page = pages[site / "notebooks" / f"{path.stem}.html"]
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    shown = [output.get("data", {}) for cell in cells for output in cell.outputs]
    alts = [data["text/plain"] for data in shown if "image/png" in data]
    assert [" ".join(alt.split()) for alt in page.alts if alt] == [" ".join(alt.split()) for alt in alts]
    printed = [o.text.strip().splitlines()[0] for cell in cells for o in cell.outputs if o.output_type == "stream"]
    text = html.unescape(re.sub(r"<[^>]+>", "", page.text))
    assert [line for line in printed if line not in text] == []
    panels = sum(build_book.PANEL in data for data in shown)
    assert text.count(build_book.INSTEAD.strip("*").split(".")[0]) == panels
    assert "widget-view" not in page.text and "Panel(children" not in page.text


def test_the_search_index_knows_names_and_words(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert json.loads(index.removeprefix("Search.setIndex(").rstrip(")\n;"))["titles"]
    assert "magic_prim" in index and "eagl" in index


def test_it_reads_and_searches_without_a_network(site):
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
    executable = os.environ.get("CHROMIUM") or next(filter(None, found), None)
    if executable is None:
        pytest.skip("NO BROWSER: install one (Debian: apt install chromium) or set CHROMIUM=/path/to/chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        context = browser.new_context(offline=True)
        page, failed = context.new_page(), []
        page.set_default_timeout(60_000)
        page.on("requestfailed", lambda request: failed.append(request.url))
        with_formulas = [path for path in sorted((site / "notebooks").glob("[0-9]*.html"))
                         if "mathjax/tex-chtml.js" in path.read_text(encoding="utf-8")]  # fmt: skip
        assert len(with_formulas) >= 6
        for path in with_formulas:
            page.goto(path.as_uri())
            page.wait_for_function("() => window.MathJax?.startup?.promise")
            page.evaluate("() => window.MathJax.startup.promise")  # formulas are set
            formulas, wrong = (page.locator(selector) for selector in ("mjx-container", "mjx-merror, [data-mjx-error]"))
            assert wrong.count() == 0, path.stem
            assert "\\_" not in "".join(formulas.all_inner_texts()), path.stem  # \text{} knows no \_
            assert formulas.count() > 0, path.stem
        page.goto((site / "search.html").as_uri() + "?q=golden+factor")
        page.locator("#search-results a", has_text="magic prime").first.wait_for()
        assert failed == []
        browser.close()


def test_a_link_that_leads_nowhere_stops_the_build(tmp_path, monkeypatch):
    pytest.importorskip("myst_nb", reason=build_book.REMEDY)
    real = build_book.stage

    def small(folder: Path) -> None:  # one notebook is enough, with one wrong letter in an anchor
        real(folder)
        for path in (folder / "notebooks").glob("[1-9]*.ipynb"):
            path.unlink()
        shutil.rmtree(folder / "reference")
        (folder / "index.md").write_text("# Book\n\n[x](notebooks/00_start_here.ipynb#2.-Tokenz)\n", encoding="utf-8")

    monkeypatch.setattr(build_book, "stage", small)
    assert build_book.build(tmp_path) == 1


def test_without_sphinx_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_book.importlib.util, "find_spec", lambda name: None)
    assert build_book.build(tmp_path) == 1
    assert "make setup" in capsys.readouterr().err and list(tmp_path.iterdir()) == []

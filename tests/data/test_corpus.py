"""The embedded corpora: characters, the library's text, held-out split, a reader's own files, build_data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data import corpus, standard_library
from rwkv_nb.data.corpus import (
    ALPHABET,
    DOCUMENT_BREAK,
    CorpusError,
    characters_to_ids,
    demo_path,
    ids_to_characters,
    load_text,
    reduce_characters,
    split,
    standard_library_text,
)


@pytest.fixture(scope="module")
def sources() -> str:
    return standard_library_text("sources")


@pytest.fixture(scope="module")
def docs() -> str:
    return standard_library_text("docs")


def test_alphabet():
    assert len(ALPHABET) == len(set(ALPHABET)) == 96
    assert ALPHABET[0] == "\n" and set(ALPHABET) == {c for c in map(chr, range(128)) if c.isprintable()} | {"\n"}
    ids = characters_to_ids(ALPHABET)
    assert ids.dtype == np.uint8 and ids.tolist() == list(range(96)) and ids_to_characters(ids) == ALPHABET
    assert characters_to_ids("").shape == (0,)


@pytest.mark.parametrize("character", ["\t", "\x00", "\x7f", "\r", "é", "😀"])
def test_a_foreign_character_is_named(character):
    with pytest.raises(CorpusError, match="position 3.*reduce_characters"):
        characters_to_ids("ab\n" + character + "\x01")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_reduced_text_is_in_the_alphabet_and_stays(text):
    reduced = reduce_characters(text)
    assert set(reduced) <= set(ALPHABET)
    assert reduce_characters(reduced) == reduced


def test_reduction_by_example():
    assert reduce_characters("a\r\nb\rc\n") == "a\nb\nc\n"
    assert reduce_characters("if x:\n\ty = 1  \n        z = 2\n") == "if x:\n        y = 1\n        z = 2\n"
    assert reduce_characters("“naïve” café – \u2026\f\n") == '"naive" cafe - ...\n'
    assert reduce_characters("kept\nЖ = 1\nkept too") == "kept\nkept too"


def test_sources(sources):
    assert set(sources) == set(ALPHABET)
    assert sources.endswith("\n") and not sources.startswith("\n") and "\n" * 5 not in sources
    documents = sources.split(DOCUMENT_BREAK)
    assert len(documents) > 300 and 4e6 < len(sources) < 3e7
    assert all(documents)
    with open(os.path.join(sysconfig.get_path("stdlib"), "textwrap.py"), encoding="utf-8") as file:
        assert file.read().strip() in documents  # whole and unchanged
    for token in ("class JSONDecoder(object):", "def namedtuple(", "class OrderedDict(dict):"):
        assert token in sources
    for token in ("decoding_table = (", "build_time_vars = {", "html5 = {", "b3_exceptions", "'Aacute;'"):
        assert token not in sources, token


def test_docs(docs):
    assert set(docs) <= set(ALPHABET) and 5e5 < len(docs) < 1e7
    assert "Deserialize ``s`` (a ``str``, ``bytes`` or ``bytearray`` instance" in docs
    assert "def loads(" not in docs
    if (standard_library.Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py").is_file():
        assert "naming and binding" in docs.lower()


def test_docstrings_of_nested_definitions():
    source = '''"""Module."""
import x
if x:
    class A:
        """Class
            indented.
        """
        async def f(self):
            """Method."""
            def inner():
                "Inner."
try:
    pass
except OSError:
    def g():
        """G."""
def none():
    x = """not one"""
'''
    expected = ["Module.", "Class\nindented.", "Method.", "Inner.", "G."]
    assert list(standard_library._docstrings(source)) == expected


def test_same_text_in_another_process(sources):
    code = (
        "import zlib; from rwkv_nb.data.corpus import standard_library_text; "
        "print(zlib.crc32(standard_library_text().encode()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(out.stdout) == corpus.zlib.crc32(sources.encode())


@pytest.mark.parametrize("limit", [80, 1000, 200_000])
def test_max_chars(sources, limit):
    part = standard_library_text("sources", max_chars=limit)
    is_prefix = sources.startswith(part)  # outside the assertion: pytest would print and compare megabytes
    assert is_prefix and part[-1] == "\n" and limit - 200 < len(part) <= limit


def test_library_with_odd_files(tmp_path, monkeypatch):
    def put(name: str, data: bytes) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)

    put("b.py", b"B = 1\r\n\r\n\r\n\r\n\r\n\r\nBB = 2\r\n")
    put("a/x.py", b"X = 1\n")
    put("a.py", "\ufeff'About a.'\n# caf\u00e9\nA = 1\n".encode())
    put("latin.py", b"# -*- coding: latin-1 -*-\n# \xe9t\xe9\n")
    put("broken.py", b"# \xff\xfe\n")
    put("empty.py", b"\n\n")
    for folder in ("test", "a/tests", "site-packages", "encodings", "config-3.11"):
        put(f"{folder}/x.py", b"WRONG = 1\n")
    for name in ("stringprep.py", "_sysconfigdata__linux_.py"):
        put(name, b"WRONG = 1\n")
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path))
    assert standard_library_text().split(DOCUMENT_BREAK) == [
        "'About a.'\n# cafe\nA = 1",
        "X = 1",
        "B = 1\n\n\nBB = 2",
        "# -*- coding: latin-1 -*-\n# ete\n",
    ]
    assert standard_library_text("docs") == "About a.\n"


def test_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(CorpusError, match="without its sources.*load_text"):
        standard_library_text()


def test_unknown_kind():
    with pytest.raises(ValueError, match="'tests'.*'sources' or 'docs'"):
        standard_library_text("tests")


def test_split_of_the_library(sources):
    training, held_out = split(sources)
    same_again = split(sources) == (training, held_out)  # outside the assertion: pytest would compare megabytes
    assert same_again
    assert 0.045 < len(held_out) / len(sources) <= 0.05
    assert len(training) + len(held_out) == len(sources)
    documents = sources.removesuffix("\n").split(DOCUMENT_BREAK)
    held = [document in held_out for document in documents]
    torn = [i for i, document in enumerate(documents) if not held[i] and document not in training]
    assert not torn
    halves = documents[: len(documents) // 2], documents[len(documents) // 2 :]
    sizes = [sum(len(document) for document in half if document in held_out) for half in halves]
    assert sum(held) > 10 and min(sizes) > 0.15 * len(held_out)  # from all over the text


@settings(max_examples=100, deadline=None)
@given(st.text("ab. \n", min_size=400, max_size=3000), st.floats(0.02, 0.6))
def test_split_keeps_every_character_once(text, validation):
    try:
        parts = split(text, validation)
    except CorpusError:
        assert len(text) * validation < 60
        return
    assert sorted(parts[0] + parts[1]) == sorted(text)
    assert parts[0] and 0 < len(parts[1]) <= len(text) * validation
    # each part is a subsequence of the text, in its order
    for part in parts:
        rest = iter(text)
        assert all(character in rest for character in part)


def test_split_of_text_without_any_break():
    training, held_out = split("x" * 5000, 0.1)
    assert len(held_out) == 500 and len(training) == 4500


@pytest.mark.parametrize("validation", [0, 1, -0.1, 2, float("nan")])
def test_split_shares_that_make_no_sense(validation):
    with pytest.raises(ValueError, match="validation="):
        split("text " * 100, validation)


def test_split_of_too_short_a_text():
    with pytest.raises(CorpusError, match="too few"):
        split("short")
    with pytest.raises(CorpusError, match="too few"):
        split("")


def test_load_text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeffGrüße\r\nzwei\rdrei\n".encode())
    assert load_text(path) == load_text(str(path)) == "Grüße\nzwei\ndrei\n"
    path = tmp_path / "own.JSONL"
    path.write_bytes('{"text": "eins\\nzwei", "more": 1}\r\n\n  \n{"text": "drei ü"}\n'.encode())
    assert load_text(path) == "eins\nzwei\ndrei ü"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n", "no text"),
        ("blank.jsonl", b"\n", "no text"),
        ("latin.txt", b"abc\xe9", "not UTF-8.*0xe9 at position 3.*iconv"),
        ("wide.txt", "abc".encode("utf-16"), "not UTF-8.*UTF-16"),
        ("bad.jsonl", b'{"text": "a"}\n{oops}\n', "line 2: not JSON.*every line"),
        ("none.jsonl", b'{"txt": "a"}\n', 'line 1: no string "text"'),
        ("number.jsonl", b'{"text": 3}\n', 'line 1: no string "text"'),
        ("list.jsonl", b'["text"]\n', 'line 1: no string "text"'),
    ],
)
def test_load_text_names_what_is_wrong(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=words) as caught:
        load_text(path)
    assert str(path) in str(caught.value)


def test_load_text_missing(tmp_path):
    with pytest.raises(CorpusError, match="no such file.*current folder"):
        load_text(tmp_path / "gone.txt")
    with pytest.raises(CorpusError, match="a folder"):
        load_text(tmp_path)


def test_demo_path(tmp_path, monkeypatch):
    assert demo_path().name == "demo.jsonl" and demo_path().parent.name == "data"
    assert load_text(demo_path()).count("Assistant:") > 50
    own = tmp_path / "mine.jsonl"
    with pytest.raises(CorpusError, match="mine.jsonl: no such file"):
        demo_path(own)
    own.write_text("{}")
    assert demo_path(own) == own
    # as from an installed wheel: no data/ beside the package, but a checkout around the notebook that runs
    monkeypatch.setattr(corpus, "__file__", str(tmp_path / "site" / "rwkv_nb" / "data" / "corpus.py"))
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone" / "notebooks")
    with pytest.raises(CorpusError, match="git clone"):
        demo_path()
    (tmp_path / "clone" / "data").mkdir()
    (tmp_path / "clone" / "data" / "demo.jsonl").write_text("{}")
    assert demo_path() == tmp_path / "clone" / "data" / "demo.jsonl"


NAMES = ["demo.bin", "demo.idx", "demo.meta.json", "stdlib.txt", "stories.txt"]


def states(printed: str) -> dict[str, str]:
    rows = [line.replace("up to date", "current").split() for line in printed.splitlines()]
    return {os.path.basename(row[-1]): row[0] for row in rows}


def test_build_data(tmp_path, monkeypatch, capsys):
    from rwkv_nb.data.binidx import MMapIndexedDataset

    monkeypatch.setattr(corpus, "STORIES", 50)
    monkeypatch.setattr(corpus, "standard_library_text", lambda kind: "a = 1\n" * 10)
    demo = tmp_path / "demo.jsonl"
    demo.write_text("\n".join(json.dumps({"text": f"Question {i}? " + "word " * 60}) for i in range(40)) + "\n")

    def build(*more: str) -> dict[str, str]:
        assert corpus.main(["--demo", str(demo), *more]) == 0
        return states(capsys.readouterr().out)

    assert build() == dict.fromkeys(NAMES, "built")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in files} == {*NAMES, "demo.jsonl", "state.json"}  # and no temporary file
    assert len(MMapIndexedDataset(str(tmp_path / "demo"))) == 120  # 40 documents, 3 epochs
    assert (tmp_path / "built" / "stories.txt").read_text().count("\n\n") == 50
    assert build() == dict.fromkeys(NAMES, "current")
    assert build("--force") == dict.fromkeys(NAMES, "built")
    assert {path: path.read_bytes() for path in files} == files  # the same bytes again

    (tmp_path / "built" / "stories.txt").write_text("damaged")
    (tmp_path / "demo.idx").unlink()
    rebuilt = {"demo.bin": "built", "demo.idx": "built", "demo.meta.json": "built", "stories.txt": "built"}
    assert build() == {"stdlib.txt": "current"} | rebuilt
    assert {path: path.read_bytes() for path in files} == files
    with monkeypatch.context() as patch:  # settings or code that have changed
        patch.setattr(corpus, "STORIES_SEED", 1)
        assert build() == dict.fromkeys(NAMES[:4], "current") | {"stories.txt": "built"}
        patch.setattr(corpus, "_code", lambda pattern="*.py": pattern.encode())
        assert build() == dict.fromkeys(NAMES, "built") | {"stdlib.txt": "current"}
    assert build() == dict.fromkeys(NAMES, "built") | {"stdlib.txt": "current"}
    demo.write_text(demo.read_text() + '{"text": "one more"}\n')
    assert build() == {"stdlib.txt": "current", "stories.txt": "current"} | dict.fromkeys(NAMES[:3], "built")
    assert len(MMapIndexedDataset(str(tmp_path / "demo"))) == 123
    (tmp_path / "built" / "state.json").write_text("{damaged")
    assert build() == dict.fromkeys(NAMES, "built")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    corpus._write(path, "old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(corpus.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        corpus._write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]

"""make_data against a literal re-implementation of the official steps; bad lines, round trip, report, progress."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_data_cases import TEXTS, TOKENIZER, Unpicklable, assert_official, leftovers, make_data, write_lines

from rwkv_nb.data import jsonl
from rwkv_nb.data import make_data as module
from rwkv_nb.data.binidx import MMapIndexedDataset
from rwkv_nb.data.make_data import JsonlError, epoch_order, preview
from rwkv_nb.data.tokenizer import WorldTokenizer


@pytest.mark.parametrize(("n_epoch", "seed"), [(1, 0), (3, 7), (4, 123456789)])
def test_files_are_those_of_the_official_steps(tmp_path, n_epoch, seed):
    source = write_lines(tmp_path / "in.jsonl", TEXTS * 3)
    report = module.make_data(source, tmp_path / "out", n_epoch, 16, seed)
    assert_official(tmp_path / "out", source, n_epoch, seed)
    assert (report.documents, report.items, report.dtype, report.seed) == (24, 24 * n_epoch, "uint16", seed)
    assert report.tokens == (tmp_path / "out.bin").stat().st_size // 2
    assert MMapIndexedDataset(tmp_path / "out").meta["sha256"] == TOKENIZER.sha256
    assert leftovers(tmp_path) == []


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), epochs=st.integers(1, 5), seed=st.integers(0, 2**64))
def test_order_is_that_of_the_cumulative_shuffle_of_a_list_of_lines(n, epochs, seed):
    lines, order = [f"line {i}" for i in range(n)], array("q", range(n))
    random.seed(seed)
    generator = random.Random(seed)
    for _ in range(epochs):
        random.shuffle(lines)
        assert [f"line {i}" for i in epoch_order(order, generator)] == lines


def test_seed_is_drawn_and_reported_when_none_is_given(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [f"document {i}" for i in range(200)])
    first, second = (make_data(source, tmp_path / name, 1, 8) for name in ("a", "b"))
    assert first.seed != second.seed
    assert (tmp_path / "a.bin").read_bytes() != (tmp_path / "b.bin").read_bytes()
    make_data(source, tmp_path / "c", 1, 8, first.seed)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "c.bin").read_bytes()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_and_are_stripped_as_in_text_mode(tmp_path, end):
    lines = ['{"text": "one"}', "", "  \t ", ' \u00a0{"id": 1, "text": "two", "text2": 3}\u2003', '{"text":"three"}']
    (tmp_path / "in.jsonl").write_bytes(end.join(lines).encode())  # and no end after the last one
    assert make_data(tmp_path / "in.jsonl", tmp_path / "out", 1, 1, 0).documents == 3
    assert_official(tmp_path / "out", tmp_path / "in.jsonl", 1, 0)


BAD = {  # name: (line as bytes, what the message must say)
    "not json": (b'{"text": "a"', "not JSON"),
    "plain": (b"Hello there", 'each line must be an object like {"text"'),
    "list": (b'["a"]', "a list and not an object"),
    "no text": (b'{"content": "a", "id": 3}', "no \"text\" among its fields ('content', 'id')"),
    "number": (b'{"text": 17}', '"text" is a number, not a string'),
    "null": (b'{"text": null}', '"text" is null'),
    "surrogate": (b'{"text": "ab\\ud83d"}', "lone surrogate, U+D83D at character 2"),
    "utf-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xE9 after 13 characters"),
    "bom": (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"),
    "utf-16": ('\ufeff{"text": "a"}'.encode("utf-16-le"), "looks like UTF-16"),
    "gzip": (b"\x1f\x8b\x08\x00abc", "looks like a gzip file"),
    "deep": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_stop_with_their_number_or_are_skipped(tmp_path, name):
    line, message = BAD[name]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(JsonlError) as caught:
        make_data(source, tmp_path / "out", 1, 1, 0)
    assert caught.value.line == 3
    assert str(caught.value).startswith(f"{source}, line 3: ")
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    report = make_data(source, tmp_path / "out", 2, 1, 0, on_error="skip")
    assert (report.documents, report.skipped, len(report.problems)) == (2, 1, 1)
    assert f"line 3: {caught.value.problem}" in str(report)


def test_report_names_only_the_first_skipped_lines(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 9)
    report = make_data(tmp_path / "in.jsonl", tmp_path / "out", 1, 1, 0, on_error="skip")
    assert (report.skipped, len(report.problems)) == (9, 5)
    assert "line 6" in str(report) and "line 7" not in str(report) and "and 4 more" in str(report)


def test_arguments_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", ["a"])
    for name in ("in.txt", "x.bin", "empty.jsonl", "blank.jsonl"):
        (tmp_path / name).write_text({"blank.jsonl": "\n \n", "empty.jsonl": ""}.get(name, '{"text": "a"}\n'))
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def refused(kind, message, path=source, out=tmp_path / "out", n_epoch=1, ctx_len=1, **options):
        with pytest.raises(kind, match=message):
            make_data(path, out, n_epoch, ctx_len, 0, **options)
        assert sorted(tmp_path.rglob("*")) == before

    refused(ValueError, "n_epoch is 0; it must be at least 1", n_epoch=0)
    refused(ValueError, "ctx_len is -4", ctx_len=-4)
    refused(ValueError, "n_epoch is 1.5; it must be an integer", n_epoch=1.5)
    refused(ValueError, "workers is 0", workers=0)
    refused(ValueError, 'on_error is .ignore.; it must be "stop" or "skip"', on_error="ignore")
    refused(FileNotFoundError, "there is no such file", path=tmp_path / "none.jsonl")
    refused(IsADirectoryError, "this is a folder", path=tmp_path / "folder")
    refused(ValueError, "plain text is no jsonl.*json.dumps", path=tmp_path / "in.txt")
    refused(ValueError, "is the input itself", path=tmp_path / "x.bin", out=tmp_path / "x")
    refused(ValueError, "this is a folder; give a name in it", out=tmp_path / "folder")
    refused(ValueError, "this is a folder; give a name in it", out=f"{tmp_path}/new/")
    refused(ValueError, "its folder does not exist", out=tmp_path / "none" / "out")
    refused(ValueError, "give the name without .bin", out=tmp_path / "out.bin")
    refused(ValueError, "no documents in it", path=tmp_path / "empty.jsonl")
    refused(ValueError, "no documents in it", path=tmp_path / "blank.jsonl")
    refused(ValueError, "cannot be sent to processes", workers=2, tokenizer=Unpicklable())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=20))
    refused(OSError, "MB of disk are needed by a rough estimate", n_epoch=100)
    refused(OSError, "MB of disk are needed after tokenising")


class Wrong:
    """Makes a mistake in one word."""

    vocab, vocab_size = TOKENIZER.vocab, TOKENIZER.vocab_size

    def encode_batch(self, texts):
        pairs = zip(texts, TOKENIZER.encode_batch(texts), strict=True)
        return [[*ids, 34] if "bad" in text else ids for text, ids in pairs]


class Early(Wrong):
    """Ends a document in its middle: the bytes are right, the documents are not."""

    def encode_batch(self, texts):
        return [[*ids[:1], 0, *ids[1:]] for ids in TOKENIZER.encode_batch(texts)]


class Shifted(Wrong):
    """Moves the bounds of the documents: all bytes together are right."""

    def encode_batch(self, texts):
        ids = TOKENIZER.encode_batch(texts)
        return [ids[0] + ids[1], [], *ids[2:]]


class Swapped(Wrong):
    """Has every length right, and the order wrong."""

    def encode_batch(self, texts):
        return [ids[1::-1] + ids[2:] for ids in TOKENIZER.encode_batch(texts)]


def test_round_trip_is_checked_for_every_document(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", ["good one", "fine", "so bad a word", "good"])
    with pytest.raises(JsonlError, match="line 3: its tokens decode to another text"):
        make_data(source, tmp_path / "out", 1, 1, 0, tokenizer=Wrong(), on_error="skip")
    for kind in (Early, Shifted, Swapped):
        with pytest.raises(JsonlError, match="line 1: its tokens decode to another text"):
            make_data(source, tmp_path / "out", 1, 1, 0, tokenizer=kind())
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 65529), max_size=50))
def test_table_decoding_gives_the_bytes_of_the_tokenizer(ids):
    assert CONVERTER.decode(np.array(ids, np.uint16)) == TOKENIZER.decode_bytes(ids)


CONVERTER = jsonl.Converter("in.jsonl", TOKENIZER)


def test_decoding_is_the_same_across_slices(monkeypatch):
    ids = np.arange(65530).astype(np.uint16)
    monkeypatch.setattr(jsonl, "SLICE", 1000)
    assert CONVERTER.decode(ids) == TOKENIZER.decode_bytes(ids)


def test_preview_shows_both_ends_without_halves_of_characters():
    text = "🙂" * 30 + "ab" + "🙂" * 30
    ids = TOKENIZER.encode_bytes(text.encode())
    ids = [byte + 1 for byte in text.encode()]  # one token a byte: every cut but one in four divides a character
    assert preview(TOKENIZER, ids, 1000) == text
    for limit in range(8, 24):
        head, dots, tail = preview(TOKENIZER, ids, limit).split("\n")
        assert head == "🙂" * (limit // 4) and tail == "🙂" * (limit // 4) and set(dots) == set("· ")
    assert preview(TOKENIZER, TOKENIZER.encode("a\ufffd" * 300)).startswith("a\ufffda\ufffd")  # a genuine one stays


def test_report_says_what_the_trainers_will_say(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", ["word " * 20 + str(i) for i in range(100)])
    report = make_data(source, tmp_path / "my data", 3, 16, 1)
    text, slots = str(report), report.tokens // 16
    assert f"{report.tokens} tokens, 300 items (100 documents, 3 epochs), dtype uint16, seed 1" in text
    assert f"magic_prime {report.prime} for ctx_len 16: {report.prime / slots:.4f} of {slots} slots" in text
    assert f"{report.prime / 40320:.2f} mini-epochs of 40320 samples" in text
    verdict_2023 = "accepts" if report.prime / slots > 0.99 else "refuses"
    assert f"December 2023 (ratio over 0.99) {verdict_2023} it, today's (over 0.9) accepts it" in text
    assert text.endswith(f"--my_exit_tokens {report.tokens} --magic_prime {report.prime} --ctx_len 16 "
                         f"--data_file '{tmp_path}/my data' --data_type binidx --vocab_size 65536")
    other = WorldTokenizer()
    other.vocab_size = 65529
    assert make_data(source, tmp_path / "other", 3, 16, 1, tokenizer=other).flags.endswith("--vocab_size 65529")
    small = make_data(source, tmp_path / "out", 1, 10**6, 1)
    assert small.prime is None and small.flags == "" and "no magic_prime for ctx_len 1000000: " in str(small)


def test_progress_is_silent_where_stderr_is_no_terminal(tmp_path, capfd):
    source = write_lines(tmp_path / "in.jsonl", TEXTS)
    make_data(source, tmp_path / "out", 2, 1, 0, progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_documents_and_speed_on_a_terminal(tmp_path, monkeypatch, capsys):
    source = write_lines(tmp_path / "in.jsonl", TEXTS)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    make_data(source, tmp_path / "out", 2, 1, 0, progress=True)
    shown = capsys.readouterr().err
    assert "read: 100%" in shown and "write: 100%" in shown and "8 documents" in shown and "B/s" in shown


def test_torch_is_not_imported(tmp_path):
    write_lines(tmp_path / "in.jsonl", TEXTS)
    code = ("import sys; from rwkv_nb.data.make_data import make_data; make_data('in.jsonl', 'out', 2, 4, 0); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0

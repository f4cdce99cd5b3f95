"""Notebook 01's panel and pictures: what is typed is what is shown, escaped, and the splits are right."""

from __future__ import annotations

import itertools

import pytest

from rwkv_nb.data.tokenizer import Trie, WorldTokenizer
from rwkv_nb.teaching.widgets import tokenizer as panels

tok = WorldTokenizer()


def test_panel_follows_the_typing():
    panel = panels.TokenPanel(tok, "Hello")
    assert "33155" in panel.tokens.value
    assert panel.line.value == "5 characters, 5 bytes, 1 token, 5.00 bytes per token"
    panel.box.value = "\n\n é"
    assert "2503" in panel.tokens.value and "33155" not in panel.tokens.value
    assert "⏎⏎" in panel.tokens.value and "C3 A9" in panel.tokens.value
    panel.box.value = ""
    assert panel.line.value == "0 characters, 0 bytes, 0 tokens"
    assert repr(panel).startswith("[tokens of your text:")


def test_panel_escapes_and_cuts_and_shows_errors():
    panel = panels.TokenPanel(tok, "<script>&", limit=20)
    assert "<script" not in panel.tokens.value and "&lt;" in panel.tokens.value
    panel.box.value = "a" * 100
    assert panel.line.value.startswith("20 characters") and "first 20 characters" in panel.line.value
    panel.box.value = "\ud800"
    assert "lone surrogate" in panel.error.value
    panel.box.value = "fine"
    assert panel.error.value == ""


@pytest.mark.parametrize(("entry", "shown"), [(b" the", "␣the"), (b"\n", "⏎"), (b"\xe4\xbb", "E4 BB"),
                                              (b"\x00", "\\x00"), ("é".encode(), "é")])
def test_readable(entry, shown):
    assert panels.readable(entry) == shown


def test_every_token_has_text_id_and_bytes():
    page = panels.tokens_html(panels.pairs(tok, "a🦅"))
    for token in tok.encode("a🦅"):
        assert f"<small>{token}</small>" in page
    assert page.count("color:#000") == len(tok.encode("a🦅"))  # readable in dark mode: text colour is set, too


def test_fewest_tokens_split_against_all_splits():
    vocabulary = {b"a": 1, b"b": 2, b"ab": 3, b"bab": 4, b"aab": 5}
    for letters in itertools.product(b"ab", repeat=7):
        data = bytes(letters)
        best = 99
        for cuts in itertools.product([0, 1], repeat=6):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [7]
            pieces = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            if all(piece in vocabulary for piece in pieces):
                best = min(best, len(pieces))
        split = panels.fewest_tokens_split(data, vocabulary)
        assert b"".join(split) == data and len(split) == best
    assert panels.fewest_tokens_split(b"", vocabulary) == []
    with pytest.raises(ValueError, match="cannot be cut"):
        panels.fewest_tokens_split(b"ac", vocabulary)


@pytest.mark.parametrize(("entry", "name"), [(b" the", "Latin"), ("今".encode(), "CJK"), (b"12", "no letters"),
                                             (b"\xe4\xbb", "not UTF-8"), ("aж".encode(), "several")])
def test_script(entry, name):
    assert panels.script(entry) == name


def test_pictures_show_every_token():
    def labels(fig):
        return [text.get_text() for text in fig.axes[0].texts]

    tokens = panels.pairs(tok, "naïve eagle")
    assert {str(token) for token, _ in tokens} <= set(labels(panels.draw_layers("naïve eagle", tokens)))
    fig = panels.draw_splits({"greedy": [b"ab", b"c"], "best": [b"abc"]})
    assert labels(fig) == ["ab", "c", "abc"]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["greedy: 2 tokens", "best: 1 token"]
    trie = Trie()
    trie.insert(b"ab", 7)
    assert sorted(label for label in labels(panels.draw_trie(trie)) if label) == ["7", "a", "b"]


def test_article_1_round_trips_in_every_language():
    assert len(panels.ARTICLE_1) >= 10
    for text in panels.ARTICLE_1.values():
        assert tok.decode(tok.encode(text)) == text

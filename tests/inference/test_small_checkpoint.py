"""data/small.pth as it travels in git: what its card says, whoever reads it, and that it has learnt what it shows."""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path

import pytest
import torch

from rwkv_nb.data import corpus, stories
from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.inference.engine import load_engine, tokenizer_for
from rwkv_nb.model.rwkv import RWKV

os.environ.setdefault("RWKV_JIT_ON", "0")  # read when the package is imported: without it, no minutes of compiling
DATA = Path(__file__).resolve().parents[2] / "data"
FILE, CARD = DATA / "small.pth", (DATA / "small.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return RWKV.from_checkpoint(FILE, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(model):
    return tokenizer_for(model.config, FILE)


def test_the_file_is_small_plain_and_the_one_on_the_card():
    data = FILE.read_bytes()
    assert len(data) < 2.9e6 and hashlib.sha256(data).hexdigest() in CARD and f"{len(data):,} bytes" in CARD
    weights = torch.load(FILE, weights_only=True, map_location="cpu")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert f"{sum(x.numel() for x in weights.values()):,} parameters" in CARD


def test_its_tokenizer_is_the_courses_characters(tokenizer):
    assert tokenizer.chars == CharTokenizer(corpus.ALPHABET).chars and tokenizer.name in CARD


def test_the_package_reads_the_same_in_it(model, tokenizer):
    package = load_engine(FILE, "cpu fp32", "package")
    ids = torch.tensor([tokenizer.encode("Once there was a little cat called Anna. She owned a ")])
    ours, theirs = model(ids)[0][0, -1], package(ids)[0][0, -1]
    assert model.config.n_layer >= 2
    assert torch.allclose(ours, theirs, atol=0.02 * float(ours.abs().max()))  # it rounds the embedding to bfloat16
    assert int(ours.argmax()) == int(theirs.argmax())


def bits(model, tokenizer, text: str) -> float:
    ids = torch.tensor([tokenizer.encode(text)])
    logits, _ = model(ids[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])) / math.log(2)


def test_it_predicts_held_out_stories_as_its_card_says(model, tokenizer):
    claimed = float(re.search(r"^\| stories \|.*\| ([\d.]+) \|$", CARD, re.M)[1])
    found = bits(model, tokenizer, stories.generate(400, 1)[:20_000])
    floor = stories.entropy_bits_per_character()
    assert found == pytest.approx(claimed, rel=0.1) and floor < found < 1.6 * floor


def test_it_remembers_what_was_owned(model, tokenizer):
    things = [thing for _, thing in stories.RULES["thing"]]

    def likeliest(begin: str) -> str:
        costs = {thing: bits_of_the_end(model, tokenizer, begin, f"{thing} ") for thing in things}
        return min(costs, key=costs.get)

    story = "Once there was a little cat called Anna. She owned a red {} and kept it in a box. One morning the "
    assert sum(likeliest(story.format(thing)) == thing for thing in things) >= 9  # by chance: 1 of 12


def bits_of_the_end(model, tokenizer, begin: str, end: str) -> float:
    ids = torch.tensor([tokenizer.encode(begin + end)])
    logits, _ = model(ids[:, :-1])
    n = len(end)
    return float(torch.nn.functional.cross_entropy(logits[0, -n:], ids[0, -n:], reduction="sum")) / math.log(2)

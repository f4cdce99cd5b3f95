"""Stories: probabilities that sum to one, exact entropy, a parser that agrees with generation, one derivation each."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest

from rwkv_nb.data import stories
from rwkv_nb.data.corpus import characters_to_ids
from rwkv_nb.data.entropy import ngram_cross_entropy
from rwkv_nb.data.grammar import Grammar

SMALL_RULES = {
    "s": [(1, "<who=name> met a <animal>. <more>\n\n")],
    "more": [
        (3, "{who} ran."),
        (2, "It liked {who.her} <colour> hat, said {who}."),
        (1, "On <day> {who.she} ate. <end>"),
    ],
    "end": [(1, "Good {who}!"), (3, "Bad <animal>!")],
    "name": [(3, "Anna"), (1, "Bo")],
    "animal": [(2, "cat"), (5, "elephant")],
    "colour": [(1, "red"), (1, "blue"), (2, "green")],
    "day": [(1, "Monday"), (6, "Sunday")],
}
SMALL_ATTRIBUTES = {"Anna": {"her": "her", "she": "she"}, "Bo": {"her": "his", "she": "he"}}


def small() -> Grammar:
    return Grammar(SMALL_RULES, SMALL_ATTRIBUTES, "s")


def all_small_texts() -> dict[str, float]:
    """Text -> probability, written out by hand with loops: no part of the package is used."""
    texts: dict[str, float] = {}
    for (name, she, her, p), (animal, q) in itertools.product(
        [("Anna", "she", "her", 3 / 4), ("Bo", "he", "his", 1 / 4)], [("cat", 2 / 7), ("elephant", 5 / 7)]
    ):
        first, both = f"{name} met a {animal}. ", p * q
        texts[f"{first}{name} ran.\n\n"] = both * 3 / 6
        for colour, r in [("red", 1 / 4), ("blue", 1 / 4), ("green", 1 / 2)]:
            texts[f"{first}It liked {her} {colour} hat, said {name}.\n\n"] = both * 2 / 6 * r
        for day, r in [("Monday", 1 / 7), ("Sunday", 6 / 7)]:
            for end, t in [(f"Good {name}!", 1 / 4), ("Bad cat!", 3 / 4 * 2 / 7), ("Bad elephant!", 3 / 4 * 5 / 7)]:
                texts[f"{first}On {day} {she} ate. {end}\n\n"] = both * 1 / 6 * r * t
    return texts


def test_small_grammar_against_enumeration():
    texts, grammar = all_small_texts(), small()
    grammar.check_unambiguous()
    assert math.fsum(texts.values()) == pytest.approx(1)
    for text, p in texts.items():
        assert grammar.log2_probability(text) == pytest.approx(math.log2(p), abs=1e-12)
        assert len(grammar.derivations(text)) == 1
    assert grammar.entropy_bits() == pytest.approx(-sum(p * math.log2(p) for p in texts.values()), abs=1e-12)
    assert grammar.expected_length() == pytest.approx(sum(p * len(text) for text, p in texts.items()), abs=1e-12)
    for text in (*texts, "Anna"):
        assert grammar.log2_probability(text + "\n") == grammar.log2_probability(text[:-1]) == -math.inf
    rng = random.Random(0)
    counts = dict.fromkeys(texts, 0)
    for _ in range(40_000):
        counts[grammar.sample(rng)[0]] += 1  # a KeyError here: a text that does not exist
    for text, p in texts.items():
        assert abs(counts[text] / 40_000 - p) < 5 * math.sqrt(p / 40_000)


def test_ambiguous_grammars_are_found():
    same = Grammar({"s": [(1, "a<x>"), (1, "ab")], "x": [(1, "b"), (1, "c")]}, {}, "s")
    with pytest.raises(ValueError, match="'ab'"):
        same.check_unambiguous()
    assert len(same.derivations("ab")) == 2
    assert same.log2_probability("ab") == pytest.approx(math.log2(1 / 4 + 1 / 2))  # summed over both derivations
    beginning = Grammar({"s": [(1, "<x><x>")], "x": [(1, "a"), (1, "aa")]}, {}, "s")
    with pytest.raises(ValueError, match="begins another"):
        beginning.check_unambiguous()


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ({"s": [(1, "<nowhere>")]}, "nowhere"),
        ({"s": [(1, "{hero}")]}, "drawn nowhere"),
        ({"s": [(1, "<x=a><x=b>")], "a": [(1, "1")], "b": [(1, "2")]}, "two rules"),
        ({"s": [(1, "<x=a>")], "a": [(1, "<b>")], "b": [(1, "2")]}, "plain words"),
    ],
)
def test_broken_grammars_are_refused(rules, word):
    with pytest.raises(ValueError, match=word):
        Grammar(rules, {}, "s")


def test_no_story_has_two_derivations():
    stories.grammar().check_unambiguous()


def test_parsing_agrees_with_generation():
    rng, grammar = random.Random(3), stories.grammar()
    for _ in range(5000):
        text, bits = stories.story(rng)
        (log2_p,) = grammar.derivations(text)  # exactly one
        assert log2_p == pytest.approx(-bits, abs=1e-9)


def test_sampled_bits_and_lengths_agree_with_the_exact_values():
    rng, n = random.Random(4), 20_000
    samples = [stories.story(rng) for _ in range(n)]
    for values, expected in (
        ([bits for _, bits in samples], stories.entropy_bits_per_story()),
        ([len(text) for text, _ in samples], stories.grammar().expected_length()),
    ):
        mean = sum(values) / n
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / n / n)
        assert abs(mean - expected) < 4 * error
    ratio = stories.entropy_bits_per_story() / stories.grammar().expected_length()
    assert stories.entropy_bits_per_character() == pytest.approx(ratio)


def test_the_form_of_stories():
    text = stories.generate(2000, 5)
    assert text == stories.generate(2000, 5) != stories.generate(2000, 6)
    characters_to_ids(text)  # within the alphabet
    *all_stories, rest = text.split("\n\n")
    assert rest == "" and len(all_stories) == 2000
    counts = [len(re.findall(r"[.!?](?: |$)", one)) for one in all_stories]
    assert set(counts) == {3, 4, 5, 6}
    for one in all_stories:
        hero = re.search(r"(?:called|named) (\w+)", one)[1]
        wrong = {"he", "his", "him"} if stories.ATTRIBUTES[hero]["she"] == "she" else {"she", "her"}
        assert not wrong & set(one.lower().replace(".", " ").split()), one


def test_first_story_of_seed_zero_is_the_same_everywhere():
    assert stories.generate(1, 0) == (
        "Long ago a young dog named Mia came to the river. Her dearest thing was a blue drum, and it lay on a"
        " shelf. One morning the drum was no longer on a shelf. The dog asked a crow, who only yawned. The "
        "dog asked a wolf, who knew nothing. In the end a sparrow brought the blue drum back and got some "
        "bones from Mia.\n\n"
    )


def test_probability_of_a_row_of_stories():
    rng = random.Random(7)
    pairs = [stories.story(rng) for _ in range(20)]
    text = "".join(one for one, _ in pairs)
    assert stories.log2_probability(text) == pytest.approx(-sum(bits for _, bits in pairs))
    assert stories.log2_probability("") == 0.0
    for broken in (text[:-1], text[1:], text + "Once", "Hello.\n\n", text.replace(" a ", " the ", 1), "\n\n" + text):
        assert stories.log2_probability(broken) == -math.inf


def test_disagreement_has_probability_zero():
    text = next(t for t in (stories.generate(1, seed) for seed in range(99)) if "called Mia" in t and "She owned" in t)
    assert stories.log2_probability(text) > -100
    assert stories.log2_probability(text.replace("She owned", "He owned")) == -math.inf
    assert stories.log2_probability(text.replace("Mia", "Anna")) > -100  # all mentions: another fine story
    assert stories.log2_probability(text.replace("called Mia", "called Anna")) == -math.inf


def test_trigrams_stay_far_above_the_floor():
    train, test = (characters_to_ids(stories.generate(n, seed)) for n, seed in ((4000, 0), (400, 1)))
    floor = stories.entropy_bits_per_character()
    assert 0.1 < floor < 0.3
    losses = [ngram_cross_entropy(train, test, 96, order) for order in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2] > 5 * floor

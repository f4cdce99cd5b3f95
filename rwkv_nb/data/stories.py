"""Small stories from a grammar whose entropy is known exactly: text for which the best possible loss can be computed.

A hero with a name, a kind and a size, and a treasure with a colour and a place, come back sentences later, as do the
pronoun (from the name) and the food (from the kind): all that costs no bits for a model that remembers. Every story
has 3 to 6 sentences and ends with a blank line. The grammar's notation, the formulas and the proof that no story has
two derivations are in `rwkv_nb.data.grammar`.

What it is not: natural language. A loss on stories tells how much of a known structure a model has found, and no
more.
"""

from __future__ import annotations

import functools
import math
import random

from rwkv_nb.data.grammar import Alternatives, Grammar


def _words(words: str) -> Alternatives:
    """Comma-separated words; the earlier, the likelier: weights n, n - 1, ..., 1."""
    items = [word.strip() for word in words.split(",")]
    return [(len(items) - i, item) for i, item in enumerate(items)]


RULES: dict[str, Alternatives] = {
    "story": [(1, "<opening> <treasure> <calm3>\n\n")],
    "opening": [
        (3, "Once there was a <size=size> <kind=kind> called <hero=name>."),
        (2, "In a <house> near the <near> lived a <size=size> <kind=kind> called <hero=name>."),
        (2, "Long ago a <size=size> <kind=kind> named <hero=name> came to the <near>."),
    ],
    "treasure": [
        (3, "{hero.She} owned a <colour=colour> <thing=thing> and kept it <place=place>."),
        (2, "{hero.Her} dearest thing was a <colour=colour> <thing=thing>, and it lay <place=place>."),
        (1, "A friend had given {hero.him} a <colour=colour> <thing=thing>, which {hero.she} hid <place=place>."),
    ],
    # calmN, lostN: the treasure is at home, is lost; at most N more sentences before the last one
    "calm3": [(2, "<goodnight>"), (4, "<play> <calm2>"), (4, "<loss> <lost2>")],
    "calm2": [(3, "<goodnight>"), (3, "<play> <calm1>"), (4, "<loss> <lost1>")],
    "calm1": [(4, "<goodnight>"), (3, "<play> <calm0>"), (3, "<loss> <lost0>")],
    "calm0": [(1, "<goodnight>")],
    "lost2": [(1, "<found>"), (2, "<search> <lost1>")],
    "lost1": [(1, "<found>"), (1, "<search> <lost0>")],
    "lost0": [(1, "<found>")],
    "play": [
        (3, "On <day> {hero} took the {thing} to the <goal>."),
        (2, "When it rained, {hero.she} showed the {thing} to a <visitor>."),
        (2, "A <visitor> asked for the {thing}, but {hero} <refusal>."),
    ],
    "loss": [
        (3, "One <time> the {thing} was no longer {place}."),
        (2, "Then a <visitor> took the {thing} and ran to the <goal>."),
    ],
    "search": [
        (3, "{hero.She} looked <under> and found only a <junk>."),
        (2, "The {kind} asked a <visitor>, who <shrug>."),
        (1, "{hero} looked for it until <hour>."),
    ],
    "found": [
        (2, "At last the {colour} {thing} turned up <under>, and {hero} was a happy {kind}."),
        (2, "In the end a <visitor> brought the {colour} {thing} back and got some {kind.food} from {hero}."),
    ],
    "goodnight": [
        (2, "That night {hero} ate {hero.her} {kind.food} and slept beside the {colour} {thing}."),
        (1, "So the {size} {kind} and the {colour} {thing} stayed together for <span>."),
    ],
    "name": _words("Anna, Tom, Lily, Ben, Mia, Max, Ruth, Paul, Nora, Finn, Clara, Hugo, Rosa, Emil, Ada, Jack"),
    "size": _words("little, big, young, clever, shy, brave, quiet, merry"),
    "kind": _words("cat, dog, rabbit, mouse, bear, fox, hen, squirrel, goat, duck"),
    "house": _words("hut, tower, cave, barn, wooden house, garden shed"),
    "near": _words("forest, river, sea, mill, mountain, village, lake, meadow"),
    "colour": _words("red, blue, green, yellow, white, silver, purple, brown"),
    "thing": _words("ball, kite, hat, drum, book, boat, bell, lamp, scarf, spoon, whistle, key"),
    "place": _words("under the bed, in a box, on a shelf, behind the door, in the garden, by the window"),
    "goal": _words("market, bridge, beach, hill, school, old well, station, woods"),
    "day": _words("Sunday, Monday, Friday, Saturday, Tuesday, Wednesday, Thursday"),
    "time": _words("morning, evening, winter day, night, autumn day, summer day"),
    "hour": _words("dark, noon, supper, sunset, bedtime"),
    "visitor": _words("frog, crow, pony, badger, sparrow, snail, hedgehog, wolf, sheep, beetle"),
    "under": _words("under a stone, behind the stove, in the hay, in a puddle, between two trees, near the fence"),
    "junk": _words("leaf, button, feather, rusty nail, shoe, potato, pebble, candle"),
    "refusal": _words("said no, only laughed, shook a paw, ran home, did not listen"),
    "shrug": _words("knew nothing, was asleep, pointed north, only yawned, began to sing"),
    "span": _words("many years, a long time, a hundred days, ever"),
}

_SHE = {"she": "she", "She": "She", "her": "her", "Her": "Her", "him": "her"}
_HE = {"she": "he", "She": "He", "her": "his", "Her": "His", "him": "him"}
ATTRIBUTES: dict[str, dict[str, str]] = {
    **dict.fromkeys(["Anna", "Lily", "Mia", "Ruth", "Nora", "Clara", "Rosa", "Ada"], _SHE),
    **dict.fromkeys(["Tom", "Ben", "Max", "Paul", "Finn", "Hugo", "Emil", "Jack"], _HE),
    "cat": {"food": "fish"}, "dog": {"food": "bones"}, "rabbit": {"food": "carrots"}, "mouse": {"food": "cheese"},
    "bear": {"food": "honey"}, "fox": {"food": "grapes"}, "hen": {"food": "corn"}, "squirrel": {"food": "nuts"},
    "goat": {"food": "grass"}, "duck": {"food": "bread"},
}  # fmt: skip


@functools.cache
def grammar() -> Grammar:
    """The grammar of the stories (its `check_unambiguous()` passes)."""
    return Grammar(RULES, ATTRIBUTES, "story")


def story(rng: random.Random) -> tuple[str, float]:
    """(text, bits): one story of 3 to 6 sentences with the blank line that ends it; bits = -log2 p(text)."""
    return grammar().sample(rng)


def generate(n_stories: int, seed: int) -> str:
    """`n_stories` stories in a row; the same for the same seed in every Python version."""
    rng = random.Random(seed)
    return "".join(story(rng)[0] for _ in range(n_stories))


def entropy_bits_per_story() -> float:
    """Exact expected -log2 p(text) of a story, by summing over the grammar (1)."""
    return grammar().entropy_bits()


def entropy_bits_per_character() -> float:
    """The lowest loss that any model can reach on long streams of stories, in bits per character: H / L, (1) over (2).

    Stories are independent and each shows where it ends (the blank line), so n of them cost any model n H bits on
    average at the least and have n L characters on average; by the law of large numbers the ratio of the totals tends
    to H / L (not to the mean of the stories' own ratios: short stories would count too much). A window that starts
    amid a story costs more.
    """
    return grammar().entropy_bits() / grammar().expected_length()


def log2_probability(text: str) -> float:
    """log2 p of a row of whole stories, found by parsing the text alone; -inf if it is no such row; 0.0 for ''."""
    *texts, rest = text.split("\n\n")  # no story has a blank line but at its end
    return -math.inf if rest else math.fsum(grammar().log2_probability(one + "\n\n") for one in texts)

"""Probabilistic grammars with a memory: texts whose probability, entropy and mean length are known exactly.

A rule is a list of alternatives with weights; a template is text with `<rule>` (an expansion, drawn anew), `<x=rule>`
(drawn and remembered as x), `{x}` (x again) and `{x.attribute}` (what follows from x, such as the pronoun of a name).
A remembered word costs no bits, so a model that looks back far enough beats every n-gram.

Symbols. p_i: weight of alternative i over the sum of its rule's weights. The choices are independent, therefore

    H(rule) = sum_i p_i * (-log2 p_i + sum of H(r) over the <r> in template i)                       bits         (1)
    L(rule) = sum_i p_i * (literal characters + sum of L(r) + mean length of what every {x} shows)   characters   (2)

(1) is the entropy of a derivation (Grenander 1967; Chi, "Statistical properties of probabilistic context-free
grammars", Computational Linguistics 25, 1999). It is the entropy of the text as well if no text has two derivations.
`check_unambiguous` proves that: at every choice, nothing that one alternative can become is a beginning of what
another can become, so that reading from left to right settles every choice.

What it is not: a parser for large or recursive grammars (it tries everything, and a rule must not contain itself).
"""

from __future__ import annotations

import functools
import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

Alternatives = list[tuple[int, str]]  # (weight, template)
Memory = dict[str, str]
PART = re.compile(
    r"<(?:(?P<store>\w+)=)?(?P<rule>\w+)>|\{(?P<recall>\w+)(?:\.(?P<attribute>\w+))?\}|(?P<text>[^<>{}]+)"
)


class Grammar:
    """rules: rule -> [(weight, template)]; attributes: word -> {attribute: text}; start: the rule of a whole text.

    Raises ValueError for a rule or name that is unknown, or a name drawn from two rules or from more than words.
    """

    def __init__(self, rules: dict[str, Alternatives], attributes: dict[str, dict[str, str]], start: str) -> None:
        self.start, self.attributes = start, attributes
        self.rules: dict[str, list[tuple[float, list[dict]]]] = {}  # rule -> [(p_i, parts of the template)]
        self.source: dict[str, str] = {}  # remembered name -> the rule it is drawn from
        for rule, alternatives in rules.items():
            total = sum(weight for weight, _ in alternatives)
            self.rules[rule] = [(w / total, [m.groupdict() for m in PART.finditer(t)]) for w, t in alternatives]
        self.bounds = {rule: list(accumulate(p for p, _ in self.rules[rule])) for rule in rules}
        parts = [part for choices in self.rules.values() for _, template in choices for part in template]
        for part in parts:
            if part["rule"] and part["rule"] not in self.rules:
                raise ValueError(f"<{part['rule']}>: no such rule; the rules are {', '.join(rules)}")
            if part["store"] and self.source.setdefault(part["store"], part["rule"]) != part["rule"]:
                raise ValueError(f"<{part['store']}=...> is drawn from two rules; give each its own name")
        for part in parts:
            if part["recall"] and part["recall"] not in self.source:
                raise ValueError(f"{{{part['recall']}}} is drawn nowhere; write <{part['recall']}=rule> before it")
        for name, rule in self.source.items():
            if any(part["text"] is None for _, template in self.rules[rule] for part in template):
                raise ValueError(f"<{name}={rule}>: what is remembered must be plain words, without < or {{")
        self._entropy, self._length = functools.cache(self._entropy), functools.cache(self._length)

    def sample(self, rng: random.Random) -> tuple[str, float]:
        """One text and its bits, -log2 of the probability of the choices that made it."""
        memory: Memory = {}
        return self._sample(self.start, rng, memory)

    def _sample(self, rule: str, rng: random.Random, memory: Memory) -> tuple[str, float]:
        choices = self.rules[rule]
        # random() alone is promised to give the same numbers in every Python version
        p, template = choices[min(bisect_right(self.bounds[rule], rng.random()), len(choices) - 1)]
        pieces, bits = [], -math.log2(p)
        for part in template:
            if part["rule"]:
                piece, more = self._sample(part["rule"], rng, memory)
                bits += more
                if part["store"]:
                    memory[part["store"]] = piece
            else:
                piece = part["text"] or self._shown(memory[part["recall"]], part["attribute"])
            pieces.append(piece)
        return "".join(pieces), bits

    def _shown(self, value: str, attribute: str | None) -> str:
        return self.attributes[value][attribute] if attribute else value

    def entropy_bits(self) -> float:
        """(1) for the start rule."""
        return self._entropy(self.start)

    def _entropy(self, rule: str) -> float:
        return sum(
            p * (-math.log2(p) + sum(self._entropy(part["rule"]) for part in template if part["rule"]))
            for p, template in self.rules[rule]
        )

    def expected_length(self) -> float:
        """(2) for the start rule, in characters."""
        return self._length(self.start)

    def _length(self, rule: str) -> float:
        return sum(p * sum(self._part_length(part) for part in template) for p, template in self.rules[rule])

    def _part_length(self, part: dict) -> float:
        if part["rule"]:
            return self._length(part["rule"])
        if part["text"]:
            return len(part["text"])
        return sum(p * len(self._shown(value, part["attribute"])) for p, value in self._values(part["recall"]))

    def _values(self, name: str) -> list[tuple[float, str]]:
        """(probability, value) of a remembered name; its rule has only words as alternatives."""
        return [(p, "".join(part["text"] for part in template)) for p, template in self.rules[self.source[name]]]

    def derivations(self, text: str) -> list[float]:
        """log2 probability of every derivation of the whole `text`, found from the text alone by trying all of them."""
        return [log2_p for end, _, log2_p in self._parse_rule(self.start, text, 0, {}) if end == len(text)]

    def log2_probability(self, text: str) -> float:
        """log2 of the sum over all derivations; -inf for a text that the grammar cannot make."""
        total = math.fsum(2.0**log2_p for log2_p in self.derivations(text))
        return math.log2(total) if total else -math.inf

    def _parse_rule(self, rule: str, text: str, start: int, memory: Memory) -> Iterator[tuple[int, Memory, float]]:
        for p, template in self.rules[rule]:
            for end, after, log2_p in self._parse_parts(template, text, start, memory):
                yield end, after, math.log2(p) + log2_p

    def _parse_parts(
        self, parts: list[dict], text: str, start: int, memory: Memory
    ) -> Iterator[tuple[int, Memory, float]]:
        if not parts:
            yield start, memory, 0.0
            return
        part, rest = parts[0], parts[1:]
        if part["rule"]:
            for end, after, log2_p in self._parse_rule(part["rule"], text, start, memory):
                if part["store"]:
                    after = after | {part["store"]: text[start:end]}
                for final, memory_then, more in self._parse_parts(rest, text, end, after):
                    yield final, memory_then, log2_p + more
        else:
            piece = part["text"] or self._shown(memory[part["recall"]], part["attribute"])
            if text.startswith(piece, start):
                yield from self._parse_parts(rest, text, start + len(piece), memory)

    def check_unambiguous(self, characters: int = 24) -> None:
        """Raises ValueError if, looking at so many characters, two alternatives of a rule could be mistaken."""
        for rule, choices in self.rules.items():
            seen: dict[str, int] = {}
            for index, (_, template) in enumerate(choices):
                for head in self._heads(template, characters):
                    if seen.setdefault(head, index) != index:
                        raise ValueError(f"<{rule}>: two alternatives can begin with {head!r}")
            for head, index in seen.items():
                for end in range(len(head)):
                    if seen.get(head[:end], index) != index:
                        raise ValueError(f"<{rule}>: {head[:end]!r} is one alternative and begins another ({head!r})")

    def _heads(self, template: list[dict], characters: int) -> set[str]:
        """The first so many characters of all that the template can become; {x} may be any of its values here."""
        heads = {""}
        for part in template:
            if part["rule"]:
                pieces = set().union(*(self._heads(inner, characters) for _, inner in self.rules[part["rule"]]))
            elif part["text"]:
                pieces = {part["text"]}
            else:
                pieces = {self._shown(value, part["attribute"]) for _, value in self._values(part["recall"])}
            heads = {h if len(h) >= characters else (h + piece)[:characters] for h in heads for piece in pieces}
            if all(len(h) >= characters for h in heads):
                break
        return heads

"""What the fuzzers share: a wrong outcome, damage, and the demand that a refusal names what it is about.

Each module has functions `subject(folder) -> case`, and each case is `case(draw) -> outcome`, a word for the table such
as "right" or "refused". A case raises Wrong where the result is not that of an independent path, or a refusal says
nothing; any other exception that it lets through is a crash. `draw` is a random.Random: the same one, the same case.
"""

from __future__ import annotations

from random import Random


class Wrong(Exception):
    """An outcome that must not be."""


def demand(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def refusal(error: BaseException, *words: str) -> str:
    """ "refused", if the message has several words of its own and one of `words` among them."""
    text = str(error)
    demand(len(text.split()) >= 4, f"{type(error).__name__} without a message: {text!r}")
    demand(not words or any(word in text for word in words), f"{type(error).__name__} names none of {words}: {text!r}")
    return "refused"


def damaged(draw: Random, data: bytes) -> bytes:
    """Some bits flipped, a piece overwritten, cut out, put in twice or filled with zeros, or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if not changed:
            break
        kind, a = draw.randrange(7), draw.randrange(len(changed))
        b = min(len(changed), a + draw.choice((1, 2, 8, 100)))
        if kind <= 1:
            changed[a] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[a:b] = draw.randbytes(b - a)
        elif kind == 3:
            del changed[a:b]
        elif kind == 4:
            changed[a:a] = changed[a:b]
        elif kind == 5:
            changed[a:b] = bytes(b - a)
        else:
            del changed[a:]
    return bytes(changed)

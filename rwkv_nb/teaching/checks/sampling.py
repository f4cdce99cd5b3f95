"""Checks of notebook 08: top-p, the cutoff that was greedy, penalties, temperature, what may be shown before a stop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rwkv_nb.teaching.checks import exercise, require


def _chances(found: object, like: Tensor, where: str) -> Tensor:
    require(isinstance(found, Tensor), f"{where} return a tensor, yours is {type(found).__name__}.")
    require(found.shape == like.shape, f"{where} return a number for each token, {tuple(like.shape)}, "
                                       f"yours has shape {tuple(found.shape)}.")  # fmt: skip
    require(not bool(found.isnan().any()), f"{where} there is a NaN. Did you divide zero by zero?")
    return found.double()


def rounds_below_one() -> Tensor:
    """Probabilities in float32 that are as good as they can be, and whose running sum still ends below 1."""
    for seed in range(1000):
        p = torch.softmax(torch.randn(20_000, generator=torch.Generator().manual_seed(seed)), dim=0)
        if float(np.cumsum(p.sort(descending=True).values.numpy())[-1]) < 1 - 1e-7:
            return p
    raise RuntimeError("no such probabilities were found: this processor rounds in an unusual way")


@exercise("8.1", "Top-p", minutes=10, difficulty=2)
def top_p(answer):
    """answer(p (V,), top_p) -> probabilities (V,), zero for what was cut, sum 1."""
    p = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64)

    def run(p: Tensor, limit: float) -> list[int]:
        kept = p.clone()
        found = _chances(answer(p, limit), p, f"For top_p = {limit}")
        require(torch.equal(p, kept), "Your function changed its argument. Work on a copy.")
        ids = torch.nonzero(found).flatten().tolist()
        require(bool(ids), f"With top_p = {limit} nothing is left. The likeliest token always stays.")
        require(abs(float(found.sum()) - 1) < 1e-6, "What is left should have the sum 1 again: divide by its sum.")
        return ids

    ids = run(p, 0.6)
    require(ids not in ([0, 1], [0]), "You kept places of the sorted list. Chances go back to the ids they came from.")
    require(ids != [1], "You stopped before the token that crosses the line. It stays: 0.5 does not reach 0.6, "
                        "0.5 + 0.3 does.")  # fmt: skip
    require(ids == [1, 3], f"Of 0.05, 0.5, 0.15, 0.3 top_p = 0.6 should keep the tokens 1 and 3, yours keeps {ids}. "
                           "Go from the likeliest down until their sum reaches it.")  # fmt: skip
    right = torch.tensor([0.0, 0.5, 0.0, 0.3], dtype=torch.float64) / 0.8
    require(torch.allclose(answer(p, 0.6).double(), right, atol=1e-6), "What is left should keep its proportions.")
    require(run(p, 0.9) == [1, 2, 3], "For top_p = 0.9 three tokens are needed: 0.5 + 0.3 + 0.15.")
    require(run(p, 0.5) == [1], "0.5 alone reaches 0.5: reached is enough, it need not be passed.")
    require(run(p, 0.0) == [1], "top_p = 0 should leave the likeliest token alone.")
    same = torch.full((8,), 0.125, dtype=torch.float64)
    ids = run(same, 0.5)
    require(len(ids) == 4, f"Of eight equal tokens top_p = 0.5 should keep four, yours keeps {len(ids)}. Did you cut "
                           "by the value of the last one? All equal ones have that value.")  # fmt: skip
    require(ids == [0, 1, 2, 3], f"Of equal tokens those with lower ids stay, yours are {ids}: sort with stable=True.")
    small = rounds_below_one()
    require(len(run(small, 1.0)) == len(small), "top_p = 1 should keep every token. In float32 the running sum of "
                                                "these 20,000 ends just below 1.")  # fmt: skip
    return "the token that crosses the line stays, and top_p = 1 keeps all."


@exercise("8.2", "Why top_p = 1 was greedy", minutes=8, difficulty=3)
def cutoff(answer):
    """answer(ordered (V,) NumPy float32, largest first, top_p) -> how many of them stay."""
    ordered = np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32)

    def run(ordered: np.ndarray, limit: float) -> int:
        found = answer(ordered.copy(), limit)
        require(isinstance(found, (int, np.integer)) and not isinstance(found, bool),
                f"Return a whole number, how many stay; yours is {type(found).__name__}.")
        return int(found)

    require(run(ordered, 0.7) != 1, "One too few: an index counts from 0, a number of tokens from 1.")
    require(run(ordered, 0.7) == 2, f"0.5 + 0.25 reach 0.7, so two stay; yours says {run(ordered, 0.7)}.")
    require(run(ordered, 0.75) == 2, "0.5 + 0.25 reach 0.75 exactly: two stay.")
    require(run(ordered, 0.0) == 1, "top_p = 0 leaves the likeliest token: one.")
    require(run(ordered, 1.0) == 4, "Here the sum is exactly 1: top_p = 1 keeps all four.")
    small = rounds_below_one().sort(descending=True).values.numpy()
    found = run(small, 1.0)
    require(found != 1, "That is the package's own slip. The float32 sum ends below 1, so no entry of `sums >= top_p` "
                        "is True, and argmax of nothing but False is 0: one token stays.")  # fmt: skip
    require(found <= len(small), f"More than there are: {found:,} of {len(small):,}. If the sum never reaches top_p, "
                                 "all stay.")  # fmt: skip
    require(found == len(small), f"top_p = 1 should keep all {len(small):,}, yours keeps {found:,}.")
    almost = float(np.cumsum(small)[-1]) / 2 + 0.5  # below 1, and above what the sum reaches
    require(run(small, almost) == len(small), "You mended top_p = 1 alone. The sum can end below 0.9999999 too: ask "
                                              "whether it is reached at all.")  # fmt: skip
    return "argmax answers even when there is nothing to find; ask first."


@exercise("8.3", "Penalties over time", minutes=10, difficulty=3)
def penalties(answer):
    """answer(tokens, not_counted, presence, frequency, decay) -> {token: what its logit loses at the next draw}."""

    def run(tokens: list[int], presence: float, frequency: float, decay: float, not_counted=frozenset()) -> dict:
        found = answer(list(tokens), set(not_counted), presence, frequency, decay)
        require(isinstance(found, dict), f"Return a dictionary, token -> penalty; yours is {type(found).__name__}.")
        unseen = [t for t, value in found.items() if t not in tokens and value]
        require(not unseen, f"Token {unseen[0] if unseen else 0} was never drawn and has a penalty.")
        return {t: float(found.get(t, 0.0)) for t in tokens}

    def near(found: dict, **right: float) -> bool:
        return all(abs(found[int(t[1:])] - value) < 1e-9 for t, value in right.items())

    require(run([], 0.5, 0.25, 1.0) == {}, "Before anything was drawn nothing has a penalty.")
    once = run([7], 0.5, 0.25, 1.0)
    require(near(once, t7=0.75), f"A token drawn once loses presence + frequency = 0.5 + 0.25; yours loses {once[7]}.")
    twice = run([7, 7], 0.5, 0.25, 1.0)
    require(not near(twice, t7=1.5), "The presence penalty counts once, however often the token was drawn.")
    require(near(twice, t7=1.0), f"Drawn twice: 0.5 + 2 * 0.25; yours loses {twice[7]}.")
    faded = run([7], 0.0, 1.0, 0.5)
    require(not near(faded, t7=0.5), "The newest token counts in full: first everything decays, then it is added.")
    faded = run([7, 8, 9], 0.0, 1.0, 0.5)
    require(not near(faded, t7=1.0), "Counts decay at every step, also when another token is drawn.")
    require(near(faded, t7=0.25, t8=0.5, t9=1.0), f"With decay 0.5 tokens 7, 8, 9 count 0.25, 0.5, 1; yours: {faded}.")
    again = run([7, 8, 7], 0.0, 1.0, 0.5)
    require(near(again, t7=1.25, t8=0.5), "Drawn again, a token keeps what is left of its count, 0.25, and gains 1.")
    lasting = run([7, 8], 1.0, 0.0, 0.5)
    require(near(lasting, t7=1.0), "The presence penalty does not decay, the count does.")
    free = run([3, 3, 8], 0.5, 1.0, 1.0, {3})
    require(not near(free, t3=0.0), "A digit or a blank gains no count, but it was drawn: it has the presence penalty.")
    require(near(free, t3=0.5, t8=1.5), f"Token 3 is not counted, so it loses 0.5 alone; yours loses {free[3]}.")
    return "presence stays, frequency fades, digits and blanks repeat freely."


@exercise("8.4", "A temperature that survives zero", minutes=8, difficulty=3)
def temperature(answer):
    """answer(p (V,) float64, T) -> probabilities p^(1/T) with the sum 1; T = 0: the likeliest alone."""
    p = torch.tensor([0.1, 0.6, 0.3, 0.0], dtype=torch.float64)

    def run(p: Tensor, T: float) -> Tensor:
        kept = p.clone()
        found = _chances(answer(p, T), p, f"With T = {T:g}")
        require(torch.equal(p, kept), "Your function changed its argument.")
        return found

    def near(found: Tensor, right: Tensor) -> bool:
        return torch.allclose(found, right / right.sum(), atol=1e-9)

    one = run(p, 1.0)
    require(not near(one, torch.softmax(p, 0)), "Softmax takes logits, and these are probabilities already. Their "
                                                "logarithms can serve as logits.")  # fmt: skip
    require(near(one, p), "T = 1 should change nothing.")
    half = run(p, 0.5)
    require(not near(half, p.sqrt()), "The other way round: below 1 a temperature sharpens. The power is 1 / T.")
    require(abs(float(half.sum()) - 1) < 1e-9, "The sum should be 1 again.")
    require(near(half, p**2), "T = 0.5 means p to the power 2.")
    require(float(run(p, 2.0)[3]) == 0, "What was cut stays cut: a chance of 0 is 0 at every temperature.")
    require(near(run(p, 2.0), p.sqrt()), "T = 2 means the square root.")
    for T in (1e-2, 1e-4, 1e-300):
        small = torch.full((1000,), 1e-3, dtype=torch.float64)
        small[5] += 1e-4
        found = run(small / small.sum(), T)
        require(abs(float(found.sum()) - 1) < 1e-6, f"With T = {T:g} the sum is {float(found.sum()):g}. Divide by the "
                "largest chance before you take the power: then one of them is 1, and stays 1.")
        require(int(found.argmax()) == 5, f"With T = {T:g} the likeliest token should win.")
    cold = run(p, 0.0)
    require(near(cold, torch.tensor([0.0, 1.0, 0.0, 0.0]).double()), "T = 0 leaves the likeliest token alone.")
    tie = run(torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64), 0.0)
    require(near(tie, torch.tensor([0.0, 1.0, 0.0]).double()), "Two likeliest at T = 0: the lower id wins, alone.")
    return "one of them is 1 before the power, so nothing can vanish."


@exercise("8.5", "What may be shown", minutes=8, difficulty=3)
def may_show(answer):
    """answer(text, stop) -> how many characters of the text may be shown while more may come."""

    def run(text: str, stop: str) -> int:
        found = answer(text, stop)
        require(isinstance(found, int) and not isinstance(found, bool),
                f"Return a whole number of characters, yours is {type(found).__name__}.")
        return found

    where = "For the text {!r} and the stop {!r} "
    require(run("cat", "User:") == 3, "Nothing of the stop text is in sight: show everything.")
    found = run("cat\nUser: hi", "\nUser:")
    require(found != len("cat\nUser: hi"), "The stop text is there, and you show it.")
    require(found != len("cat\nUser:"), "You show the stop text itself. Show what stands before it.")
    require(found == 3, where.format("cat\nUser: hi", "\nUser:") + f"3 characters may be shown, yours says {found}.")
    require(run("a|b|c", "|") == 1, "The stop text is there twice: the first counts.")
    found = run("cat\nUs", "\nUser:")
    require(found != 6, "The end of the text may be the beginning of the stop text: hold it back until the next token "
                        "tells.")  # fmt: skip
    require(found == 3, where.format("cat\nUs", "\nUser:") + f"3 may be shown, yours says {found}.")
    require(run("\nUs", "\nUser:") == 0, "The whole text may be the beginning of the stop text: show nothing yet.")
    found = run("aab", "abc")
    require(found == 1, where.format("aab", "abc") + f"1 may be shown (then \"ab\" waits), yours says {found}.")
    require(run("xaa", "aaa") == 1, "Hold back the longest piece that fits: two letters here, not one.")
    require(run("Use cats", "User") == 8, "A beginning of the stop text in the middle went on differently: show it.")
    require(run("", "x") == 0, "Of an empty text nothing is shown.")
    return "never the stop text, never its beginning, and no character lost."

"""Checks of notebook 04: half-lives, one step of the recurrence, the T x T weights, a text in two halves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkv_nb.teaching.checks import exercise, require
from rwkv_nb.wkv import wkv5, wkv5_reference


def _draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _near(found: Tensor, right: Tensor) -> bool:
    return torch.allclose(found.double(), right.double(), rtol=1e-6, atol=1e-9)


def _number(function, argument: float, call: str) -> float:
    through = "Do you go through d? For extreme w it rounds to 1 or 0. Its logarithm is simply -exp(w)."
    try:
        value = float(function(argument))
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        require(False, f"{call} raised {type(error).__name__}. {through}")
    require(math.isfinite(value), f"{call} gave {value}. {through}")
    return value


@exercise("4.1", "Half-lives", minutes=8, difficulty=2)
def half_lives(half_life, raw_decay):
    """half_life(w) -> steps until a pair has faded to a half; raw_decay(steps) -> w."""

    def steps(w: float) -> float:
        return _number(half_life, w, f"half_life({w:g})")

    def is_(found: float, value: float) -> bool:
        return abs(found - value) < 1e-6 * abs(value)

    found, ln2 = steps(0.0), math.log(2)  # w = 0: d = 1/e, and the answer is ln 2
    require(not is_(found, 1),
            "half_life(0) gave 1: the time until 1/e is left, not a half. Or is one of your logarithms to base 2?")
    require(not is_(found, -ln2), "half_life(0) is negative: ln(1/2) and ln d both are. Did one of them lose its sign?")
    require(not is_(found, ln2 * math.e),
            "You divided by d. d^h = 1/2 gives h = ln(1/2) / ln d: divide by the logarithm of d.")
    require(is_(found, ln2), f"half_life(0) should be ln 2 = {ln2:.4f}, since there d = 1/e. Yours is {found:.4f}.")
    require(steps(-2.0) > steps(0.0), "A smaller w must give a longer half-life: exp(w) is how fast a row fades.")
    right = ln2 * math.exp(3)
    require(is_(steps(-3.0), right),
            f"half_life(0) is right, but half_life(-3) is {steps(-3.0):.4f} in place of {right:.4f}. Is the inner "
            "exponential there? ln d = -exp(w).")
    for w in (-40.0, 8.0):
        found, right = steps(w), ln2 * math.exp(-w)
        require(is_(found, right),
                f"half_life({w:g}) gave {found:g}, the truth is {right:.4g}. Do you go through d? There it rounds to 1 "
                "or 0. Its logarithm is simply -exp(w).")
    for h in (7.0, 1000.0, 1.0, 0.5):
        w = _number(raw_decay, h, f"raw_decay({h:g})")
        require(not is_(w, math.log(h / ln2)),
                f"raw_decay({h:g}) gave {w:.4f}: the sign is wrong. Solve h = ln 2 / exp(w) for w.")
        right = math.log(ln2 / h)
        require(abs(w - right) < 1e-6,
                f"raw_decay({h:g}) gave {w:.4f}. It should undo half_life: half_life({right:.4f}) is {h:g}.")
    return "from steps to w and back."


@exercise("4.2", "One step", minutes=10, difficulty=2)
def step(answer):
    """answer(r, k, v, w, u, S) -> (y (N,), next state (N, N)), all of one head."""
    N = 4
    r, k, v, w, u = _draw(*[(N,)] * 5)
    [S] = _draw((N, N), seed=1)
    nothing, empty, d = torch.zeros_like(r), torch.zeros_like(S), torch.exp(-torch.exp(w))
    kv = torch.outer(k, v)

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        kept = args[-1].clone()
        pair = answer(*args)
        require(isinstance(pair, tuple) and len(pair) == 2, "Return two things: y and the next state.")
        require(torch.equal(args[-1], kept),
                "Your function changed the state it was given: S *= and S += work in place, S = d * S + … does not.")
        for name, x, shape in (("y", pair[0], (N,)), ("The next state", pair[1], (N, N))):
            require(tuple(x.shape) == shape, f"{name} should have shape {shape}, yours has {tuple(x.shape)}.")
        return pair

    y, after = run(r, nothing, nothing, w, u, S)
    where = "With k = v = 0 (nothing new):"
    require(not _near(y, S @ r), f"{where} y[i] sums over the keys j, the rows of S. You summed over the columns.")
    require(not _near(y, r @ (d[:, None] * S)), f"{where} you decay the state before you read it. Reading comes first.")
    require(_near(y, r @ S), f"{where} y should be r @ S.")
    require(not _near(after, S), f"{where} the state does not fade. Multiply each row by its decay.")
    require(not _near(after, d * S), f"{where} you decay the columns. d belongs to the keys, the rows: d[:, None] * S.")
    for wrong, hint in ((torch.exp(-w), "exp(-w)"), (torch.exp(w), "exp(w)"), (w, "w itself")):
        require(not _near(after, wrong[:, None] * S), f"{where} you decay by {hint}. The decay is exp(-exp(w)).")
    require(_near(after, d[:, None] * S), f"{where} the next state should be S with row j multiplied by d[j].")

    y, after = run(r, k, v, w, u, empty)
    where = "With S = 0 (an empty memory):"
    require(not _near(after, kv.T), f"{where} the pair is stored as [value, key]. Rows are keys: outer(k, v).")
    require(not _near(after, u[:, None] * kv), f"{where} you store the bonus too. u is for reading only.")
    require(not _near(after, d[:, None] * kv), f"{where} the new pair has faded already. Decay first, then add.")
    require(_near(after, kv), f"{where} the next state should be the outer product of k and v.")
    require(not _near(y, nothing), f"{where} y is zero: it does not see the present pair. Where is the bonus u?")
    require(not _near(y, r @ kv), f"{where} the present pair is read with weight 1. Its weight is u[j].")
    require(not _near(y, r @ (u * kv)), f"{where} u multiplies the value channels. It belongs to the keys, the rows.")
    require(_near(y, r @ (u[:, None] * kv)), f"{where} y should be (sum over j of r[j] u[j] k[j]) times v.")

    y, after = run(r, k, v, w, u, S)
    right, last = wkv5_reference(*(x.view(1, 1, 1, N) for x in (r, k, v)), w[None], u[None], S[None, None])
    require(_near(y, right.flatten()) and _near(after, last[0, 0]),
            "Each part alone is right, but not their sum: y reads the old state and the new pair together.")
    return "that is all there is to the recurrence."


@exercise("4.3", "The weights of all pairs", minutes=15, difficulty=3)
def weights(answer):
    """answer(r, k, w, u) -> A (T, T) with y = A @ v."""
    T, N = 6, 3
    r, k = _draw((T, N), (T, N), seed=2)
    w, u = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0, 0.0, 0.7], [0.5, 2.0, -1.0]))

    def truth(r: Tensor, k: Tensor, w: Tensor) -> Tensor:  # by the loop: with the unit matrix as values, y is A itself
        d, S, rows = torch.exp(-torch.exp(w)), r.new_zeros(N, len(r)), []
        for t, v in enumerate(torch.eye(len(r), dtype=r.dtype)):
            rows.append(r[t] @ (S + torch.outer(u * k[t], v)))
            S = d[:, None] * S + torch.outer(k[t], v)
        return torch.stack(rows)

    A, right = answer(r, k, w, u), truth(r, k, w)
    require(isinstance(A, Tensor) and tuple(A.shape) == (T, T), f"A should be a tensor of shape ({T}, {T}).")
    require(not _near(A, right.T), "Your matrix is transposed: row t reads, column s is read.")
    require(_near(A.triu(1), torch.zeros(T, T)), "Above the diagonal belong zeros: step t cannot read the future.")
    diagonal = A.diagonal()
    require(not _near(diagonal, (r * k).sum(-1)), "The diagonal is r_t · k_t: the bonus u[j] is missing in it.")
    require(not _near(diagonal, torch.zeros(T)), "The diagonal is empty. Step t reads its own pair too, by u.")
    require(_near(diagonal, (r * u * k).sum(-1)), "A[t, t] should be the sum of r_t[j] u[j] k_t[j], without decay.")
    first, d = A.diagonal(-1), torch.exp(-torch.exp(w))
    require(not _near(first, (r[1:] * d * k[:-1]).sum(-1)),
            "A[t, t-1] has faded once already. The exponent is t - 1 - s: the next step reads a pair at full weight.")
    require(not _near(A.tril(-1), (r @ k.T).tril(-1)), "Below the diagonal nothing fades: where is d^(t-1-s)?")
    require(_near(first, (r[1:] * k[:-1]).sum(-1)), "A[t, t-1] should be the plain product r_t · k_(t-1).")
    require(_near(A, right),
            "Pairs of neighbours are right, those further apart are not. Each key channel j fades at its own rate, "
            "inside the sum over j.")
    r, k = _draw((300, N), (300, N), seed=3)
    strong = torch.tensor([-9.0, 0.0, 2.0], dtype=torch.float64)
    A = answer(r, k, strong, u)
    require(bool(torch.isfinite(A).all()),
            "With T = 300 and strong decay there are infinities or NaNs. Did you split the power in d^t and d^-s, or "
            "mask too late? d^-s overflows. Keep every exponent at 0 or above.")
    require(_near(A, truth(r, k, strong)),
            "Right for 6 steps, wrong for 300 with strong decay. Is an exponent negative, or a power cut off?")
    return "attention weights, without a softmax."


@exercise("4.4", "A text in two halves", minutes=8, difficulty=2)
def two_halves(answer):
    """answer(run, r, k, v, w, u, cut) -> (y, state); run is wkv5."""
    B, T, H, N = 2, 7, 2, 4
    r, k, v, w, u = _draw(*[(B, T, H, N)] * 3, (H, N), (H, N), seed=4)
    lengths: list[int] = []

    def run(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, **_) -> tuple:
        require(all(x.is_contiguous() for x in (r, k, v)),
                "A slice such as r[:, :cut] is a view with gaps, and wkv5 refuses those. Add .contiguous().")
        lengths.append(r.shape[1])
        return wkv5(r, k, v, w, u, state, backend="reference")

    right, last = wkv5(r, k, v, w, u, backend="reference")
    for cut in (3, 6):
        lengths.clear()
        pair = answer(run, r, k, v, w, u, cut)
        require(isinstance(pair, tuple) and len(pair) == 2, "Return two things: y of all steps, and the last state.")
        y, state = pair
        require(lengths != [T], "You ran the whole text at once. Pretend that the second half has not arrived yet.")
        require(lengths == [cut, T - cut],
                f"{T} steps, cut = {cut}: run was called with {lengths} steps, expected {[cut, T - cut]}.")
        require(tuple(y.shape) == (B, T, H, N),
                f"y should have shape {(B, T, H, N)}, yours has {tuple(y.shape)}: join the halves along time, dim=1.")
        require(_near(y[:, :cut], right[:, :cut]), "The first half of y is wrong. Are the halves in order?")
        fresh, _ = wkv5(*(x[:, cut:].contiguous() for x in (r, k, v)), w, u, backend="reference")
        require(not _near(y[:, cut:], fresh),
                "The second half starts with an empty memory: hand it the state of the first.")
        require(_near(y[:, cut:], right[:, cut:]), "The second half of y is wrong. Which state did it start from?")
        require(_near(state, last), "y is right, but the state is not that after the last step. Which call is it from?")
    return "the state is all that a recurrent model needs of its past."

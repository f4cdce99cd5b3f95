"""Checks of the exercises in notebook 07: clipping, the cosine with warm-up, groups, steps, L2Wrap's gradient."""

from __future__ import annotations

import math

import numpy as np

from rwkv_nb.teaching.checks import exercise, require


def _norm(arrays: list) -> float:
    return math.sqrt(sum(float((np.asarray(a, dtype=float) ** 2).sum()) for a in arrays))


@exercise("7.1", "Clip by the norm", minutes=8, difficulty=2)
def clip(answer) -> str:
    """answer(gradients, limit): the arrays, all scaled by one factor so that their common norm is at most limit."""
    one = np.array([3.0, 4.0])
    got = answer([one.copy()], 1.0)
    require(isinstance(got, list | tuple) and len(got) == 1, "Return a list with as many arrays as you were given.")
    got = np.asarray(got[0], dtype=float)
    require(not np.allclose(got, np.clip(one, -1, 1)), "You clip each number by itself: that turns the gradient.")
    require(not np.allclose(got, one / 25), "Is a square root missing? The norm of (3, 4) is 5.")
    require(np.allclose(got, one / 5), f"(3, 4) has the norm 5, so a limit of 1 makes it (0.6, 0.8); yours: {got}.")
    small = [np.array([0.3]), np.array([[0.4]])]
    kept = answer([a.copy() for a in small], 1.0)
    require(
        all(np.allclose(a, b) for a, b in zip(kept, small, strict=True)),
        "A gradient that is short enough must stay as it is: yours makes it longer or shorter.",
    )
    parts = [np.array([6.0, 0.0]), np.array([[0.0], [8.0]])]
    given = [a.copy() for a in parts]
    got = [np.asarray(a, dtype=float) for a in answer(given, 5.0)]
    require(
        not all(np.isclose(_norm([a]), 5.0) for a in got),
        "You clip each array by itself. There is one norm, of all parameters together.",
    )
    require(np.isclose(_norm(got), 5.0), f"The norm of all arrays together should become 5; yours is {_norm(got):.3f}.")
    require(
        all(np.allclose(a, b / 2) for a, b in zip(got, parts, strict=True)),
        "All arrays need the same factor, here 1/2.",
    )
    with np.errstate(all="ignore"):
        try:
            nothing = np.asarray(answer([np.zeros(2)], 1.0)[0], dtype=float)
        except ZeroDivisionError:
            nothing = np.full(2, np.nan)
    require(bool((nothing == 0).all()), "A gradient of zeros has the norm 0: do not divide by it, leave it as it is.")
    return "the direction stays, only the length is limited."


def _lr(step: int, steps: int, warmup: int, first: float, last: float) -> float:
    """The official rate, written once more: half a cosine from first to last, times the warm-up of recipe head."""
    done = min(1.0, max(0.0, (step - warmup) / (steps - warmup)))
    rate = last + (first - last) * math.cos(math.pi * done / 2) ** 2  # (1 + cos x) / 2 = cos²(x / 2)
    return rate * (0.01 + 0.99 * step / warmup) if step < warmup else rate


@exercise("7.2", "The cosine with warm-up", minutes=12, difficulty=3)
def cosine(answer) -> str:
    """answer(step, steps, warmup, lr_init, lr_final) -> learning rate of this step."""

    def close(step, steps, warmup, first, last, want=None):
        want = _lr(step, steps, warmup, first, last) if want is None else want
        return math.isclose(float(answer(step, steps, warmup, first, last)), want, rel_tol=1e-9, abs_tol=1e-15)

    def right(*arguments):
        return close(*arguments)

    require(right(0, 100, 0, 1e-3, 1e-5), "Without warm-up, step 0 has the rate lr_init.")
    require(
        not close(50, 100, 0, 1e-3, 0.0, 1e-3 * math.cos(math.pi / 4)),
        "That is a quarter of a cosine: (1 + cos(pi P)) / 2 goes from 1 to 0.",
    )
    require(not close(25, 100, 0, 1e-3, 1e-5, 1e-3 - 0.25 * (1e-3 - 1e-5)), "That is a straight line, not a cosine.")
    require(
        right(50, 100, 0, 1e-3, 1e-5), "Half-way the rate is the mean of lr_init and lr_final: where does it end?"
    )
    require(right(100, 100, 0, 1e-3, 1e-5), "At the end the rate is lr_final.")
    require(right(130, 100, 0, 1e-3, 1e-5), "Past the end the rate stays at lr_final: limit P to 1.")
    first = float(answer(0, 100, 10, 1e-3, 1e-5))
    require(first > 0, "A rate of 0 wastes the first step: the warm-up begins at a hundredth, 0.01.")
    require(
        not math.isclose(first, 0.2e-3, rel_tol=1e-6), "0.2 is the warm-up of recipe seed; today's begins at 0.01."
    )
    require(right(0, 100, 10, 1e-3, 1e-5), f"The first step of a warm-up has lr_init * 0.01; yours gives {first:.3g}.")
    require(right(40, 100, 10, 1e-3, 1e-5), "P counts from the end of the warm-up: (step - warmup) / (steps - warmup).")
    require(right(5, 100, 10, 1e-3, 1e-5), "In the warm-up the factor grows evenly: 0.01 + 0.99 * step / warmup.")
    require(right(10, 100, 10, 1e-3, 1e-5), "When the warm-up ends the rate is lr_init.")
    return "this is what the official trainer does with my_exit_tokens."


@exercise("7.3", "Which group?", minutes=8, difficulty=2)
def groups(answer) -> str:
    """answer(name, shape, weight_decay): "1x", "2x" or "decay", in stage 3 with recipe head and layerwise_lr 1."""

    def says(name: str, shape: tuple, decay: float, want: str, message: str) -> None:
        got = answer(name, shape, decay)
        require(got in ("1x", "2x", "decay"), f'Return "1x", "2x" or "decay"; yours gave {got!r} for {name}.')
        require(got == want, f"{name} {shape}, weight_decay {decay}: {message}")

    says("blocks.0.att.time_decay", (2, 64), 0.0, "2x", "the decay of the memory learns twice as fast.")
    says("blocks.0.att.time_decay", (2, 64), 0.1, "2x", "it has two dimensions, but the time_* names come first.")
    says("blocks.0.att.time_mix_k", (1, 1, 128), 0.1, "1x", "three dimensions, but two of them are 1: no matrix.")
    says("blocks.0.att.time_faaaa", (2, 64), 0.1, "1x", "a matrix by its shape, yet no .weight: it is never decayed.")
    says("blocks.0.att.key.weight", (128, 128), 0.0, "1x", "without weight decay there is no such group.")
    says("blocks.0.att.key.weight", (128, 128), 0.1, "decay", "a matrix with .weight in its name.")
    says("blocks.0.ln1.weight", (128,), 0.1, "1x", "a .weight, but a vector: norms are not decayed.")
    says("blocks.0.ln1.bias", (128,), 0.1, "1x", "a vector.")
    says("emb.weight", (96, 128), 0.1, "decay", "the embedding is a matrix like any other.")
    return "matrices may be decayed, vectors and the time_* parameters never."


@exercise("7.4", "How many steps?", minutes=6, difficulty=2)
def steps(answer) -> str:
    """answer(tokens, ctx_len, micro_bsz, devices, num_nodes, accumulate) -> optimizer steps that see all tokens."""
    got = answer(4096, 512, 8, 1, 1, 1)
    require(not isinstance(got, bool) and int(got) == got, f"Steps are whole numbers; yours gave {got!r}.")
    require(got != 4096 // 8, "A sample has ctx_len tokens: a step sees micro_bsz * ctx_len of them.")
    require(got == 1, f"8 windows of 512 tokens are 4096 tokens: one step; yours says {got}.")
    require(answer(4096 * 6, 512, 8, 3, 1, 1) == 2, "Every device has its own batch: 3 devices see 3 times as much.")
    require(answer(4096 * 6, 512, 8, 1, 3, 1) == 2, "Did you forget num_nodes? Each node has `devices` devices.")
    require(answer(4096 * 6, 512, 8, 1, 1, 3) == 2, "With accumulation, 3 batches make one step, not 3 steps.")
    require(answer(4097, 512, 8, 1, 1, 1) == 2, "A token is left after the last full step: one more. Round up.")
    want = -(-1498226207 // (512 * 16))  # minipile, as the demo script trains on it: exact beyond what floats hold
    require(answer(1498226207, 512, 16, 1, 1, 1) == want, f"minipile at ctx_len 512, micro_bsz 16: {want} steps.")
    return "my_exit_tokens ends a run before the first step that has nothing new to see."


@exercise("7.5", "The gradient with L2Wrap", minutes=12, difficulty=4)
def l2wrap_gradient(answer) -> str:
    """answer(logits, targets): gradient (n, V) of the mean cross entropy of n positions, L2Wrap included."""
    rng = np.random.default_rng(7)
    n, V = 5, 7
    logits, targets = rng.normal(size=(n, V)) * 40 + 60, rng.integers(0, V, size=n)
    kept = logits.copy()
    got = np.asarray(answer(logits, targets), dtype=float)
    require(np.array_equal(logits, kept), "Your function changed the logits that it was given: work on a copy.")
    require(got.shape == (n, V), f"The gradient has the shape of the logits, {(n, V)}; yours has {got.shape}.")
    require(bool(np.isfinite(got).all()), "exp of a large logit overflows: subtract the largest of each row first.")

    step = 1e-4  # the truth by another way: differences of the loss whose gradient this is

    def loss(x):
        top = x.max(axis=1)
        logsum = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
        return (logsum - x[np.arange(n), targets]).mean(), 0.5e-4 * (top**2).mean()

    def differences(part):
        g = np.zeros((n, V))
        for i in range(n):
            for j in range(V):
                up, down = logits.copy(), logits.copy()
                up[i, j] += step
                down[i, j] -= step
                g[i, j] = (loss(up)[part] - loss(down)[part]) / (2 * step)
        return g

    plain, pull = differences(0), differences(1)

    def is_near(a):
        return np.allclose(got, a, atol=2e-7)

    require(not is_near(plain + pull * n) and not is_near(plain * n + pull * n),
            "It is the mean over the positions: divide both parts by n.")
    require(not is_near(plain), "That is cross entropy alone: where does the largest logit come in?")
    require(not is_near(plain - pull), "The sign of the pull: subtracting the gradient must make the logit smaller.")
    require(not is_near(plain + (np.abs(pull) > 0) * 1e-4 / n), "The pull is 1e-4 times the largest logit, not 1e-4.")
    require(not is_near(plain + 1e-4 / n * logits), "Only the largest logit of each position is pulled, not all.")
    require(is_near(plain + pull), "Softmax minus 1 at the target, over n; then add 1e-4 m / n at the largest logit m.")
    return "the value of the loss stays plain cross entropy; only its gradient has the extra term."

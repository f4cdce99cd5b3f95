"""Notebook 07: each check accepts the notebook's own solution and rejects plausible wrong answers by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from notebook_solutions import solution

from rwkv_nb.model.loss import l2wrap_cross_entropy
from rwkv_nb.teaching.checks import training as check

NOTEBOOK = "07_training"
CHECKS = {"7.1": (check.clip, "clipped"), "7.2": (check.cosine, "rate"), "7.3": (check.groups, "group"),
          "7.4": (check.steps, "steps"), "7.5": (check.l2wrap_gradient, "gradient")}  # fmt: skip


def unwritten(*args):
    raise NotImplementedError("your turn")


@pytest.mark.parametrize("number", CHECKS)
def test_solution_is_right_and_stub_is_open(number):
    verify, name = CHECKS[number]
    assert verify(solution(NOTEBOOK, number)[name]).ok
    assert verify(unwritten).state == "open"


def clip(gradients, limit, root=True, always=False, each=False):
    def norm(arrays):
        squares = sum(float((a**2).sum()) for a in arrays)
        return math.sqrt(squares) if root else squares

    if each:
        return [clip([a], limit)[0] for a in gradients]
    factor = limit / (norm(gradients) or 1.0)
    return [a * (factor if always else min(1.0, factor)) for a in gradients]


def rate(step, steps, warmup, first, last, start=0.01, shape=None, late=True, limit=True):
    done = (step - warmup) / (steps - warmup) if late else step / steps
    done = max(0.0, min(1.0, done)) if limit else max(0.0, done)
    shape = shape or (lambda p: (1 + math.cos(math.pi * p)) / 2)
    lr = last + (first - last) * shape(done)
    return lr * (start + (1 - start) * step / warmup) if step < warmup else lr


def group(name, shape, decay, squeeze=True, weight=True, time_first=True, two=True):
    if "time_decay" in name and two and (time_first or decay == 0):
        return "2x"
    dims = sum(n > 1 for n in shape) if squeeze else len(shape)
    if decay > 0 and dims >= 2 and (not weight or ".weight" in name):
        return "decay"
    return "1x"


def steps(tokens, ctx_len, micro_bsz, devices, num_nodes, accumulate):
    return -(-tokens // (ctx_len * micro_bsz * devices * num_nodes * accumulate))


def gradient(logits, targets, pull=1e-4, sign=1, mean=True, everywhere=False, constant=False, safe=True):
    x = np.asarray(logits, dtype=float)
    n = len(x)
    e = np.exp(x - (x.max(axis=1, keepdims=True) if safe else 0))
    g = e / e.sum(axis=1, keepdims=True)
    g[np.arange(n), targets] -= 1
    largest = x.max(axis=1)
    if everywhere:
        g += pull * x
    else:
        g[np.arange(n), x.argmax(axis=1)] += sign * pull * (1 if constant else largest)
    return g / n if mean else g


def in_place(logits, targets):
    g = gradient(logits, targets)
    logits -= logits.max()
    return g


WRONG = [
    (check.clip, lambda g, m: [np.clip(a, -m, m) for a in g], "each number"),
    (check.clip, lambda g, m: clip(g, m, root=False), "square root"),
    (check.clip, lambda g, m: clip(g, m, always=True), "short enough"),
    (check.clip, lambda g, m: clip(g, m, each=True), "each array by itself"),
    (check.clip, lambda g, m: g, "(0.6, 0.8)"),
    (check.clip, lambda g, m: clip(g, m)[0], "Return a list"),
    (check.clip, lambda g, m: [a * min(1.0, m / math.sqrt(sum((b**2).sum() for b in g))) for a in g], "zeros"),
    (check.clip, lambda g, m: [a * min(1.0, m / math.sqrt(sum(float((b**2).sum()) for b in g))) for a in g], "zeros"),
    (check.cosine, lambda *a: rate(*a, shape=lambda p: math.cos(math.pi / 2 * p)), "quarter"),
    (check.cosine, lambda *a: rate(*a, shape=lambda p: 1 - p), "straight line"),
    (check.cosine, lambda s, n, w, a, b: rate(s, n, w, a, 0.0), "mean of"),
    (check.cosine, lambda *a: rate(*a, limit=False), "limit P"),
    (check.cosine, lambda *a: rate(*a, start=0.0), "wastes"),
    (check.cosine, lambda *a: rate(*a, start=0.2), "recipe seed"),
    (check.cosine, lambda *a: rate(*a, late=False), "P counts"),
    (check.cosine, lambda s, n, w, a, b: rate(s, n, 0, a, b), "0.01"),
    (check.groups, lambda n, s, d: group(n, s, d, two=False), "twice as fast"),
    (check.groups, lambda n, s, d: group(n, s, d, weight=False, time_first=False), "names come first"),
    (check.groups, lambda n, s, d: group(n, s, d, squeeze=False, weight=False), "two of them are 1"),
    (check.groups, lambda n, s, d: group(n, s, d, weight=False), "no .weight"),
    (check.groups, lambda n, s, d: "decay" if n.endswith(".weight") and d else group(n, s, d), "a vector"),
    (check.groups, lambda n, s, d: "decay" if n.endswith("key.weight") else group(n, s, d), "no such group"),
    (check.groups, lambda n, s, d: 1, "Return"),
    (check.steps, lambda t, c, b, d, n, a: -(-t // b), "ctx_len tokens"),
    (check.steps, lambda t, c, b, d, n, a: steps(t, c, b, 1, n, a), "device"),
    (check.steps, lambda t, c, b, d, n, a: steps(t, c, b, d, 1, a), "num_nodes"),
    (check.steps, lambda t, c, b, d, n, a: steps(t, c, b, d, n, 1), "accumulation"),
    (check.steps, lambda t, c, b, d, n, a: t // (c * b * d * n * a), "Round up"),
    (check.steps, lambda t, c, b, d, n, a: t / (c * b * d * n * a) + 0.5, "whole numbers"),
    (check.l2wrap_gradient, lambda x, t: gradient(x, t, pull=0), "cross entropy alone"),
    (check.l2wrap_gradient, lambda x, t: gradient(x, t, sign=-1), "sign"),
    (check.l2wrap_gradient, lambda x, t: gradient(x, t, mean=False), "divide both"),
    (check.l2wrap_gradient, lambda x, t: gradient(x, t, everywhere=True), "not all"),
    (check.l2wrap_gradient, lambda x, t: gradient(x, t, constant=True), "not 1e-4"),
    (check.l2wrap_gradient, lambda x, t: gradient(x * 20, t, safe=False), "overflows"),
    (check.l2wrap_gradient, in_place, "changed the logits"),
]


@pytest.mark.parametrize(("verify", "answer", "word"), WRONG)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_wrong_answers_are_named(verify, answer, word):
    verdict = verify(answer)
    assert verdict.state == "wrong" and word in verdict.message


def test_the_checks_agree_with_the_package():
    from rwkv_nb.training.config import TrainConfig
    from rwkv_nb.training.optimizer import group_of
    from rwkv_nb.training.schedule import learning_rate

    cfg = TrainConfig(ctx_len=8, micro_bsz=2, my_exit_tokens=100 * 16, warmup_steps=10, lr_init=1e-3, lr_final=1e-5)
    assert check.cosine(lambda s, n, w, a, b: _package_rate(cfg, s, n, w, a, b)).ok
    for step in range(101):
        assert math.isclose(check._lr(step, 100, 10, 1e-3, 1e-5), learning_rate(step, cfg), rel_tol=1e-12)
    assert check.groups(lambda n, s, d: group_of(n, torch.empty(s), TrainConfig(weight_decay=d))).ok

    def package(logits, targets):
        x = torch.tensor(logits[None], requires_grad=True)
        l2wrap_cross_entropy(x, torch.tensor(targets[None])).backward()
        return x.grad[0].numpy()

    assert check.l2wrap_gradient(package).ok
    assert check.clip(_torch_clip).ok


def _package_rate(cfg, step, steps, warmup, first, last):
    from rwkv_nb.training.schedule import learning_rate

    cfg = cfg.replace(my_exit_tokens=steps * 16, warmup_steps=warmup, lr_init=first, lr_final=last)
    return learning_rate(step, cfg)


def _torch_clip(gradients, limit):
    parameters = [torch.nn.Parameter(torch.tensor(g)) for g in gradients]
    for p in parameters:
        p.grad = p.detach().clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    return [p.grad.numpy() for p in parameters]

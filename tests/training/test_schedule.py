"""The schedule against the official log, and against the official formulas written down anew."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.schedule import exit_reached, last_step, learning_rate, progress, real_tokens, weight_decay

MINIPILE = TrainConfig(
    my_pile_stage=3, magic_prime=2926181, data_type="binidx", ctx_len=512, micro_bsz=16, my_exit_tokens=1498226207,
    lr_init=6e-4, lr_final=6e-5, warmup_steps=10, weight_decay=0.001, epoch_count=999999,
)  # fmt: skip
README_LOG = [".00059975", ".00059899", ".00059773", ".00059597", ".00059371", ".00059096",
              ".00058771", ".00058399", ".00057978", ".00057511", ".00056999", ".00056441"]  # fmt: skip


def official(step, c):
    """lr and weight decay as the official callback computes them, with its names (accumulation aside)."""
    real_step = step + c.epoch_begin * c.epoch_steps
    if c.lr_final == c.lr_init or c.epoch_count == 0:
        lr = c.lr_init
    else:
        decay_step = real_step - c.my_pile_edecay * c.epoch_steps
        decay_total = (c.epoch_count - c.my_pile_edecay) * c.epoch_steps
        p = min(1, max(0, (decay_step - c.warmup_steps + 1) / (decay_total - c.warmup_steps)))
        if c.lr_final == 0 or c.lr_init == 0:
            lr = c.lr_init + (c.lr_final - c.lr_init) * p
        else:
            lr = c.lr_init * math.exp(math.log(c.lr_final / c.lr_init) * p)
    if c.my_exit_tokens != 0:
        a_step = c.ctx_len * c.real_bsz
        warm = c.warmup_steps * a_step
        p = max(0, min(1, (real_step * a_step - warm) / (abs(c.my_exit_tokens) - warm)))
        q = c.lr_final / c.lr_init
        mult = (0.5 + q / 2) + (0.5 - q / 2) * math.cos(math.pi * p)
        lr = c.lr_init * mult if c.my_exit_tokens > 0 else (lr + c.lr_init * mult) / 2
    if step < c.warmup_steps:
        first = 0.2 if c.recipe == "seed" else 0.01
        lr = lr * (first + (1 - first) * step / c.warmup_steps)
    wd = c.weight_decay
    if c.weight_decay_final > 0:
        wd *= math.exp(math.log(c.weight_decay_final / c.weight_decay) * p)
    return lr, wd


def test_minipile_log_of_the_official_readme():
    for epoch, printed in enumerate(README_LOG):
        lr = learning_rate((epoch + 1) * 2520 - 1, MINIPILE)
        assert f"{lr:.8f}"[1:] == printed


def test_warmup_by_recipe_counts_from_the_restart():
    head, seed = MINIPILE, MINIPILE.replace(recipe="seed")
    assert learning_rate(0, head) == pytest.approx(6e-4 * 0.01, rel=1e-12)
    assert learning_rate(0, seed) == pytest.approx(6e-4 * 0.2, rel=1e-12)
    assert learning_rate(5, seed) == pytest.approx(6e-4 * 0.6, rel=1e-12)
    resumed = seed.replace(epoch_begin=36)
    half = 36 * 2520 * 8192 - 10 * 8192
    full = 6e-5 + 5.4e-4 * (1 + math.cos(math.pi * half / (1498226207 - 10 * 8192))) / 2
    assert learning_rate(0, resumed) == pytest.approx(full * 0.2, rel=1e-12)


def test_exit_is_at_the_official_step():
    assert not exit_reached(182888, MINIPILE)
    assert exit_reached(182889, MINIPILE)
    assert progress(182889, MINIPILE) == 1.0
    assert learning_rate(182889, MINIPILE) == pytest.approx(6e-5, rel=1e-12)
    assert exit_reached(182889 - 2520, MINIPILE.replace(epoch_begin=1))
    assert exit_reached(182889, MINIPILE.replace(my_exit_tokens=-1498226207))
    assert not exit_reached(10**9, MINIPILE.replace(my_exit_tokens=0))
    assert exit_reached(100, MINIPILE.replace(my_exit_tokens=100 * 8192)), "reached exactly is reached"


def test_the_last_step_is_where_the_run_ends():
    assert last_step(MINIPILE) == 182889 and last_step(MINIPILE.replace(epoch_begin=1)) == 182889 - 2520
    assert last_step(MINIPILE.replace(my_exit_tokens=-8192 * 3)) == 3 and last_step(TrainConfig()) is None
    by_epoch = TrainConfig(epoch_steps=12, my_exit=4, epoch_begin=2, accumulate_grad_batches=3)
    assert last_step(by_epoch) == 3 * 4, "mini-epochs 2, 3 and 4"
    assert last_step(by_epoch.replace(my_exit_tokens=10 * by_epoch.tokens_per_step)) == 2, "8 were done before"
    assert last_step(by_epoch.replace(epoch_begin=9)) == 0
    for cfg in (MINIPILE, MINIPILE.replace(epoch_begin=40, accumulate_grad_batches=5)):
        assert exit_reached(last_step(cfg), cfg) and not exit_reached(last_step(cfg) - 1, cfg)


def test_accumulated_batches_count():
    cfg = MINIPILE.replace(accumulate_grad_batches=4)
    assert real_tokens(10, cfg.replace(warmup_steps=0)) == 40 * 8192
    assert real_tokens(0, cfg.replace(epoch_begin=1)) == 40320 * 512
    assert exit_reached(45723, cfg) and not exit_reached(45722, cfg)


@settings(max_examples=150, deadline=None)
@given(
    step=st.integers(0, 3000), epoch_begin=st.integers(0, 20), epoch_count=st.integers(0, 40),
    epoch_steps=st.integers(10, 120), warmup=st.integers(-1, 50), edecay=st.integers(0, 3),
    rates=st.sampled_from([(6e-4, 6e-5), (1e-3, 1e-3), (1e-3, 0.0), (1e-5, 1e-3)]),
    exit_tokens=st.sampled_from([0, 3_000_000, -3_000_000]), recipe=st.sampled_from(["head", "seed"]),
    decays=st.sampled_from([(0.0, -1.0), (0.1, -1.0), (0.1, 0.001)]),
)  # fmt: skip
def test_every_branch_is_the_official_formula(
    step, epoch_begin, epoch_count, epoch_steps, warmup, edecay, rates, exit_tokens, recipe, decays
):
    cfg = TrainConfig(
        epoch_begin=epoch_begin, epoch_count=epoch_count, epoch_steps=epoch_steps, warmup_steps=warmup,
        my_pile_edecay=edecay, lr_init=rates[0], lr_final=rates[1], my_exit_tokens=exit_tokens, recipe=recipe,
        weight_decay=decays[0], weight_decay_final=decays[1], ctx_len=128, micro_bsz=8,
    )  # fmt: skip
    assume((epoch_count - edecay) * epoch_steps > max(warmup, 0))  # else the official code divides by 0
    lr, wd = official(step, cfg) if not (exit_tokens == 0 and rates[0] == rates[1]) else (None, None)
    if lr is None:  # here a weight decay schedule raises in the official code
        cfg = cfg.replace(weight_decay_final=-1.0)
        lr, wd = official(step, cfg)
    assert learning_rate(step, cfg) == pytest.approx(lr, rel=1e-12, abs=1e-18)
    assert weight_decay(step, cfg) == pytest.approx(wd, rel=1e-12)


def test_where_the_official_code_raises():
    constant = TrainConfig(
        lr_init=1e-3, lr_final=1e-3, weight_decay=0.1, weight_decay_final=0.001, epoch_count=10, epoch_steps=10
    )
    assert weight_decay(48, constant) == pytest.approx(0.1 * 0.01 ** (50 / 101), rel=1e-12)
    assert weight_decay(5, constant.replace(weight_decay=0.0)) == 0.0
    assert weight_decay(5, constant.replace(epoch_count=0)) == 0.1
    from_zero = TrainConfig(lr_init=0.0, lr_final=1e-3, my_exit_tokens=100 * 12 * 1024, warmup_steps=0)
    assert [learning_rate(s, from_zero) for s in (0, 50, 100)] == pytest.approx([0.0, 5e-4, 1e-3], abs=1e-15)
    short = TrainConfig(epoch_count=1, epoch_steps=10, warmup_steps=20)
    assert 0 < learning_rate(3, short) <= 6e-4
    assert learning_rate(30, short) == pytest.approx(1e-5)

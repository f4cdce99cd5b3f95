"""What a run says about itself before it starts: sizes, end, learning rates, and a table of the parameters.

It is: text made from a checked TrainConfig. It is not: the description of the data (dataset.py prints that) nor the log
(runbook.py). Imports no torch.

Symbols: L n_layer, D n_embd; a step is `accumulate_grad_batches` batches of num_nodes * devices * micro_bsz windows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from rwkv_nb.training.config import NEVER, TrainConfig
from rwkv_nb.training.schedule import learning_rate

if TYPE_CHECKING:
    from rwkv_nb.model.config import ModelConfig

PACKAGES = {"torch": "torch", "Lightning": "pytorch-lightning", "DeepSpeed": "deepspeed"}
RULE = "#" * 76


def banner(cfg: TrainConfig) -> str:
    """The lines that the official trainer prints at the start, in its order, with what they leave out."""
    processes = f"{cfg.num_nodes}x{cfg.devices}"
    again = ", activations recomputed" if cfg.grad_cp > 0 else ""
    lines = [
        f"RWKV-5 {cfg.precision.upper()} on {processes} {cfg.accelerator.upper()}, bsz {processes}x{cfg.micro_bsz}="
        f"{cfg.real_bsz}, strategy {cfg.strategy}{again}",
        f"Data      {cfg.data_file or '(made up)'} ({cfg.data_type}), vocab {cfg.vocab_size or 'as the data has'}",
        f"Folder    {cfg.proj_dir}",
        _model_line(cfg),
        *([] if cfg.my_pile_stage == 1 else _schedule_lines(cfg)),
        "With      " + ", ".join(f"{name} {_version(package)}" for name, package in PACKAGES.items()),
    ]
    return "\n".join([RULE, *(f"# {line}" for line in lines), RULE])


def _model_line(cfg: TrainConfig) -> str:
    count = f": {cfg.model_config().n_params:,} parameters" if cfg.vocab_size else ""
    sizes = f"attention {cfg.dim_att} in heads of {cfg.head_size_a}, ffn {cfg.dim_ffn}, ctx_len {cfg.ctx_len}"
    return f"Model     L{cfg.n_layer} D{cfg.n_embd}, {sizes}{count}"


def _schedule_lines(cfg: TrainConfig) -> list[str]:
    tokens = cfg.samples_per_epoch * cfg.ctx_len
    last = max(cfg.epoch_begin, cfg.epoch_count - 1)
    resumes = cfg.my_pile_stage >= 2 and cfg.load_model in ("", "0")
    begin = "after those of the newest checkpoint" if resumes else f"from {cfg.epoch_begin} on"
    decays = "" if cfg.my_exit_tokens > 0 else f", lr decays until {last}"
    saved = f"saved every {cfg.epoch_save}" if cfg.epoch_save > 0 else "saved only at the end"
    together = f" of {cfg.accumulate_grad_batches} batches" if cfg.accumulate_grad_batches > 1 else ""
    warmup = "the default" if cfg.warmup_steps < 0 else cfg.warmup_steps
    decay = f"{cfg.weight_decay:g}" + (f" to {cfg.weight_decay_final:g}" if cfg.weight_decay_final > 0 else "")
    return [
        f"Epochs    {begin}{decays}, {saved}",
        f"          each {cfg.steps_per_epoch:,} steps{together}, {cfg.samples_per_epoch:,} samples, {tokens:,} tokens",
        f"End       {_end(cfg)}",
        f"Adam      lr {cfg.lr_init:g} to {cfg.lr_final:g}, warm-up {warmup} steps, betas {cfg.beta1:g} {cfg.beta2:g}, "
        f"eps {cfg.adam_eps:g}, weight decay {decay}",
        f"lr        {_rates(cfg)}",
    ]


def total_steps(cfg: TrainConfig) -> int:
    """Steps until the learning rate has reached its end, by tokens or by mini-epochs."""
    if cfg.my_exit_tokens != 0:
        return math.ceil(abs(cfg.my_exit_tokens) / cfg.tokens_per_step)
    return max(1, cfg.epoch_count * cfg.steps_per_epoch)


def _end(cfg: TrainConfig) -> str:
    ends = []
    if cfg.my_exit_tokens != 0:
        ends.append(f"after {abs(cfg.my_exit_tokens):,} tokens, {total_steps(cfg):,} steps")
    if cfg.my_exit < NEVER:
        ends.append(f"after mini-epoch {cfg.my_exit}")
    return " or ".join(ends) or "none given: interrupt it (Ctrl-C saves and leaves)"


def _rates(cfg: TrainConfig) -> str:
    """The learning rate at a few steps of a run from the beginning."""
    fresh, total = cfg.replace(epoch_begin=0), total_steps(cfg)
    steps = sorted({0, max(0, min(cfg.warmup_steps, total)), total // 4, total // 2, 3 * total // 4, total})
    return ", ".join(f"{learning_rate(step, fresh):.2e} @{step:,}" for step in steps)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def parameter_table(config: ModelConfig) -> str:
    """Shape, count and name of every parameter; the blocks' common ones in one row. Imports torch (for the shapes)."""
    from rwkv_nb.model.initialization import parameter_shapes

    return format_shapes(parameter_shapes(config))


def format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The table of `parameter_table` for any names and shapes."""
    rows: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        key = re.sub(r"^blocks\.\d+\.", "blocks.*.", name), tuple(shape)
        rows[key] = rows.get(key, 0) + 1
    lines, total = [f"{'shape':>14} {'numbers':>13} {'times':>6}  parameter"], 0
    for (name, shape), times in rows.items():
        numbers = math.prod(shape)
        total += numbers * times
        written = " x ".join(str(n) for n in shape if n != 1) or "1"
        lines.append(f"{written:>14} {numbers:>13,} {times:>6}  {name}")
    return "\n".join([*lines, f"{'':>14} {total:>13,} {len(shapes):>6}  in all"])

"""What makes a run impossible, flag by flag: each rule is a condition and one line with flag, value and remedy.

It is: everything that the flags alone can tell. It is not: what needs a look at files or at the machine (preflight.py).
Imports no torch, so that checks cost nothing.
"""

from __future__ import annotations

import difflib
import math
import os
from typing import TYPE_CHECKING

from rwkv_nb.model.config import VARIANTS
from rwkv_nb.training.config import (
    DATA_TYPES,
    LOGGERS,
    MINI_EPOCH,
    PRECISIONS,
    RECIPES,
    RESUMES,
    working_batch_sizes,
)

if TYPE_CHECKING:
    from rwkv_nb.training.config import TrainConfig

ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "auto")
STRATEGIES = (  # Lightning's names
    "auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "fsdp", "fsdp_cpu_offload",
    "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
)  # fmt: skip
COPIES = ("ddp_spawn", "ddp_fork", "ddp_notebook")  # Lightning's too, not built here
PRIME_COMMAND = "python -m rwkv_nb magic_prime DATA_FILE CTX_LEN"


def broken_rules(c: TrainConfig) -> list[str]:
    """The message of every rule that the flags break."""
    groups = (_choices, _ranges, _sizes, _options, _schedule, _others)
    return [text for rules in groups for bad, text in rules(c) if bad]


def did_you_mean(word: str, known: object) -> str:
    """"; did you mean X?" if one of the known words is close, else an empty string."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _choices(c: TrainConfig) -> list[tuple[bool, str]]:
    allowed = {"data_type": DATA_TYPES, "precision": PRECISIONS, "recipe": RECIPES, "logger": LOGGERS,
               "resume": RESUMES, "accelerator": ACCELERATORS, "my_pile_stage": range(5), "my_pile_version": (1, 2),
               "my_qa_mask": (0, 1, 2), "load_partial": (0, 1), "grad_cp": (0, 1), "compile": (0, 1)}  # fmt: skip
    rules = [
        (getattr(c, name) not in values, f"{name}={getattr(c, name)!r}: use one of {', '.join(map(str, values))}")
        for name, values in allowed.items()
    ]
    why = f"no strategy of Lightning{did_you_mean(c.strategy, STRATEGIES) or '; use ' + ', '.join(STRATEGIES)}"
    if c.strategy.startswith(COPIES):
        why = "copies a running program, data and all; use ddp, which starts the command once more for each device"
    if c.strategy.endswith("_nvme"):
        why = "keeps weights and Adam's state on a disk, which is not built here; use deepspeed_stage_3_offload"
    return [*rules, (c.strategy not in STRATEGIES, f"strategy={c.strategy!r}: {why}")]


def _ranges(c: TrainConfig) -> list[tuple[bool, str]]:
    at_least = {"ctx_len": 1, "micro_bsz": 1, "devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, "n_layer": 1,
                "n_embd": 32, "head_size_a": 1, "head_size_divisor": 1, "epoch_steps": 1, "epoch_count": 0,
                "epoch_begin": 0, "epoch_save": 0, "my_pile_edecay": 0, "my_random_steps": 0, "vocab_size": 0,
                "magic_prime": 0, "lr_init": 0, "lr_final": 0, "weight_decay": 0, "ds_bucket_mb": 1,
                "save_minutes": 0, "save_steps": 0, "val_every": 0, "pre_ffn": 0, "head_qk": 0, "tiny_att_dim": 0,
                "my_pos_emb": 0}  # fmt: skip
    rules = [(getattr(c, n) < low, f"{n}={getattr(c, n)}: must be at least {low}") for n, low in at_least.items()]
    rules += [(not math.isfinite(value), f"{name}={value}: must be a finite number")
              for name, value in c._given.items() if isinstance(value, float)]  # fmt: skip
    below_one = ("beta1", "beta2", "dropout", "val_split")
    rules += [(not 0 <= getattr(c, n) < 1, f"{n}={getattr(c, n)}: must be in [0, 1)") for n in below_one]
    return [*rules, (c.adam_eps <= 0, f"adam_eps={c.adam_eps}: must be above 0, for instance 1e-8")]


def _sizes(c: TrainConfig) -> list[tuple[bool, str]]:
    widths = {n: c._given[n] for n in ("n_embd", "dim_att", "dim_ffn")}  # 0: derived, not the user's mistake
    rules = [(v % 32 != 0, f"{n}={v}: must be a multiple of 32; the nearest below is {v // 32 * 32}")
             for n, v in widths.items()]  # fmt: skip
    below, above = working_batch_sizes(c.real_bsz)
    heads = max(1, c.head_size_a)
    return rules + [
        (c.dim_att % 32 == 0 and c.dim_att % heads != 0,
         f"head_size_a={c.head_size_a}: dim_att={c.dim_att} is not a multiple of it; use dim_att="
         f"{max(1, c.dim_att // heads) * heads} or another head size"),
        (c.my_pile_stage > 0 and c.real_bsz > 0 and MINI_EPOCH % c.real_bsz != 0,
         f"micro_bsz={c.micro_bsz} (num_nodes * devices * micro_bsz = {c.real_bsz}): does not divide the {MINI_EPOCH} "
         f"samples of a mini-epoch (stages 1 to 4); the nearest batch sizes that work are {below} and {above}"),
        (c.accumulate_grad_batches > 0 and c.epoch_steps % max(1, c.accumulate_grad_batches) != 0,
         f"accumulate_grad_batches={c.accumulate_grad_batches}: does not divide the {c.epoch_steps} batches of a "
         "mini-epoch; choose a divisor, or another epoch_steps or micro_bsz"),
    ]


def _options(c: TrainConfig) -> list[tuple[bool, str]]:
    n, init = c.my_pos_emb, os.path.join(c.proj_dir, "rwkv-init.pth")
    return [
        (c.my_testing not in VARIANTS,
         f"my_testing={c.my_testing!r}: only RWKV-5.2 is built here (empty or 'x052'), and its variant with MishGLU "
         "('g' or 'x052g')"),
        (c.pre_ffn > 0 and c.n_layer == 1,
         f"pre_ffn={c.pre_ffn}: takes the time mixing out of block 0, and with n_layer=1 no other block remembers; use "
         "n_layer=2 or more, or pre_ffn=0"),
        (c.tiny_att_dim > 0 and not 0 <= c.tiny_att_layer < c.n_layer,
         f"tiny_att_layer={c.tiny_att_layer}: tiny_att_dim={c.tiny_att_dim} needs the block that has the attention, "
         f"0 to {c.n_layer - 1}"),
        (n > 0 and n * n != c.ctx_len + 1,
         f"my_pos_emb={n}: has {n} x {n} positions, the last without an input; use ctx_len={n * n - 1} (now "
         f"{c.ctx_len}), or my_pos_emb=0"),
        (c.my_pile_stage == 1 and os.path.abspath(c.load_model) == os.path.abspath(init),
         f"load_model={c.load_model!r}: stage 1 would write the grown model over it; use another proj_dir"),
    ]


def _schedule(c: TrainConfig) -> list[tuple[bool, str]]:
    return [
        (c.my_pile_stage in (2, 3) and c.magic_prime == 0,
         f"magic_prime=0: stage {c.my_pile_stage} walks the data by a prime; compute it with "
         f"`{PRIME_COMMAND}`, or use my_pile_stage=0 for random windows"),
        (c.my_pile_stage in (1, 2, 3) and c.magic_prime > 0 and c.magic_prime % 3 != 2,
         f"magic_prime={c.magic_prime}: must be a prime that leaves 2 when divided by 3; compute it with "
         f"`{PRIME_COMMAND}`"),
        (c.my_exit_tokens != 0 and abs(c.my_exit_tokens) <= c.warmup_steps * c.tokens_per_step,
         f"warmup_steps={c.warmup_steps}: the warm-up alone takes {c.warmup_steps * c.tokens_per_step} tokens, "
         f"but my_exit_tokens={c.my_exit_tokens} ends the run before; use fewer warm-up steps or more tokens"),
        (c.my_pile_edecay > 0 and c.my_pile_edecay >= c.epoch_count,
         f"my_pile_edecay={c.my_pile_edecay}: lr would begin to decay after the last of {c.epoch_count} mini-epochs"),
    ]


def _others(c: TrainConfig) -> list[tuple[bool, str]]:
    cpu, one = c.accelerator == "cpu", c.devices * c.num_nodes == 1
    return [
        (not c.proj_dir, "proj_dir='': name a folder for checkpoints and the log"),
        (c.data_type == "uint16" and c.my_sample_len < 2,
         f"my_sample_len={c.my_sample_len}: data_type=uint16 needs the length of its rows, at least 2"),
        (cpu and not one and c.strategy.startswith(("deepspeed", "fsdp")),
         f"strategy={c.strategy!r}: needs GPUs; several processes on processors (accelerator='cpu', devices="
         f"{c.devices}, num_nodes={c.num_nodes}) share the work with strategy='ddp'"),
        (c.strategy == "fsdp_cpu_offload" and c.accumulate_grad_batches > 1,
         f"accumulate_grad_batches={c.accumulate_grad_batches}: with strategy={c.strategy!r} torch keeps the gradient "
         "of the last batch alone; use strategy=fsdp or deepspeed_stage_3_offload, or one larger micro_bsz"),
        (c.strategy == "fsdp_cpu_offload" and c.precision == "fp16",
         f"precision=fp16: with strategy={c.strategy!r} torch does not wait for the loss scale on its way to the "
         "processor; use precision=bf16, or strategy=fsdp or deepspeed_stage_3_offload"),
        (c.compile == 1 and ("stage_3" in c.strategy or c.strategy.startswith("fsdp")),
         f"compile=1: with strategy={c.strategy!r}, which cuts the parameters, it is not built; use compile=0, or "
         "strategy=ddp or deepspeed_stage_2"),
        (c.val_every > 0 and c.val_split == 0,
         f"val_every={c.val_every}: nothing is held out; give val_split, such as 0.01"),
        (c.val_split > 0 and (c.data_type == "uint16" or c.my_pile_version == 2),
         f"val_split={c.val_split}: a list of data sets (my_pile_version=2) or rows (data_type=uint16) have no end to "
         "hold out; use val_split=0"),
        (c.my_qa_mask > 0 and (c.data_type != "binidx" or not c.qa_pile_file),
         f"my_qa_mask={c.my_qa_mask}: mixes two binidx data sets; give data_type='binidx' and the second one as "
         f"qa_pile_file (now {c.qa_pile_file!r})"),
        (c.my_pile_version == 2 and c.data_type != "binidx",
         f"my_pile_version=2: a list of binidx files, but data_type={c.data_type!r}; use data_type='binidx'"),
    ]

"""TrainConfig: the article's flags and defaults, what follows from them, and errors that help."""

import dataclasses
import subprocess
import sys

import pytest

from rwkv_nb.data import sources
from rwkv_nb.model import initialization
from rwkv_nb.training import cli, config, rules, trainer_state
from rwkv_nb.training.config import TrainConfig, working_batch_sizes

# flag: default, as in the argument list of the article's train.py
OFFICIAL = {
    "load_model": "", "wandb": "", "proj_dir": "out", "random_seed": -1, "data_file": "", "data_type": "utf-8",
    "vocab_size": 0, "ctx_len": 1024, "epoch_steps": 1000, "epoch_count": 500, "epoch_begin": 0, "epoch_save": 5,
    "micro_bsz": 12, "n_layer": 6, "n_embd": 512, "dim_att": 0, "dim_ffn": 0, "pre_ffn": 0, "head_qk": 0,
    "tiny_att_dim": 0, "tiny_att_layer": -999, "lr_init": 6e-4, "lr_final": 1e-5, "warmup_steps": -1, "beta1": 0.9,
    "beta2": 0.99, "adam_eps": 1e-8, "grad_cp": 0, "dropout": 0, "weight_decay": 0, "weight_decay_final": -1,
    "my_pile_version": 1, "my_pile_stage": 0, "my_pile_shift": -1, "my_pile_edecay": 0, "layerwise_lr": 1,
    "ds_bucket_mb": 200, "my_sample_len": 0, "my_ffn_shift": 1, "my_att_shift": 1, "head_size_a": 64,
    "head_size_divisor": 8, "my_pos_emb": 0, "load_partial": 0, "magic_prime": 0, "my_qa_mask": 0,
    "my_random_steps": 0, "my_testing": "", "my_exit": 99999999, "my_exit_tokens": 0, "accelerator": "gpu",
    "strategy": "auto", "devices": 1, "num_nodes": 1, "precision": "fp16", "accumulate_grad_batches": 1,
}  # fmt: skip
OURS = {
    "recipe": "head", "logger": "none", "enable_progress_bar": True, "qa_pile_file": "", "resume": "state",
    "save_state": True, "save_minutes": 10.0, "save_steps": 0,
}  # fmt: skip
MINIPILE = {"my_pile_stage": 3, "magic_prime": 2926181, "data_type": "binidx", "ctx_len": 512, "micro_bsz": 16}


def test_fields_are_the_official_flags_with_their_defaults():
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    defaults = {name: f.default for name, f in fields.items()}
    assert defaults == defaults | OFFICIAL | OURS, "every official flag is there, with its default"
    for name, f in fields.items():
        assert f.metadata["help"] and "\n" not in f.metadata["help"], name
        assert type(f.default).__name__ == f.type, name


def test_defaults_are_a_valid_run():
    cfg = TrainConfig()
    assert cfg.problems() == []
    assert (cfg.dim_att, cfg.dim_ffn, cfg.epoch_steps, cfg.epoch_count) == (512, 1792, 1000, 500)
    assert cfg.betas == (0.9, 0.99)
    assert any("my_exit_tokens" in note for note in cfg.notes())


def test_minipile_bookkeeping():
    cfg = TrainConfig(**MINIPILE, epoch_count=999999, n_embd=768)
    assert (cfg.real_bsz, cfg.epoch_steps, cfg.epoch_count, cfg.my_pile_shift) == (16, 2520, 72, 0)
    assert (cfg.dim_att, cfg.dim_ffn) == (768, 2688)
    assert (cfg.tokens_per_step, cfg.samples_per_epoch) == (8192, 40320)
    twice = cfg.replace(my_qa_mask=2, num_nodes=2, devices=3, micro_bsz=4)
    assert (twice.epoch_count, twice.real_bsz, twice.epoch_steps) == (145, 24, 1680)


def test_replace_works_derived_values_out_again():
    cfg = TrainConfig(n_embd=128).replace(n_embd=256)
    assert (cfg.dim_att, cfg.dim_ffn) == (256, 896)
    assert TrainConfig(n_embd=128, dim_att=64).replace(n_embd=256).dim_att == 64
    with pytest.raises(ValueError, match="n_embed"):
        cfg.replace(n_embed=3)


def test_accumulation_counts_in_tokens_and_steps():
    cfg = TrainConfig(ctx_len=10, micro_bsz=2, epoch_steps=12, accumulate_grad_batches=3)
    assert (cfg.tokens_per_step, cfg.steps_per_epoch) == (60, 4)


def test_small_data_trains_one_epoch_and_says_so():
    cfg = TrainConfig(**{**MINIPILE, "magic_prime": 389})
    assert cfg.epoch_count == 1 and cfg.problems() == []
    assert any("389" in note and "103.7 times" in note for note in cfg.notes())


def test_what_a_state_costs_is_said_where_the_model_is_cut():
    assert not any("save_state" in note for name in ("auto", "ddp") for note in TrainConfig(strategy=name).notes())
    for strategy in ("fsdp", "deepspeed_stage_2"):
        assert any("RAM of the first process" in note for note in TrainConfig(strategy=strategy).notes())
        assert not any("save_state" in n for n in TrainConfig(strategy=strategy, save_state=False).notes())


def test_every_strategy_is_lightnings():
    from pytorch_lightning.strategies import StrategyRegistry

    assert set(rules.STRATEGIES) - {"auto"} <= set(StrategyRegistry)


def test_models_that_other_programs_cannot_run_are_said():
    assert not any("`rwkv` package" in note for note in TrainConfig().notes())
    options = TrainConfig(head_qk=64, my_pos_emb=32, ctx_len=1023, my_testing="g").notes()
    assert any("head_qk, my_pos_emb, my_testing: only this package" in note for note in options)
    assert any("dim_att=256 trains" in note and "n_embd=512" in note for note in TrainConfig(dim_att=256).notes())


def test_batch_sizes_that_do_not_divide_a_mini_epoch():
    assert working_batch_sizes(11) == (10, 12)
    assert working_batch_sizes(16) == (16, 16)
    assert working_batch_sizes(50000) == (40320, 40320)
    with pytest.raises(ValueError) as error:
        TrainConfig(**{**MINIPILE, "micro_bsz": 11}, precision="bf8")
    message = str(error.value)
    assert "micro_bsz=11" in message and "10 and 12" in message
    assert "precision='bf8'" in message, "one error lists all mistakes"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"precision": "half"}, ("precision='half'", "bf16")),
        ({"data_type": "parquet"}, ("data_type='parquet'", "binidx")),
        ({"recipe": "new"}, ("recipe='new'", "seed")),
        ({"my_pile_stage": 7}, ("my_pile_stage=7",)),
        ({"n_embd": 100}, ("n_embd=100", "96")),
        ({"n_embd": 96}, ("head_size_a=64", "dim_att=64")),
        ({"dim_ffn": 33}, ("dim_ffn=33", "32")),
        ({"ctx_len": 0}, ("ctx_len=0", "at least 1")),
        ({"lr_init": -1.0}, ("lr_init=-1.0",)),
        ({"beta2": 1.0}, ("beta2=1.0",)),
        ({"adam_eps": 0.0}, ("adam_eps=0.0", "1e-8")),
        ({"accumulate_grad_batches": 7}, ("accumulate_grad_batches=7", "1000")),
        ({"my_pile_stage": 3, "data_type": "binidx"}, ("magic_prime=0", "my_pile_stage=0")),
        ({**MINIPILE, "magic_prime": 2926183}, ("magic_prime=2926183", "leaves 2")),
        ({"my_exit_tokens": 1000, "warmup_steps": 5}, ("warmup_steps=5", "61440", "my_exit_tokens=1000")),
        ({"my_pile_edecay": 500}, ("my_pile_edecay=500", "500 mini-epochs")),
        ({"proj_dir": ""}, ("proj_dir",)),
        ({"data_type": "uint16"}, ("my_sample_len=0",)),
        ({"my_testing": "x060"}, ("my_testing='x060'", "5.2", "MishGLU")),
        ({"pre_ffn": 1, "n_layer": 1}, ("pre_ffn=1", "n_layer=2")),
        ({"head_qk": -1}, ("head_qk=-1", "at least 0")),
        ({"tiny_att_dim": 64}, ("tiny_att_layer=-999", "tiny_att_dim=64", "0 to 5")),
        ({"tiny_att_dim": 64, "tiny_att_layer": 6}, ("tiny_att_layer=6", "0 to 5")),
        ({"my_pos_emb": 32}, ("my_pos_emb=32", "ctx_len=1023", "1024")),
        ({"grad_cp": 2}, ("grad_cp=2", "0, 1")),
        ({"my_pile_stage": 1, "load_model": "out/../out/rwkv-init.pth"}, ("load_model=", "another proj_dir")),
        ({"accelerator": "tpu"}, ("accelerator='tpu'", "auto")),
        ({"strategy": "deepspeed_stage2"}, ("strategy='deepspeed_stage2'", "did you mean deepspeed_stage_2?")),
        ({"strategy": "x"}, ("strategy='x'", "ddp, ")),
        ({"strategy": "deepspeed_stage_3_offload_nvme"}, ("not built here", "use deepspeed_stage_3_offload")),
        ({"accelerator": "cpu", "devices": 2, "strategy": "deepspeed_stage_2"}, ("deepspeed_stage_2", "'ddp'")),
        ({"my_qa_mask": 2, "data_type": "binidx"}, ("my_qa_mask=2", "qa_pile_file")),
        ({"my_pile_version": 2}, ("my_pile_version=2", "binidx")),
        ({"logger": "wandb"}, ("logger='wandb'", "tensorboard")),
        ({"ds_bucket_mb": 0}, ("ds_bucket_mb=0",)),
    ],
)
def test_errors_name_flag_value_and_remedy(flags, words):
    cfg = TrainConfig(**flags)
    with pytest.raises(ValueError) as error:
        cfg.validate()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(cfg.problems()) <= 2


@pytest.mark.parametrize("flags", [{"n_layer": 2.0}, {"lr_init": "1e-3"}, {"grad_cp": True}, {"proj_dir": 3},
                                   {"enable_progress_bar": 1}])
def test_wrong_types_are_refused_at_once(flags):
    with pytest.raises(ValueError, match=f"{next(iter(flags))}=.*expected"):
        TrainConfig(**flags)


def test_configuration_and_schedule_do_without_torch():
    code = "import sys, rwkv_nb.training.rules, rwkv_nb.training.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# a resumed run goes on with the new value of these, and says so
MAY_CHANGE = (
    "data_file", "qa_pile_file", "qa_mask_ids", "my_exit", "my_exit_tokens", "epoch_count", "epoch_save", "val_every",
    "lr_init", "lr_final", "beta1", "beta2", "adam_eps", "weight_decay", "weight_decay_final", "layerwise_lr",
    "my_pile_edecay", "dropout", "grad_cp", "compile", "precision", "accelerator", "strategy", "ds_bucket_mb",
    "load_partial", "recipe", "my_ffn_shift", "my_att_shift",
)  # fmt: skip


def test_every_flag_is_in_one_list_of_what_a_resumed_run_may_change():
    lists = [*trainer_state.SAME_FLAGS, *MAY_CHANGE, *trainer_state.UNSAID_FLAGS]
    assert sorted(lists) == sorted(f.name for f in dataclasses.fields(TrainConfig)), "in which list is it?"


def test_what_stands_twice_agrees():
    """`train` refuses flags before torch is imported, so it may not ask the modules that do the work."""
    assert set(config.DATA_TYPES) == set(sources.DATA_TYPES)
    assert set(config.RECIPES) == set(initialization.RECIPES)
    assert all(name in cli.FIELDS["data_type"].metadata["help"] for name in config.DATA_TYPES)

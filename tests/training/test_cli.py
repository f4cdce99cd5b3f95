"""The command `train`: the article's flags and command lines, errors before torch is imported, notes, outputs."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import ROOT, words, write_data

from rwkv_nb.training import cli, lightning_flags, preflight
from rwkv_nb.training.config import ConfigError, TrainConfig

# The argument list of the article's train.py, written out: flag, type, default.
ARTICLE = """
load_model str ''; wandb str ''; proj_dir str out; random_seed int -1; data_file str ''; data_type str utf-8;
vocab_size int 0; ctx_len int 1024; epoch_steps int 1000; epoch_count int 500; epoch_begin int 0; epoch_save int 5;
micro_bsz int 12; n_layer int 6; n_embd int 512; dim_att int 0; dim_ffn int 0; pre_ffn int 0; head_qk int 0;
tiny_att_dim int 0; tiny_att_layer int -999; lr_init float 6e-4; lr_final float 1e-5; warmup_steps int -1;
beta1 float 0.9; beta2 float 0.99; adam_eps float 1e-8; grad_cp int 0; dropout float 0; weight_decay float 0;
weight_decay_final float -1; my_pile_version int 1; my_pile_stage int 0; my_pile_shift int -1; my_pile_edecay int 0;
layerwise_lr int 1; ds_bucket_mb int 200; my_sample_len int 0; my_ffn_shift int 1; my_att_shift int 1;
head_size_a int 64; head_size_divisor int 8; my_pos_emb int 0; load_partial int 0; magic_prime int 0; my_qa_mask int 0;
my_random_steps int 0; my_testing str ''; my_exit int 99999999; my_exit_tokens int 0; accelerator str gpu;
strategy str auto; devices int 1; num_nodes int 1; precision str fp16; accumulate_grad_batches int 1
"""
PREPARE = """--wandb "" --proj_dir model/0.1-1
 --data_file "data/minipile" --data_type "binidx" --vocab_size 65536
 --ctx_len 512 --my_pile_stage 1 --epoch_count 1 --epoch_begin 0
 --epoch_save 1 --weight_decay 0 --head_size_a 64
 --num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768 --pre_ffn 0 --head_qk 0 --my_exit_tokens 1498226207
 --magic_prime 2926181 --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
 --my_pile_edecay 0 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0
 --enable_progress_bar False --ds_bucket_mb 200"""
RUN = """--load_model "0" --wandb "RWKV-5-Test" --proj_dir model/0.1-1
 --ctx_len 512 --my_pile_stage 3 --epoch_count 999999 --epoch_begin 0
 --data_file "data/minipile" --my_exit_tokens 1498226207 --magic_prime 2926181
 --num_nodes 1 --micro_bsz 16 --n_layer 12 --n_embd 768 --pre_ffn 0 --head_qk 0
 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --my_pile_edecay 0
 --data_type "binidx" --vocab_size 65536 --weight_decay 0.001 --epoch_save 10 --head_size_a 64
 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0
 --enable_progress_bar True --ds_bucket_mb 200"""


def test_every_flag_of_the_article_with_its_type_and_default():
    entries = [entry.split() for entry in ARTICLE.replace("\n", " ").split(";")]
    assert len(entries) == 56
    for name, kind, default in entries:
        convert = {"int": int, "float": float, "str": lambda text: text.strip("'")}[kind]
        field = cli.FIELDS[name]
        assert (field.type, field.default) == (kind, convert(default)), name
        value = {"int": "3", "float": "0.25", "str": "words"}[kind]
        assert cli.read_flags([f"--{name}", value]) == {name: convert(value)}
        assert cli.read_flags([f"--{name}={value}"]) == {name: convert(value)}


def test_help_has_one_line_for_each_flag_in_groups(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for name, field in cli.FIELDS.items():
        [line] = [line for line in out.splitlines() if re.match(rf"\s+--{name} ", line)]
        assert line.endswith(f"{field.metadata['help']} ({field.default!r})")
    for title in ("data:", "model:", "mini-epochs and the end:", "devices, precision, memory:"):
        assert f"\n{title}\n" in out


def test_the_articles_two_command_lines_are_read_as_they_are():
    prepare = cli.read_flags(shlex.split(PREPARE.replace("\n", " ")))
    run = cli.read_flags(shlex.split(RUN.replace("\n", " ")))
    assert TrainConfig(**prepare).problems() == [] and TrainConfig(**run).problems() == []
    assert prepare["enable_progress_bar"] is False and run["enable_progress_bar"] is True
    assert (prepare["wandb"], run["wandb"], run["load_model"]) == ("", "RWKV-5-Test", "0")
    assert (run["my_exit_tokens"], run["lr_final"], run["strategy"]) == (1498226207, 6e-5, "deepspeed_stage_2")


def test_the_articles_prepare_line_needs_neither_deepspeed_nor_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "installed", lambda package: "")
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 0)
    argv = shlex.split(PREPARE.replace("\n", " "))
    with pytest.raises(ConfigError) as caught:
        cli.check(argv)
    [only] = caught.value.problems
    assert "minipile.bin" in only and "python -m rwkv_nb download minipile" in only
    os.mkdir("data")
    prime = preflight.explain(60_000, 512).prime
    write_data("data/minipile", 60_000)
    cfg, notes = cli.check([*argv, "--magic_prime", str(prime)])  # the last of two counts
    assert (cfg.magic_prime, cfg.my_pile_stage, notes) == (prime, 1, [])


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "on"])
def test_booleans_as_in_lightning(text):
    assert cli.read_flags(["--enable_progress_bar", text]) == {"enable_progress_bar": True}
    assert cli.read_flags(["--enable_progress_bar"]) == {"enable_progress_bar": True}
    for no in ("False", "false", "0", "no", "off"):
        assert cli.read_flags(["--enable_progress_bar", no]) == {"enable_progress_bar": False}


def test_negative_numbers_and_lightnings_logger_flag():
    line = "--my_exit_tokens -1000000 --tiny_att_layer -999 --weight_decay_final -1 --logger False"
    assert cli.read_flags(shlex.split(line)) == {
        "my_exit_tokens": -1_000_000, "tiny_att_layer": -999, "weight_decay_final": -1.0, "logger": "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--nlayer 3", "--nlayer: no such flag; did you mean --n_layer?"),
        ("--n-layer 3", "--n-layer: no such flag; did you mean --n_layer?"),
        ("--micro 3", "--micro: no such flag"),
        ("--zzz", "--zzz: no such flag; see --help"),
        ("--n_layer twelve", "n_layer='twelve': expected a whole number"),
        ("--micro_bsz 3.5", "micro_bsz='3.5': expected a whole number"),
        ("--lr_init fast", "lr_init='fast': expected a number"),
        ("--enable_progress_bar maybe", "enable_progress_bar='maybe': expected True or False"),
        ("stray", "'stray' belongs to no flag"),
        ("--max_steps 10", "--max_steps: a run ends by tokens or mini-epochs; use --my_exit_tokens or --my_exit"),
        ("--gpus 2", "--gpus: Lightning 2 has no such flag; use --accelerator and --devices"),
        ("--resume_from_checkpoint x.ckpt", "--resume_from_checkpoint: a run resumes from"),
    ],
)
def test_flags_that_cannot_be_read(line, expected):
    with pytest.raises(ConfigError) as caught:
        cli.read_flags(line.split())
    [problem] = caught.value.problems
    assert problem.startswith(expected)


def test_several_at_once():
    with pytest.raises(ConfigError) as caught:
        cli.read_flags(shlex.split("--nlayer 3 --n_embd ten --max_epochs 5 --ctx_len 8"))
    assert len(caught.value.problems) == 3


def test_no_flag_is_both_accepted_and_refused():
    assert not set(lightning_flags.REFUSED) & set(cli.FIELDS)
    # Trainer.__init__ of Lightning 1.9.5, without self
    lightning = shlex.split("""logger enable_checkpointing callbacks default_root_dir gradient_clip_val
        gradient_clip_algorithm
        num_nodes num_processes devices gpus auto_select_gpus tpu_cores ipus enable_progress_bar overfit_batches
        track_grad_norm check_val_every_n_epoch fast_dev_run accumulate_grad_batches max_epochs min_epochs max_steps
        min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches
        val_check_interval log_every_n_steps accelerator strategy sync_batchnorm precision enable_model_summary
        num_sanity_val_steps resume_from_checkpoint profiler benchmark deterministic reload_dataloaders_every_n_epochs
        auto_lr_find replace_sampler_ddp detect_anomaly auto_scale_batch_size plugins amp_backend amp_level
        move_metrics_to_cpu multiple_trainloader_mode inference_mode""")
    assert [name for name in lightning if name not in cli.FIELDS and name not in lightning_flags.REFUSED] == []


def python(code, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("extra", [{"n_embd": 100}, {"ctx_len": 5000}, {"vocab_size": 20}, {"nonsense": 1}, {}])
def test_torch_is_absent_until_all_checks_have_passed(base, extra, tmp_path):
    code = f"import sys; from rwkv_nb.training import cli; code = {{}}\n" \
           f"try: cli.check({words({**base, **extra})!r}); code = 0\n" \
           f"except ValueError: code = 2\n" \
           f"print(code, 'torch' in sys.modules or 'pytorch_lightning' in sys.modules)"  # fmt: skip
    done = python(code, tmp_path)
    assert done.stdout.split() == ["2" if extra else "0", "False"], done.stderr
    assert set(os.listdir(tmp_path)) == {"text.bin", "text.idx"}


def test_a_run_prints_banner_table_warnings_and_what_it_wrote(base, capsys, monkeypatch):
    import warnings

    from rwkv_nb.training import trainer

    runs = []

    def stand_in(cfg, progress, raise_interrupt):
        runs.append((cfg, progress, raise_interrupt))
        warnings.warn("rwkv-3.pth: passed over", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(trainer, "train", stand_in)
    assert cli.main(words({**base, "my_pile_stage": 1})) == 0
    out, err = capsys.readouterr()
    [(cfg, progress, raise_interrupt)] = runs
    assert (cfg.magic_prime, progress, raise_interrupt) == (179, True, True)
    written = f"written: {Path('run', 'rwkv-init.pth')}"
    order = ["# RWKV-5 FP32 on 1x1 CPU", "note: magic_prime: 179", "emb.weight", written]
    assert [text for text in order if text in out] == order
    assert sorted(order, key=out.index) == order and err == "warning: rwkv-3.pth: passed over\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(words({**base, "devices": 2, "strategy": "ddp"})) == 0
    assert capsys.readouterr().out == "" and runs[1][1] is False, "the other processes are silent"


@pytest.mark.parametrize(
    ("precision", "accelerator", "fast", "said"),
    [
        ("bf16", "cpu", False, "no quick instructions for bf16; fp32 should be faster"),
        ("fp16", "auto", False, "no quick instructions for fp16"),
        ("fp16", "cpu", True, "this processor is made for bf16"),
        ("bf16", "cpu", True, ""), ("fp32", "cpu", False, ""), ("bf16", "gpu", False, ""),
    ],
)  # fmt: skip
def test_a_format_that_the_processor_imitates_is_noted(monkeypatch, precision, accelerator, fast, said):
    import torch

    from rwkv_nb.training import machine

    monkeypatch.setattr(machine, "fast_bf16", lambda device: fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    note = cli.slow_format(TrainConfig(precision=precision, accelerator=accelerator))
    assert said in note and bool(said) == bool(note)


def test_what_only_lightning_can_refuse_is_one_line(base, capsys, monkeypatch):
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from rwkv_nb import __main__ as door
    from rwkv_nb.training import trainer

    def refuse(*args, **kwargs):
        raise MisconfigurationException("No supported gpu backend found!")

    monkeypatch.setattr(trainer, "train", refuse)
    assert door.main(["train", *words(base)]) == 1
    said = "python -m rwkv_nb train: Lightning refuses this run: No supported gpu backend found!\n"
    assert capsys.readouterr().err == said


WITHOUT_EFFECT = {"my_ffn_shift", "my_att_shift"}


@pytest.mark.parametrize("flag", [f.name for f in dataclasses.fields(TrainConfig)])
def test_every_flag_is_read_somewhere_or_says_that_it_does_nothing(flag):
    checks = ("config.py", "rules.py", "preflight.py", "cli.py", "banner.py", "lightning_flags.py")
    rooms = [ROOT / "rwkv_nb" / room for room in ("training", "model", "data")]
    files = [path for room in rooms for path in room.glob("*.py") if path.name not in checks]
    config = (ROOT / "rwkv_nb/training/config.py").read_text(encoding="utf-8")
    derived = config[config.index("def __post_init__"):]
    reader = re.compile(rf"\b(cfg|c|config|flags)\.{flag}\b")
    readers = [path.name for path in files if reader.search(path.read_text(encoding="utf-8"))]
    readers += ["config.py"] * bool(re.search(rf"self\.{flag}\b", derived))
    if flag in WITHOUT_EFFECT:
        assert readers == [] and "does nothing" in cli.FIELDS[flag].metadata["help"]
    else:
        assert readers, f"--{flag} is accepted and has no effect"

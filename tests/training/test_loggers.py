"""What a run tells: metrics in CSV and in stand-ins for TensorBoard and Weights & Biases, the banner, the table."""

import csv
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import pytorch_lightning as pl
import yaml

from rwkv_nb.model.initialization import parameter_shapes
from rwkv_nb.training import banner as text
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.loggers import run_loggers
from rwkv_nb.training.schedule import learning_rate
from rwkv_nb.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

MINIPILE = TrainConfig(
    my_pile_stage=3, magic_prime=2926181, data_file="data/minipile", data_type="binidx", vocab_size=65536, ctx_len=512,
    micro_bsz=16, n_layer=12, n_embd=768, my_exit_tokens=1498226207, lr_init=6e-4, lr_final=6e-5, warmup_steps=10,
    weight_decay=0.001, epoch_save=10, precision="bf16",
)  # fmt: skip


class Spy(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(pl_module.last_loss))


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "text.txt").write_text("the eagle writes cell by cell. " * 40, encoding="utf-8")
    return TrainConfig(
        proj_dir=str(tmp_path / "run"), data_file=str(tmp_path / "text.txt"), accelerator="cpu", precision="fp32",
        n_layer=1, n_embd=64, ctx_len=16, micro_bsz=2, epoch_steps=4, epoch_count=3, lr_init=5e-3, lr_final=1e-4,
        warmup_steps=2, weight_decay=0.1, weight_decay_final=0.01, my_exit_tokens=10 * 32, random_seed=5, logger="csv",
    )  # fmt: skip


def rows(cfg):
    with open(Path(cfg.proj_dir, "csv", "version_0", "metrics.csv"), encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_step(cfg):
    spy = Spy()
    train(cfg, callbacks=[spy], progress=False)
    found = rows(cfg)
    assert [int(row["step"]) for row in found] == list(range(1, 11))
    for n, (row, loss) in enumerate(zip(found, spy.losses, strict=True)):
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(row["lr"]) == pytest.approx(learning_rate(n, cfg), rel=1e-12)
        done = min(max((n * 32 - 64) / (320 - 64), 0), 1)
        assert float(row["wd"]) == pytest.approx(0.1 * 0.1**done, rel=1e-9)
        assert float(row["Gtokens"]) == pytest.approx((n + 1) * 32 / 1e9, rel=1e-9)
        assert float(row["kt/s"]) > 0
    flags = yaml.safe_load(Path(cfg.proj_dir, "csv", "version_0", "hparams.yaml").read_text(encoding="utf-8"))
    assert flags["n_embd"] == 64 and flags["lr_init"] == 5e-3


def test_accumulated_batches_make_one_row_with_their_mean(cfg):
    spy, cfg = Spy(), cfg.replace(accumulate_grad_batches=2, my_exit_tokens=4 * 64)
    train(cfg, callbacks=[spy], progress=False)
    found = rows(cfg)
    assert [int(row["step"]) for row in found] == [1, 2, 3, 4]
    means = [(a + b) / 2 for a, b in zip(spy.losses[::2], spy.losses[1::2], strict=True)]
    assert [float(row["loss"]) for row in found] == pytest.approx(means, rel=1e-6)
    assert [float(row["Gtokens"]) for row in found] == pytest.approx([n * 64 / 1e9 for n in (1, 2, 3, 4)])


def test_steps_count_from_the_very_beginning(cfg):
    train(cfg.replace(epoch_begin=1, load_model=""), model=_model(cfg), progress=False)
    assert [int(row["step"]) for row in rows(cfg)] == [5, 6, 7, 8, 9, 10]


def _model(cfg):
    from rwkv_nb.model.rwkv import RWKV

    return RWKV(cfg.replace(vocab_size=len(set("the eagle writes cell by cell. "))).model_config())


def test_without_the_flags_nothing_is_made(cfg):
    assert run_loggers(cfg.replace(logger="none")) == []
    train(cfg.replace(logger="none"), progress=False)
    assert not [path for path in Path(cfg.proj_dir).iterdir() if path.is_dir()]


def test_the_bar_can_be_switched_off(cfg, capfd):
    train(cfg, progress=True)
    assert "10/10" in capfd.readouterr().err
    train(cfg.replace(enable_progress_bar=False), progress=True)
    captured = capfd.readouterr()
    assert captured.err == "" and "vocab_size" in captured.out


WANDB = '''
"""A stand-in: the part of wandb that Lightning's logger calls, written down in calls.jsonl."""
import json, os
run = None
__version__ = "0.19.0"
def note(what, **content):
    with open(os.environ["CALLS"], "a") as file: file.write(json.dumps([what, content]) + chr(10))
def require(name): pass
class Config(dict):
    def update(self, content, allow_val_change=None):
        note("config", **{k: v for k, v in content.items() if isinstance(v, (int, float, str))})
class Run:
    config, id, name = Config(), "1", "name"
    def log(self, metrics, step=None): note("log", **metrics)
    def define_metric(self, *args, **kwargs): pass
def init(**kwargs):
    note("init", mode=os.environ.get("WANDB_MODE"), **{k: v for k, v in kwargs.items() if isinstance(v, (str, bool))})
    return Run()
'''


def test_weights_and_biases_offline_through_a_stand_in(cfg, tmp_path):
    packages = tmp_path / "packages"
    for name, content in (("__init__", WANDB), ("wandb_run", "from wandb import Run"), ("sdk/__init__", ""),
                          ("sdk/lib/__init__", "class RunDisabled: pass")):  # fmt: skip
        (packages / "wandb" / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (packages / "wandb" / f"{name}.py").write_text(content, encoding="utf-8")
    (packages / "wandb-0.19.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: wandb\nVersion: 0.19.0\n"
    (packages / "wandb-0.19.0.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    flags = {**cfg._given, "wandb": "eagle", "logger": "none"}
    code = textwrap.dedent(f"""
        import sys
        import rwkv_nb.training.trainer as trainer
        early = "wandb" in sys.modules
        trainer.train(trainer.TrainConfig(**{flags!r}), progress=False)
        print(early, "wandb" in sys.modules)
    """)
    environment = {
        "PYTHONPATH": str(packages), "CALLS": str(tmp_path / "calls.jsonl"), "WANDB_MODE": "offline", "PATH": "",
        "OMP_NUM_THREADS": "1", "HOME": str(Path.home()),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    what, first = calls[0]
    assert what == "init" and first["project"] == "eagle" and first["mode"] == "offline"
    assert re.fullmatch(r"\d+ ctx16 L1 D64 \d{4}(-\d\d){5}", first["name"]), "as the official run names itself"
    assert first["dir"] == cfg.proj_dir and Path(cfg.proj_dir).is_dir()
    logged = [content for what, content in calls if what == "log"]
    assert len(logged) == 10 and {"loss", "lr", "wd", "Gtokens", "kt/s"} <= set(logged[0])
    [config] = [content for what, content in calls if what == "config"]
    assert config["n_embd"] == 64


def test_tensorboard_is_lightnings_logger(cfg, monkeypatch):
    made = []
    monkeypatch.setattr("pytorch_lightning.loggers.TensorBoardLogger", lambda *a, **k: made.append((a, k)) or "logger")
    assert run_loggers(cfg.replace(logger="tensorboard")) == ["logger"]
    assert made == [((cfg.proj_dir,), {"name": "tensorboard", "default_hp_metric": False})]


def test_banner_of_the_articles_run():
    said = text.banner(MINIPILE)
    for part in (
        "RWKV-5 BF16 on 1x1 GPU, bsz 1x1x16=16", "data/minipile (binidx), vocab 65536", "192,807,936 parameters",
        "2,520 steps, 40,320 samples, 20,643,840 tokens", "after 1,498,226,207 tokens, 182,889 steps",
        "saved every 10", "6.00e-05 @182,889", "6.00e-06 @0", "6.00e-04 @10", "weight decay 0.001",
    ):  # fmt: skip
        assert part in said, part
    assert all(line.startswith("#") and len(line) <= 120 for line in said.splitlines())


def test_banner_of_other_runs():
    assert "Adam" not in text.banner(MINIPILE.replace(my_pile_stage=1))
    plain = TrainConfig(accumulate_grad_batches=4, weight_decay=0.1, weight_decay_final=0.01, my_exit=20, epoch_save=0)
    said = text.banner(plain)
    assert "each 250 steps of 4 batches" in said and "weight decay 0.1 to 0.01" in said and "(made up)" in said
    assert "after mini-epoch 20" in said and "lr decays until 499" in said and "saved only at the end" in said
    assert "interrupt it" in text.banner(TrainConfig())
    assert "Epochs    from 0 on, lr decays" in said
    assert "Epochs    after those of the newest checkpoint, saved every 10" in text.banner(MINIPILE)
    assert "lr decays until 71" in text.banner(MINIPILE.replace(my_exit_tokens=0, epoch_begin=3))


def test_the_table_counts_what_the_model_has():
    config = MINIPILE.model_config()
    table = text.parameter_table(config)
    shapes = parameter_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == 192_807_936 and f"{total:,} {len(shapes):>6}  in all" in table
    rows = [re.fullmatch(r"\s*(\S.*?)\s+([\d,]+)\s+(\d+)  (\S+)", line) for line in table.splitlines()[1:-1]]
    assert sum(int(row[2].replace(",", "")) * int(row[3]) for row in rows) == total
    assert sum(int(row[3]) for row in rows) == len(shapes)
    assert "   2688 x 768     2,064,384     12  blocks.*.ffn.key.weight" in table
    ln0 = next(row for row in rows if row[4] == "blocks.*.ln0.weight")
    assert (ln0[1], ln0[3]) == ("768", "1"), "block 0 alone has it"

"""The flag compile: the same training, resumable, undone afterwards; refused where it cannot work."""

import copy

import pytest
import torch
from cli_cases import words

from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training import cli, compiling
from rwkv_nb.training.config import ConfigError, TrainConfig
from rwkv_nb.training.trainer import Monitor, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "text.txt").write_text("the eagle writes cell by cell. " * 40, encoding="utf-8")
    return TrainConfig(
        proj_dir=str(tmp_path / "run"), data_file=str(tmp_path / "text.txt"), accelerator="cpu", precision="fp32",
        n_layer=2, n_embd=64, ctx_len=16, micro_bsz=2, epoch_steps=4, lr_init=5e-3, lr_final=1e-4,
        my_exit_tokens=6 * 32, random_seed=5, vocab_size=20,
    )  # fmt: skip


def losses_of(cfg, model=None, **options):
    watch = Monitor(every_seconds=None, every_steps=1)
    dataset = TokenDataset(DataConfig.from_flags(cfg), seed=cfg.random_seed)
    model = train(cfg, model, dataset, [watch], progress=False, **options)
    return [record.loss for record in watch.records], model


def needs_inductor():
    if reason := compiling.why_not(on_cpu=True):
        pytest.skip(reason)


@pytest.mark.parametrize("changes", [{}, {"grad_cp": 1}, {"precision": "bf16"}], ids=["fp32", "grad_cp", "bf16"])
def test_a_compiled_run_is_the_plain_run_but_for_rounding(changes, cfg, monkeypatch):
    calls = []

    def spying_backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", spying_backend)
    cfg = cfg.replace(**changes)
    plain, _ = losses_of(cfg)
    assert calls == []
    losses, model = losses_of(cfg.replace(compile=1))
    assert calls, "the blocks went through the compiler"
    close = 2e-2 if "precision" in changes else 1e-4
    assert losses == pytest.approx(plain, rel=close) and losses[-1] < losses[0]
    seen = len(calls)
    model(torch.zeros(1, 16, dtype=torch.long))
    assert len(calls) == seen and not any(b._compiled_call_impl for b in model.blocks), "the model is as before"
    assert not any("_orig_mod" in name for name in model.state_dict())
    copy.deepcopy(model)


def test_after_a_mistake_too_the_model_is_as_before(cfg, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model = RWKV(cfg.model_config())
    with pytest.raises(KeyError), compiling.compiled(model, True):
        assert all(b._compiled_call_impl for b in model.blocks)
        raise KeyError
    assert not any(b._compiled_call_impl for b in model.blocks)


def test_a_resumed_run_is_the_uninterrupted_one(cfg, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    first = cfg.replace(compile=1, my_pile_stage=3, data_type="utf-8", magic_prime=71, save_steps=3, micro_bsz=4,
                        my_exit_tokens=6 * 64)  # fmt: skip
    train(first.replace(my_pile_stage=1), progress=False)

    class Stop(Monitor):
        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            trainer.should_stop = trainer.global_step == 3 or trainer.should_stop

    train(first, callbacks=[Stop(every_seconds=None)], progress=False)
    watch = Monitor(every_seconds=None, every_steps=1)
    resumed = train(first, callbacks=[watch], progress=False).state_dict()
    assert [record.step for record in watch.records] == [4, 5, 6]
    whole = first.replace(proj_dir=first.proj_dir + "2")
    train(whole.replace(my_pile_stage=1), progress=False)
    weights = train(whole, progress=False).state_dict()
    assert all(torch.equal(x, resumed[name]) for name, x in weights.items())


def test_with_the_real_compiler(cfg):
    needs_inductor()
    plain, _ = losses_of(cfg)
    losses, _ = losses_of(cfg.replace(compile=1))
    assert losses == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_3", "deepspeed_stage_3_offload"])
def test_refused_where_parameters_are_cut(strategy, cfg):
    [problem] = cfg.replace(compile=1, strategy=strategy, accelerator="gpu").problems()
    assert problem.startswith("compile=1: with strategy=") and "use compile=0" in problem
    assert cfg.replace(compile=1, strategy="deepspeed_stage_2", accelerator="gpu").problems() == []
    assert cfg.replace(compile=2).problems() == ["compile=2: use one of 0, 1"]


def test_refused_before_the_start_where_the_machine_lacks_something(base, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigError) as caught:
        cli.check(words({**base, "compile": 1}))
    [problem] = caught.value.problems
    assert problem == "compile=1: torch.compile needs a C++ compiler, such as g++; install it, or use --compile 0"
    cli.check(words(base))


def test_what_a_gpu_needs_more(monkeypatch):
    needs_inductor()
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert compiling.why_not(on_cpu=True) == "" and "triton" in compiling.why_not(on_cpu=False)
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: "/nowhere")
    assert "python3-dev" in compiling.why_not(on_cpu=True)

"""The planner's arithmetic against published figures, real tensors, torch's own count of operations, and a real run."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV, l2wrap_cross_entropy
from rwkv_nb.training import planner
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.machine import autocast
from rwkv_nb.training.optimizer import build_optimizer
from rwkv_nb.wkv import cpu

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelConfig(n_layer=3, n_embd=128, vocab_size=512, ctx_len=64)


@pytest.mark.parametrize(
    ("strategy", "gigabytes"),
    [("deepspeed_stage_1", 31.4), ("deepspeed_stage_2", 16.6), ("deepspeed_stage_3", 1.9), ("fsdp", None)],
)
def test_the_figures_of_the_zero_paper(strategy, gigabytes):
    """arXiv 1910.02054, figure 1: 7.5 billion parameters, 64 devices, 120 GB where nothing is cut."""
    assert planner.state_bytes(7_500_000_000, "ddp", 64).total == 120e9
    if gigabytes is not None:
        assert planner.state_bytes(7_500_000_000, strategy, 64).total / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert planner.state_bytes(1000, strategy, 1).total == 16000, "one device holds everything, however it is cut"


def test_fsdp_gathers_blocks_in_turn():
    """tests/distributed/test_cut_models.py counts the same weights in a real run; their gradients come on top."""
    config = planner.model_of("0.1B")
    matrix = config.vocab_size * config.n_embd
    block = (config.n_params - 2 * matrix) / config.n_layer
    copies = planner.memory(config, 1, 512, "fsdp", 4, "bf16").copies
    assert copies == pytest.approx(2 * 2 * (2 * matrix + 3 * block))
    assert planner.memory(config, 1, 512, "fsdp", 1, "fp32").copies == 0
    assert planner.memory(config, 1, 512, "fsdp", 1, "bf16").copies == copies, "in two bytes they are copies there too"
    assert planner.memory(config, 1, 512, "fsdp_cpu_offload", 1, "fp32").copies == 2 * copies
    shallow = ModelConfig(n_layer=1, n_embd=64, vocab_size=96)
    assert planner.memory(shallow, 1, 64, "fsdp", 2, "fp32").copies == pytest.approx(2 * 4 * shallow.n_params)


def test_offload_moves_bytes_and_loses_none():
    for stage in (1, 2, 3):
        here = planner.state_bytes(1000, f"deepspeed_stage_{stage}", 4)
        there = planner.state_bytes(1000, f"deepspeed_stage_{stage}_offload", 4)
        assert there.total + there.host == here.total and there.adam == 0 and there.host > 0
    assert planner.state_bytes(1000, "deepspeed_stage_3_offload", 4).total == 0
    assert planner.state_bytes(1000, "deepspeed_stage_2_offload", 4).total == 2000, "the weights stay"


def test_batches_that_are_added_up_in_float32():
    """tests/distributed/test_cut_models.py sees the sums."""

    def gradients(strategy, accumulate, precision="bf16"):
        return planner.state_bytes(1000, strategy, 4, precision, accumulate).gradients

    for strategy in ("auto", "ddp", "fsdp"):
        assert gradients(strategy, 8) == gradients(strategy, 1), "in four bytes they are anyway"
    assert gradients("deepspeed_stage_3", 1) == 500 and gradients("deepspeed_stage_3", 8) == 1000
    assert gradients("deepspeed_stage_2", 8, "fp16") == 1000
    assert gradients("deepspeed_stage_1", 1) == 2000 and gradients("deepspeed_stage_1", 8) == 4000 + 2000
    assert gradients("deepspeed_stage_1", 8, "fp32") == gradients("deepspeed_stage_1", 1, "fp32") == 4000
    assert gradients("deepspeed_stage_2_offload", 1) == 0 and gradients("deepspeed_stage_2_offload", 8) == 1000
    assert planner.state_bytes(1000, "deepspeed_stage_3_offload", 4, accumulate=8).host == 500 + 1000 + 3000
    cfg = TrainConfig(n_layer=12, n_embd=768, vocab_size=65536, strategy="deepspeed_stage_3", devices=4, micro_bsz=2,
                      precision="bf16", my_exit_tokens=-(10**9))  # fmt: skip
    one, eight = (planner.plan_run(cfg.replace(accumulate_grad_batches=n), planner.GPUS["H100 SXM"]) for n in (1, 8))
    assert eight.memory.gradients == 2 * one.memory.gradients > 0


def test_states_are_those_of_real_tensors():
    cfg = TrainConfig(n_layer=3, n_embd=128, vocab_size=512, weight_decay=0.01, precision="fp32", accelerator="cpu")
    model = RWKV(SMALL)
    optimizer = build_optimizer(model, cfg)
    idx = torch.zeros(1, 8, dtype=torch.long)
    l2wrap_cross_entropy(model(idx)[0], idx).backward()
    optimizer.step()

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    expected = planner.state_bytes(SMALL.n_params)
    assert size(model.parameters()) == expected.weights
    assert size(p.grad for p in model.parameters()) == expected.gradients
    averages = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert size(averages) == expected.adam


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision, fused, monkeypatch):
    if not fused:  # as on a GPU: every part by its definition
        monkeypatch.setattr("rwkv_nb.model.elementwise.kernel_format", lambda *_: None)
    elif cpu.why_not():
        pytest.skip("NO COMPILER: nothing is fused")

    def kept(n_layer):
        config = ModelConfig(n_layer=n_layer, n_embd=128, vocab_size=96, ctx_len=128)
        model = RWKV(config).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
            return tensor

        idx = torch.zeros(8, 128, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(precision, "cpu"):
            loss = model(idx)[0].sum()
        assert loss.requires_grad
        return sum(size for size, _ in storages.values()), config

    (two, _), (four, config) = kept(2), kept(4)
    a_layer = planner.activation_bytes(config, 8, 128, precision, fused=fused) / 4
    squared = 0 if fused or precision == "fp32" else 4 * 8 * 128 * config.dim_ffn  # a copy that a GPU alone makes
    assert a_layer - squared == pytest.approx((four - two) / 2, rel=0.02)


def test_memory_of_a_real_run_on_a_gpu():
    """benchmarks/RESULTS.md, "Training on a GPU": 12.0 GB by nvidia-smi, the CUDA context of 0.5 to 1 GB included."""
    planned = planner.memory(planner.model_of("0.1B", 512), 16, 512, "auto", 1, "bf16").total
    assert 10.5e9 < planned < 11.5e9


def test_flops_are_what_torch_counts():
    model, idx = RWKV(SMALL).double(), torch.zeros(2, 64, dtype=torch.long)  # float64: products are all torch's own
    with FlopCounterMode(display=False) as counter:
        model(idx)[0].sum().backward()
    products = planner.train_flops(SMALL) - 12 * SMALL.n_layer * SMALL.dim_att * SMALL.head_size_a  # WKV is no product
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")  # not WKV's own
    assert counted / idx.numel() == pytest.approx(products, rel=0.01)
    vectors = planner.train_flops(SMALL, grad_cp=True) / planner.train_flops(SMALL)
    assert 1.2 < vectors < 4 / 3


RUN = r"""
import re, torch
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV, l2wrap_cross_entropy
torch.set_num_threads(1)
def peak():  # VmHWM begins anew with the program; ru_maxrss would begin with the peak of the parent
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
def step(config, batch, length):
    model, idx = RWKV(config).train(), torch.zeros(batch, length, dtype=torch.long)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(2):
        l2wrap_cross_entropy(model(idx)[0], idx).backward()
        optimizer.step()
step(ModelConfig(n_layer=1, n_embd=64, vocab_size=64), 1, 16)
before = peak()
step(ModelConfig(n_layer=3, n_embd=384, vocab_size=2048), 4, 256)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_run_takes_about_as_much_memory():
    out = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True, timeout=120)
    measured = int(out.stdout)
    config = ModelConfig(n_layer=3, n_embd=384, vocab_size=2048)
    expected = planner.memory(config, 4, 256, "auto", precision="fp32", fused=True).total
    assert 0.5 < measured / expected < 1.8, f"{measured / 1e6:.0f} MB against {expected / 1e6:.0f}"


def test_reports_lie_where_the_default_is():
    for report in planner.REPORTED:
        assert 0.7 < report.utilisation / planner.usual_utilisation(planner.model_of(report.size)) < 1.5, report
    assert {report.size for report in planner.REPORTED} == {"0.1B", "7B"}
    h100 = 7000 * (6 * (7_518_044_160 - 65536 * 4096) + 12 * 32 * 4096 * 64) / 989e12  # written out a second time
    assert planner.REPORTED[0].utilisation == pytest.approx(h100)


def test_a_plan():
    cfg = TrainConfig(
        n_layer=12, n_embd=768, vocab_size=65536, ctx_len=512, micro_bsz=16, devices=4, num_nodes=2, strategy="ddp",
        precision="bf16", my_exit_tokens=-1_498_226_207,
    )  # fmt: skip
    gpu = planner.GPUS["A100 SXM 80"]
    plan = planner.plan_run(cfg, gpu, utilisation=0.25, scaling=0.5, price_per_hour=2)
    flops = planner.train_flops(cfg.model_config())
    assert plan.tokens_per_second == pytest.approx(0.25 * 312e12 / flops * 8 * 0.5)
    assert plan.hours == pytest.approx(1_498_226_207 / plan.tokens_per_second / 3600)
    assert plan.cost == pytest.approx(plan.hours * 16) and plan.fits
    assert planner.plan_run(cfg, gpu).hours == planner.plan_run(cfg, gpu, utilisation=0.1).hours, "narrow: a tenth"
    big = planner.plan_run(cfg.replace(n_layer=32, n_embd=4096), gpu, price_per_hour=2)
    assert not big.fits and big.hours > plan.hours
    assert planner.plan_run(cfg.replace(n_layer=32, n_embd=4096, strategy="deepspeed_stage_3", micro_bsz=2, grad_cp=1),
                            gpu).fits  # fmt: skip
    with pytest.raises(ValueError, match="my_exit_tokens"):
        planner.plan_run(cfg.replace(my_exit_tokens=0), gpu)
    with pytest.raises(ValueError, match="utilisation is 30"):
        planner.plan_run(cfg, gpu, utilisation=30)

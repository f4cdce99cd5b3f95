"""The panel and pictures of notebook 10, and the data that its two processes read."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.teaching import plots, two_processes
from rwkv_nb.teaching.widgets import scaling_out as draw
from rwkv_nb.training import planner
from rwkv_nb.training.config import TrainConfig

PNG = b"\x89PNG"


def total(panel):
    return float(re.search(r"<b>([\d.]+) of", panel.report.value)[1])


def test_panel_follows_its_controls():
    panel = draw.panel()
    assert "fits, with a tenth to spare" in panel.report.value and bytes(panel.picture.value).startswith(PNG)
    before, picture = total(panel), bytes(panel.picture.value)
    panel.micro_bsz.value = 32
    assert total(panel) > before and bytes(panel.picture.value) != picture
    panel.grad_cp.value = True
    assert total(panel) < before
    panel.size.value = "7B"
    assert "does NOT fit" in panel.report.value and panel.utilisation.value == 0.3
    panel.utilisation.value, panel.size.value = 0.5, "0.1B"
    assert panel.utilisation.value == 0.1
    panel.size.value = "7B"
    panel.gpu.value, panel.devices.value, panel.strategy.value = "H200 SXM", 8, "deepspeed_stage_3_offload"
    assert "does NOT fit" not in panel.report.value and "GB of RAM for each" in panel.report.value
    expected = planner.memory(planner.model_of("7B"), 32, 512, "deepspeed_stage_3_offload", 8, "bf16", True).total
    assert total(panel) == pytest.approx(expected / 1e9, abs=0.05)
    panel.price.value = 0
    assert panel.report.value.endswith("cost 0</p>") and panel.error.value == ""
    assert "needs a running kernel" in repr(panel)
    for name in ("size", "gpu", "strategy", "devices", "micro_bsz", "ctx_len", "tokens", "utilisation", "price"):
        assert getattr(panel, name).description


def test_hours_and_cost_are_said():
    plan = planner.Plan(planner.state_bytes(10**9), planner.GPUS["RTX 4090"], 4, 1000.0, 7.2e6, 3.0)
    text = draw.plan_html(plan)
    assert "16.0 of 24 GB on each RTX 4090" in text and "2.0 hours" in text and "8 device hours, cost 24" in text


def test_figures_draw():
    memory = {"a": planner.state_bytes(10**9), "b": planner.state_bytes(10**9, "deepspeed_stage_2", 4)}
    for fig in (draw.shares_figure([[0, 5], [7]], 11, columns=4), draw.memory_figure(memory, [24e9]),
                draw.gradients_figure([np.ones(12), -np.ones(12)], np.zeros(12))):  # fmt: skip
        assert plots.png(fig).startswith(PNG)
    squares = [text.get_text() for text in draw.shares_figure([[0, 5], [7]], 11).axes[0].texts]
    assert squares == ["0", "0", "1"]


def test_chunks_of_the_data_begin_with_their_number(tmp_path):
    flags = two_processes.make_data(tmp_path, chunks=47, ctx_len=8)
    assert flags["magic_prime"] == 47 and (tmp_path / "run" / "rwkv-init.pth").is_file()
    data = TokenDataset(DataConfig.from_flags(TrainConfig(**flags)))
    assert sorted(int(data[i][0][0]) for i in range(47)) == list(range(47))


def test_one_process_takes_notes(tmp_path):
    flags = two_processes.make_data(tmp_path, chunks=47, ctx_len=8)
    record = two_processes.watch(TrainConfig(**{**flags, "micro_bsz": 2, "my_exit_tokens": 3 * 16}))
    assert len(record.losses) == 3 and [len(chunks) for chunks in record.chunks] == [2, 2, 2]
    assert record.own_gradient == pytest.approx(record.gradient, abs=1e-6), "alone, there is nothing to average with"


@pytest.mark.slow
def test_a_failing_process_is_quoted(tmp_path):
    flags = two_processes.make_data(tmp_path, chunks=47, ctx_len=8)
    with pytest.raises(RuntimeError, match="(?s)process . ended with exit code.*no_such_file"):
        two_processes.run({**flags, "data_file": str(tmp_path / "no_such_file"), "my_exit_tokens": 8}, processes=1)

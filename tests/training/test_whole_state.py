"""What a state holds of a run that cuts nothing, and a loss scale that comes from another kind of strategy."""

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from rwkv_nb.training import whole_state


def plain_trainer(model, scaler=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plugin = SimpleNamespace(scaler=scaler)
    return SimpleNamespace(
        strategy=SingleDeviceStrategy("cpu"), optimizers=[optimizer], precision_plugin=plugin, is_global_zero=True
    )


def test_moments_go_by_name_and_come_back():
    model = torch.nn.Linear(3, 2)
    trainer = plain_trainer(model)
    assert whole_state.whole_state(trainer, model)[1] == {}, "Adam has not stepped yet"
    model(torch.ones(1, 3)).sum().backward()
    trainer.optimizers[0].step()
    weights, entries = whole_state.whole_state(trainer, model)
    assert weights.keys() == entries.keys() == {"weight", "bias"}
    assert set(entries["weight"]) == {"step", *whole_state.MOMENTS} and entries["weight"]["exp_avg"].shape == (2, 3)
    other = plain_trainer(model)
    whole_state.restore_whole(other, model, weights, entries)
    again = whole_state.whole_state(other, model)[1]
    assert all(torch.equal(again[name][key], value) for name, entry in entries.items() for key, value in entry.items())
    other.is_global_zero = False
    assert whole_state.whole_state(other, model) == ({}, {}), "the other processes of ddp have no use for a copy"


def test_a_loss_scale_of_another_kind_begins_anew():
    trainer = plain_trainer(torch.nn.Linear(1, 1), torch.amp.GradScaler("cpu", init_scale=4.0))
    mine = whole_state.loss_scale(trainer)
    whole_state.restore_loss_scale(trainer, {"cur_scale": 2.0, "cur_iter": 3})
    whole_state.restore_loss_scale(trainer, {})
    assert whole_state.loss_scale(trainer) == mine and mine["scale"] == 4.0
    whole_state.restore_loss_scale(trainer, {**mine, "scale": 0.5})
    assert whole_state.loss_scale(trainer)["scale"] == 0.5
    assert whole_state.loss_scale(plain_trainer(torch.nn.Linear(1, 1))) == {}


@pytest.mark.parametrize(
    ("strategy", "can"),
    [
        (SingleDeviceStrategy("cpu"), True),
        (DDPStrategy(), True),
        (FSDPStrategy(), True),
        (("stage", 3), True),
        (("nvme", 3), False),
    ],
)
def test_which_strategies_are_known(strategy, can):
    if isinstance(strategy, tuple):  # made without DeepSpeed, which may not be installed
        kind, stage = strategy
        offload = {"device": "nvme"} if kind == "nvme" else None
        strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
        strategy.config = {"zero_optimization": {"stage": stage, "offload_optimizer": offload}}
    assert whole_state.can_be_whole(strategy) is can

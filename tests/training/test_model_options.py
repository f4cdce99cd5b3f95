"""Runs with the rare options, with recomputed activations, and from grown weights."""

import pytest
import torch

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.inference.generation import generate
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.checkpoint import CheckpointError, load_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the eagle writes cell by cell. " * 40
OPTIONS = {"pre_ffn": 1, "head_qk": 8, "tiny_att_dim": 8, "tiny_att_layer": 1, "my_pos_emb": 5, "my_testing": "g"}


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        proj_dir=str(tmp_path / "run"), data_file=str(tmp_path / "text.txt"), accelerator="cpu", precision="fp32",
        n_layer=2, n_embd=64, ctx_len=24, micro_bsz=4, epoch_steps=20, epoch_count=2, epoch_save=1, lr_init=5e-3,
        lr_final=1e-3, my_exit_tokens=40 * 96, random_seed=5,
    )  # fmt: skip


def run(cfg, **kwargs):
    return train(cfg, progress=False, **kwargs)


def loss_of(model, cfg):
    idx, targets = next(iter(torch.utils.data.DataLoader(TokenDataset(DataConfig.from_flags(cfg), seed=0), 8)))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()))


def test_every_option_learns_is_stored_and_writes_text(cfg, tmp_path):
    cfg = cfg.replace(**OPTIONS, weight_decay=0.01)
    model = run(cfg)
    assert loss_of(model, cfg) < 1.0 < 2.5 < loss_of(RWKV(model.config), cfg)
    read = RWKV.from_checkpoint(f"{cfg.proj_dir}/rwkv-final.pth")
    assert read.config == model.config
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in read.state_dict().items())
    tokenizer = CharTokenizer.from_text(TEXT)
    greedy = SamplingArgs(top_k=1, alpha_presence=0.0, alpha_frequency=0.0, chunk_len=3)
    text = "".join(generate(read, tokenizer, "the eagle", 12, greedy))
    ids = tokenizer.encode("the eagle")
    for _ in range(12):  # the same without a state: everything read anew for each token
        with torch.no_grad():
            ids.append(int(read(torch.tensor([ids]))[0][0, -1].argmax()))
    assert text == tokenizer.decode(ids)[len("the eagle") :]


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, OPTIONS | {"precision": "bf16"}],
                         ids=["plain", "dropout", "options in bf16"])  # fmt: skip
def test_recomputed_activations_train_to_the_same_bits(cfg, changes):
    cfg = cfg.replace(my_exit_tokens=6 * 96, **changes)
    models = [run(cfg.replace(grad_cp=grad_cp, proj_dir=f"{cfg.proj_dir}{grad_cp}")) for grad_cp in (0, 1)]
    assert models[1].grad_cp and not models[0].grad_cp
    for name, x in models[0].state_dict().items():
        assert torch.equal(x, models[1].state_dict()[name]), name


def test_stage_1_grows_a_deeper_model_that_starts_where_the_old_one_was(cfg):
    small = run(cfg)
    path = f"{cfg.proj_dir}/rwkv-final.pth"
    large = run(cfg.replace(my_pile_stage=1, magic_prime=47, n_layer=4, load_model=path, proj_dir=f"{cfg.proj_dir}-L4"))
    assert loss_of(large, cfg) == pytest.approx(loss_of(small, cfg), rel=1e-5)
    stored = load_checkpoint(f"{cfg.proj_dir}-L4/rwkv-init.pth")
    assert torch.equal(stored["blocks.1.att.key.weight"], small.state_dict()["blocks.1.att.key.weight"])
    assert not stored["blocks.3.att.output.weight"].any()
    with pytest.raises(CheckpointError, match=r"rwkv-final\.pth: .*new one lacks: blocks.1"):
        run(cfg.replace(my_pile_stage=1, magic_prime=47, n_layer=1, load_model=path, proj_dir=f"{cfg.proj_dir}-L1"))


def test_a_model_with_other_options_than_the_flags_is_named(cfg):
    other = RWKV(cfg.replace(vocab_size=len(set(TEXT)), head_qk=8).model_config())
    with pytest.raises(ValueError, match="head_qk=0: the model given has 8"):
        run(cfg, model=other)

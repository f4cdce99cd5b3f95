"""Sizes read from checkpoints, and what is said about files that do not fit."""

import pickle

import pytest
import torch

from rwkv_nb.model.config import ModelConfig, checkpoint_version
from rwkv_nb.model.initialization import init_weights, parameter_shapes
from rwkv_nb.model.rwkv import RWKV

CONFIG = ModelConfig(2, 64, 50, head_size_a=16, dim_att=96, dim_ffn=160)


@pytest.fixture
def weights():
    return init_weights(CONFIG, seed=0)


def saved(tmp_path, weights):
    path = tmp_path / "rwkv-3.pth"
    torch.save(weights, path)
    return path


def test_every_size_is_read_from_the_file(tmp_path, weights):
    model = RWKV.from_checkpoint(saved(tmp_path, weights), ctx_len=77)
    assert model.config == ModelConfig(2, 64, 50, ctx_len=77, head_size_a=16, dim_att=96, dim_ffn=160)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["_forward_module.", "_orig_mod.", "module.model."])
def test_prefixes_of_wrappers_and_dtype(tmp_path, weights, prefix):
    path = saved(tmp_path, {prefix + k: x.bfloat16() for k, x in weights.items()})
    assert RWKV.from_checkpoint(path).emb.weight.dtype == torch.float32
    model = RWKV.from_checkpoint(path, dtype=None)
    assert model.emb.weight.dtype == torch.bfloat16
    assert torch.equal(model.head.weight, weights["head.weight"].bfloat16())


def test_missing_foreign_and_misshapen(tmp_path, weights):
    del weights["blocks.1.att.gate.weight"]
    weights["blocks.1.att.oops"] = torch.zeros(1)
    weights["blocks.1.ffn.value.weight"] = torch.zeros(64, 32)
    with pytest.raises(ValueError) as error:
        RWKV.from_checkpoint(saved(tmp_path, weights))
    message = str(error.value)
    assert "rwkv-3.pth" in message
    assert "missing keys: blocks.1.att.gate.weight" in message and "unknown keys: blocks.1.att.oops" in message
    assert "blocks.1.ffn.value.weight has shape (64, 32), expected (64, 160)" in message


def test_incomplete_file_names_the_key(tmp_path, weights):
    del weights["emb.weight"]
    with pytest.raises(ValueError, match="no 'emb.weight'"):
        RWKV.from_checkpoint(saved(tmp_path, weights))


def others(weights):
    """Keys as the other versions have them."""
    v50 = {k: x for k, x in weights.items() if "gate" not in k and "time_mix_g" not in k}
    v50 |= {k: x[:, 0] for k, x in v50.items() if k.endswith("time_decay")}
    v51 = dict(weights) | {k: x[:, :1] for k, x in weights.items() if k.endswith("time_decay")}
    v4 = {k: x for k, x in v50.items() if "ln_x" not in k}
    v6 = {k.replace("time_mix", "time_maa"): x for k, x in weights.items()}
    v7 = {k.replace("att.time_mix", "att.x"): x for k, x in weights.items()}
    return {"5.0": v50, "5.1": v51, "4": v4, "6": v6, "7": v7, "5.2": weights}


@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "6", "7"])
def test_other_versions_are_recognised_and_named(tmp_path, weights, version):
    other = others(weights)[version]
    assert checkpoint_version(other) == version
    with pytest.raises(ValueError, match=f"rwkv-3.pth.*RWKV-{version};.*5.2"):
        RWKV.from_checkpoint(saved(tmp_path, other))


def test_one_layer_and_any_order_are_still_5_2():
    one = init_weights(ModelConfig(1, 64, 50), seed=0)
    assert checkpoint_version(one) == "5.2"
    assert checkpoint_version(dict(reversed(one.items()))) == "5.2"


class Trap:
    def __reduce__(self):
        return (print, ("code of the file was run",))


def test_files_that_are_no_weights(tmp_path, weights, capsys):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        RWKV.from_checkpoint(tmp_path / "none.pth")
    whole = saved(tmp_path, weights).read_bytes()
    bad = tmp_path / "bad.pth"
    for content in (b"", b"hello", whole[: len(whole) // 2], pickle.dumps(Trap(), protocol=2)):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pth.*not readable"):
            RWKV.from_checkpoint(bad)
    torch.save({"model": Trap()}, bad)
    with pytest.raises(ValueError, match="not readable"):
        RWKV.from_checkpoint(bad)
    assert "code of the file" not in capsys.readouterr().out
    torch.save({"state_dict": weights, "epoch": 3}, bad)
    with pytest.raises(ValueError, match="no dictionary of named tensors"):
        RWKV.from_checkpoint(bad)
    torch.save({"fc.weight": torch.zeros(2, 2)}, bad)
    with pytest.raises(ValueError, match="bad.pth.*not a checkpoint of an RWKV model.*fc.weight"):
        RWKV.from_checkpoint(bad)


def test_derived_sizes_and_counts():
    assert ModelConfig(1, 768, 10).dim_ffn == 2688 and ModelConfig(1, 768, 10).dim_att == 768
    assert ModelConfig(1, 4096, 10).dim_ffn == 14336 and ModelConfig(1, 4096, 10).n_head == 64
    assert ModelConfig(1, 320, 10).dim_ffn == 1120
    assert ModelConfig(12, 768, 65536).n_params == 192_807_936
    assert ModelConfig(24, 2048, 65536).n_params == 1_577_754_624
    assert ModelConfig(32, 4096, 65536).n_params == 7_518_044_160
    assert CONFIG.n_params == sum(torch.Size(s).numel() for s in parameter_shapes(CONFIG).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer = 0"),
        ({"vocab_size": 1.5}, "vocab_size = 1.5"),
        ({"n_embd": 100}, "n_embd = 100 must be a multiple of 32, such as 128"),
        ({"n_embd": 96}, "dim_att = 96.*head_size_a = 64"),
        ({"dim_ffn": 100}, "dim_ffn = 100"),
        ({"dim_att": -64}, "dim_att = -64"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"pre_ffn": -1}, "pre_ffn = -1 must be a whole number"),
        ({"head_qk": 2.5}, "head_qk = 2.5"),
        ({"pre_ffn": 1, "n_layer": 1}, "pre_ffn = 1 takes .* n_layer = 1 .*n_layer = 2 or more"),
        ({"tiny_att_dim": 64}, "tiny_att_dim = 64 with tiny_att_layer = -999: .* 0 to 1"),
        ({"tiny_att_dim": 64, "tiny_att_layer": 2}, "tiny_att_layer = 2: .* 0 to 1"),
        ({"my_pos_emb": 32}, "my_pos_emb = 32 needs ctx_len = 1023 .*not 1024"),
        ({"my_testing": "x060"}, "my_testing = 'x060' is none of .*'x052g'.*MishGLU"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**({"n_layer": 2, "n_embd": 128, "vocab_size": 50} | change))

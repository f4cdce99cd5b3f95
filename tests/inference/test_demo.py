"""The article's inference script: our two variants of it, and itself, on a small model with the World vocabulary."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.inference import demo
from rwkv_nb.inference.engine import load_engine
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import parameter_shapes

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("RWKV_JIT_ON", "0")

# The article's script; only the path, the strategy and the number of tokens are ours.
ARTICLE = """
import os
os.environ['RWKV_JIT_ON'] = '1'
os.environ["RWKV_CUDA_ON"] = '0'
from rwkv.model import RWKV
from rwkv.utils import PIPELINE, PIPELINE_ARGS

model = RWKV(model=MODEL_PATH, strategy='cpu fp32')
pipeline = PIPELINE(model, "rwkv_vocab_v20230424")
ctx = "\\nAttention Free Transformer is"
print(ctx, end='')
def my_print(s):
    print(s, end='', flush=True)
args = PIPELINE_ARGS(temperature = 1.0, top_p = 0.7, top_k = 100, alpha_frequency = 0.25, alpha_presence = 0.25,
                     alpha_decay = 0.996, token_ban = [0], token_stop = [], chunk_len = 256)
pipeline.generate(ctx, token_count=5, args=args, callback=my_print)
print('\\n')
out, state = model.forward([187, 510, 1563, 310, 247], None)
print(out.detach().cpu().numpy())
first = out.clone()
out, state = model.forward([187, 510], None)
out, state = model.forward([1563], state)
out, state = model.forward([310, 247], state)
print(out.detach().cpu().numpy())
print('apart:', float((out - first).abs().max() / first.abs().max()) < 1e-4)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint of two layers for the World vocabulary; it writes noise."""
    g, weights = torch.Generator().manual_seed(0), {}
    for name, shape in parameter_shapes(ModelConfig(2, 32, 65536, head_size_a=32)).items():
        scale = 0.1 if len(shape) == 2 else 0.02
        one = 1.0 if ".ln" in name and name.endswith(".weight") or name == "ln_out.weight" else 0.0
        weights[name] = (one + scale * torch.randn(shape, generator=g)).bfloat16()
    path = tmp_path_factory.mktemp("world") / "tiny.pth"
    torch.save(weights, path)
    return path


def run(*command, **variables):
    return subprocess.run([sys.executable, *map(str, command)], env={**os.environ, **variables}, capture_output=True,
                          text=True, check=False, encoding="utf-8")  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "flags"),
    [("mac", ()), ("cuda", ("--strategy", "cpu fp16")), ("cuda", ("--strategy", "cpu fp32i8 *1 -> cpu bf16"))],
)
def test_the_two_variants_write_and_read_in_pieces(world, variant, flags):
    done = run(ROOT / "scripts" / f"run-inference-{variant}.py", world, "--tokens", 5, "--seed", 1, *flags,
               RWKV_JIT_ON="0", PYTHONIOENCODING="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(demo.PROMPT) and done.stdout.endswith("the logits are the same: yes\n")


def test_without_the_weights_or_the_device_one_line_says_so(world, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        demo.main("cuda fp16", [])
    assert stop.value.code == 2 and "python -m rwkv_nb download eagle-7b" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        demo.main("cuda:99 fp16", [str(world)])
    assert stop.value.code == 1 and "cuda:99 is not there" in capsys.readouterr().err


def test_logits_that_differ_are_said(world):
    engine, ids = load_engine(world), WorldTokenizer().encode(demo.WORDS)
    assert demo.in_pieces(engine, ids, "cpu fp32") == "yes"

    def forgetful(idx, state=None, **rest):
        return engine(idx, None, **rest)

    forgetful.emb, forgetful.config = engine.emb, engine.config
    assert re.fullmatch(r"NO, they differ by \S+ of the largest", demo.in_pieces(forgetful, ids, "cpu bf16"))


@pytest.mark.slow
def test_the_articles_own_script_runs_with_the_pinned_package(world, tmp_path):
    (tmp_path / "article.py").write_text(f"MODEL_PATH = {str(world)!r}\n" + ARTICLE, encoding="utf-8")
    done = run(tmp_path / "article.py", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    assert "\nAttention Free Transformer is" in done.stdout and done.stdout.endswith("apart: True\n")

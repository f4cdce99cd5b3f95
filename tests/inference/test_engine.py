"""One call for three engines, the tokenizer that belongs to a file, and the command line."""

import io
import json
import os

import pytest
import torch

from rwkv_nb.__main__ import main
from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.inference import cli, decoder
from rwkv_nb.inference.engine import PackageEngine, load_engine, read_config, tokenizer_for
from rwkv_nb.inference.generation import generate
from rwkv_nb.inference.memory import Device
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.model.weights import load_weights

os.environ.setdefault("RWKV_JIT_ON", "0")  # read when the package is imported: without it, no minutes of compiling
pytestmark = pytest.mark.usefixtures("one_thread")
CHARS = CharTokenizer.from_text("\n :abcdefghijAUnrst")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A checkpoint of three layers with its vocab.json."""
    folder = tmp_path_factory.mktemp("engine")
    g = torch.Generator().manual_seed(0)
    weights = init_weights(ModelConfig(3, 64, CHARS.vocab_size, ctx_len=32), seed=0)
    weights = {name: (x + 0.1 * torch.randn(x.shape, generator=g)).bfloat16() for name, x in weights.items()}
    torch.save(weights, folder / "tiny.pth")
    CHARS.save(folder / "vocab.json")
    return folder / "tiny.pth"


ENGINES = [
    ("cpu fp32", "auto", decoder.Decoder if decoder.why_not() is None else RWKV, 1e-5),
    ("cpu bf16", "auto", decoder.Decoder if decoder.why_not() is None else RWKV, 0.05),
    ("cpu fp32i8", "auto", decoder.Decoder if decoder.why_not() is None else PackageEngine, 0.1),
    ("cpu fp16", "auto", RWKV, 0.02),
    ("cpu fp16", "package", PackageEngine, 0.03),
    ("cpu bf16 *2+", "auto", PackageEngine, 0.1),
    ("cpu fp32", "package", PackageEngine, 0.03),  # it rounds the embedding after its norm to bfloat16
    ("cpu fp32 *1 -> cpu bf16", "auto", PackageEngine, 0.1),
    ("cpu fp32i8", "package", PackageEngine, 0.2),
]


@pytest.mark.parametrize(("strategy", "engine", "kind", "tolerance"), ENGINES)
def test_every_engine_says_what_the_model_says(file, strategy, engine, kind, tolerance):
    model = RWKV.from_checkpoint(file).double()
    loaded = load_engine(file, strategy, engine)
    assert type(loaded) is kind
    ids = torch.randint(0, CHARS.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    want, _ = model(ids)
    whole, _ = loaded(ids)
    assert whole.shape == want.shape and float((whole - want).abs().max()) < tolerance * float(want.abs().max())
    _, state = loaded(ids[:, :5], None, full_output=False)
    kept = [x.clone() for x in state]
    for t in range(5, 9):
        logits, state = loaded(ids[:, t : t + 1], state)
        assert logits.shape == (2, 1, CHARS.vocab_size)
        assert float((logits[:, 0] - want[:, t]).abs().max()) < tolerance * float(want.abs().max())
    again, _ = loaded(ids[:, 5:6], kept)  # a state that was handed out is not changed by what came after
    assert float((again[:, 0] - want[:, 5]).abs().max()) < tolerance * float(want.abs().max())


def test_the_same_sampler_on_both(file):
    texts = [
        "".join(generate(load_engine(file, "cpu fp32", e), CHARS, "ab", 30, SamplingArgs(temperature=0.0)))
        for e in ("auto", "package")
    ]
    assert len(texts[0]) == 30 and texts[0][:3] == texts[1][:3]  # later a rounded embedding may tip the scales


def test_what_an_engine_cannot_do_is_said(file, tmp_path):
    with pytest.raises(ValueError, match="our engines do one device in one format"):
        load_engine(file, "cpu fp32 *1 -> cpu bf16", "ours")
    with pytest.raises(ValueError, match="engine = 'theirs': choose from auto, ours, package"):
        load_engine(file, "cpu fp32", "theirs")
    with pytest.raises(ValueError, match="'fp17' is no format"):
        load_engine(file, "cpu fp17")
    with pytest.raises(ValueError, match="strategy 'cuda:99 fp16': cuda:99 is not there; torch sees cpu.*Use one of"):
        load_engine(file, "cuda:99 fp16")
    torch.save(init_weights(ModelConfig(1, 64, 5), seed=0), tmp_path / "one.pth")
    with pytest.raises(ValueError, match="n_layer = 1, which the `rwkv` package cannot load"):
        load_engine(tmp_path / "one.pth", "cpu fp32", "package")
    with pytest.raises(ValueError, match="six.pth: these are weights of RWKV-6"):
        torch.save({"emb.weight": torch.zeros(2, 2), "blocks.0.att.time_maa_x": torch.zeros(2)}, tmp_path / "six.pth")
        load_engine(tmp_path / "six.pth")


def test_sizes_are_read_from_the_file_without_its_weights(file, tmp_path):
    assert read_config(file) == ModelConfig.from_state_dict(load_weights(file))
    weights = load_weights(file, mmap=True)
    assert all(torch.equal(weights[name], x) for name, x in load_weights(file).items())
    old = tmp_path / "old.pth"  # as torch before 1.6 wrote it: cannot be read page by page, and need not
    torch.save(load_weights(file), old, _use_new_zipfile_serialization=False)
    assert read_config(old) == read_config(file)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_config(tmp_path / "none.pth")


def test_the_tokenizer_that_belongs_to_a_file(file, tmp_path):
    config, world = ModelConfig(2, 64, CHARS.vocab_size), ModelConfig(2, 64, 65536)
    assert tokenizer_for(config, file).chars == CHARS.chars
    assert isinstance(tokenizer_for(world, tmp_path / "x.pth"), WorldTokenizer)
    assert isinstance(tokenizer_for(world, file, "rwkv_vocab_v20230424"), WorldTokenizer)  # the package's name for it
    with pytest.raises(ValueError, match=r"not the World one \(65536\); put its vocab.json beside it"):
        tokenizer_for(config, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="they do not belong together. It is a World model: give no tokenizer"):
        tokenizer_for(world, file, file.with_name("vocab.json"))
    with pytest.raises(ValueError, match=f"the World tokenizer has 65536 tokens, .*needs {CHARS.vocab_size}: they do"):
        tokenizer_for(config, file, "rwkv_vocab_v20230424")


def test_a_world_model_with_the_20b_tokenizer_is_refused_by_name(tmp_path):
    """The trap of many scripts: 20B_tokenizer.json beside a World model writes nonsense without an error."""
    given = tmp_path / "20B_tokenizer.json"
    content = {"model": {"vocab": {f"t{i}": i for i in range(50254)}},
               "added_tokens": [{"content": f"a{i}"} for i in range(23)] + [{"content": "t0"}]}  # fmt: skip
    given.write_text(json.dumps(content))
    words = "20B_tokenizer.json: .* of 50277 tokens, as the 20B one of GPT-NeoX; .*needs 65536.*It is a World model"
    with pytest.raises(ValueError, match=words):
        tokenizer_for(ModelConfig(2, 64, 65536), "eagle.pth", given)
    with pytest.raises(ValueError, match="not read here, but by the `rwkv` package's PIPELINE"):
        tokenizer_for(ModelConfig(2, 64, 50277), "pile.pth", given)


def run(capsys, *argv):
    code = main(["generate", *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_command_writes_and_repeats_itself(file, capsys, monkeypatch):
    flags = ("--model", file, "--n_tokens", 20, "--seed", 5, "--temperature", 0.8)
    code, text, error = run(capsys, *flags, "--prompt", "abc")
    assert code == 0 and text.startswith("abc") and len(text) == 3 + 20 + 1 and error == ""
    assert run(capsys, *flags, "--prompt", "abc")[1] == text
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert run(capsys, *flags)[1] == text
    stop = text[8:10]
    assert run(capsys, *flags, "--prompt", "abc", "--stop", stop)[1] == "abc" + text[3:-1].split(stop)[0] + "\n"


def test_the_commands_errors_are_one_message(file, capsys, tmp_path):
    for flags, words in (
        (("--model", tmp_path / "none.pth"), "no such checkpoint"),
        (("--model", file, "--strategy", "cpu"), "a format is missing after cpu"),
        (("--model", file, "--top_p", 2), "top_p = 2.0 must be from 0 to 1"),
        (("--model", file, "--prompt", "ab#"), "'#'"),
        (("--model", file, "--tokenizer", "rwkv_vocab_v20230424"), "do not belong together"),
    ):
        code, _, error = run(capsys, *flags)
        assert code == 1 and words in error and "Traceback" not in error


def test_a_plan_is_shown_and_nothing_is_loaded(file, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_nb.inference.engine.load_engine", None)
    code, text, error = run(capsys, "--model", file, "--strategy", "cuda:7 fp16i8 *2 -> cpu fp32", "--plan")
    assert code == 0 and error == "" and f"3 layers of 64, {CHARS.vocab_size} tokens" in text
    assert "0 to 1     cuda:7  float16 in 8 bits" in text and "does NOT fit: this machine has no cuda:7" in text


def test_auto_takes_what_fits(file, capsys, monkeypatch):
    flags = ("--model", file, "--prompt", "ab", "--n_tokens", 3, "--strategy", "auto")
    code, text, error = run(capsys, *flags)
    assert code == 0 and len(text) == 2 + 3 + 1 and error.startswith("strategy: ")
    monkeypatch.setattr("rwkv_nb.inference.devices.this_machine", lambda: {"cpu": Device(1000, 1e9)})
    code, _, error = run(capsys, *flags)
    assert code == 1 and "fit in no strategy; free: cpu 0.0 GB" in error


class Parrot:
    """Stands for an engine: answers with fixed texts, and its state is everything that it has read."""

    training, emb = False, type("Emb", (), {"weight": torch.zeros(1)})

    def __init__(self, *answers):
        self.config = ModelConfig(2, 64, CHARS.vocab_size)
        self.answers = list(answers)

    def __call__(self, idx, state, *, full_output=True):
        read = torch.cat([*(state or []), idx], 1)
        text = CHARS.decode(read[0].tolist())
        turn, said = text.count("Ars:"), text.rsplit("Ars:", 1)[-1]
        left = self.answers[turn - 1][len(said) :] if turn else ""
        logits = torch.full((1, 1, CHARS.vocab_size), -50.0)
        logits[0, 0, CHARS.encode(left[0])[0] if left else 0] = 50.0
        return logits, [read]


def test_a_conversation_is_kept_by_its_state(capsys, monkeypatch):
    monkeypatch.setattr(cli, "USER", "Us:")  # characters that the small vocabulary has
    monkeypatch.setattr(cli, "ASSISTANT", "Ars:")
    lines, engine = iter(["ab", "cd", "/retry", "/reset", "ef", "/quit"]), Parrot(" gh\n\nUs:", " ij\n\nUs:")
    seen = []

    def spy(idx, state=None, **rest):
        logits, after = engine(idx, state, **rest)
        seen.append(CHARS.decode(after[0][0].tolist()))
        return logits, after

    spy.config, spy.training, spy.emb = engine.config, False, engine.emb
    assert cli.chat(spy, CHARS, SamplingArgs(temperature=0), 50, ask=lambda _: next(lines)) == 0
    shown = capsys.readouterr().out
    assert shown.count(" gh") == 2 and shown.count(" ij") == 2 and "Us:" not in shown.split(cli.HELP)[1]
    whole = "Us: ab\n\nArs: gh\n\nUs: cd\n\nArs: ij\n\nUs:"
    assert seen.count(whole) == 2  # the second question, asked twice, each time after the first one alone
    assert max(seen, key=len) == whole and seen[-1] == "Us: ef\n\nArs: gh\n\nUs:"


def test_help_says_what_each_flag_of_sampling_does_and_its_default():
    shown = {action.dest: action for action in cli.parser()._actions}
    texts = [shown[name].help for name in SamplingArgs.__dataclass_fields__]
    assert len(set(texts)) == len(texts)
    for name in ("temperature", "top_p", "top_k", "alpha_presence", "alpha_frequency", "alpha_decay", "chunk_len"):
        assert shown[name].default == getattr(SamplingArgs(), name) and "%(default)s" in shown[name].help
    assert "default: cpu fp32" in cli.parser().format_help()

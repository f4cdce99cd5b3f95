"""Make data/small.pth, the small trained model of notebooks 08 and 09, with its vocabulary and its card.

    python scripts/make_small_checkpoint.py                  all of it, some six minutes on two cores
    python scripts/make_small_checkpoint.py --seconds 150    that long; the same command again goes on

It learns from three texts that need no download: stories of `rwkv_nb.data.stories`, the documentation of this Python's
standard library, and the questions and answers of data/demo.jsonl. To remember over many sentences what was owned is
what it learns last, if at all; so some of the stories are drills, where the thing is named again in the next sentence.
What is held out of each judges it: stories of another seed, a twentieth of the documentation (half of which is used),
every tenth document of demo.jsonl.

What it is not: a benchmark (`benchmarks/characters.py`), or the same on every machine: another Python has another
documentation, another processor rounds otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
from math import log
from pathlib import Path

import torch

from rwkv_nb.data import corpus, stories
from rwkv_nb.data.binidx import MMapIndexedDataset, MMapIndexedDatasetBuilder
from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.entropy import ngram_cross_entropy
from rwkv_nb.data.magic_prime import magic_prime
from rwkv_nb.inference.generation import generate
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.checkpoint import save_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.trainer import Monitor, train

ROOT = Path(__file__).resolve().parent.parent
TARGET, FOLDER = ROOT / "data" / "small.pth", ROOT / "runs" / "small"
TOKENIZER = CharTokenizer(corpus.ALPHABET)
TOKENS, CTX_LEN = 6_000_000, 512  # a window holds two stories: what a story says early, it needs later
STORIES_A_DOCUMENT, DEMO_TIMES = 10, 5  # the demo is short: repeated, it is learnt by heart
DRILLS, DRILL_LINES = 300, 25
HELD_OUT_SEED = 1  # of stories; the corpus itself is made with seed 0
PROMPTS = ("Once there was", "Return ", "User: What is a token?\n\nAssistant:")
HOW = SamplingArgs(temperature=0.7, top_p=0.9, alpha_frequency=0, alpha_presence=0)
JUDGED = 40_000  # characters of each held-out text


def drills() -> list[str]:
    """Documents of short lines: what somebody owned, and what became of it, in the words of the stories."""
    rng = random.Random(0)

    def line() -> str:
        colour, thing, visitor = (rng.choice(stories.RULES[rule])[1] for rule in ("colour", "thing", "visitor"))
        end = rng.choice((f"Then a {visitor} took the {thing}.", f"The {colour} {thing} was gone.",
                          f"A {visitor} asked for the {thing}."))  # fmt: skip
        return f"{rng.choice(('He', 'She'))} owned a {colour} {thing}. {end}"

    return ["\n".join(line() for _ in range(DRILL_LINES)) for _ in range(DRILLS)]


def texts() -> dict[str, tuple[list[str], str]]:
    """Name -> (documents to learn from, held-out text)."""
    told = stories.generate(corpus.STORIES, corpus.STORIES_SEED).rstrip("\n").split("\n\n")
    groups = [told[i : i + STORIES_A_DOCUMENT] for i in range(0, len(told), STORIES_A_DOCUMENT)]
    docs, docs_held = corpus.split(corpus.standard_library_text("docs"), validation=0.05)
    lines = corpus.demo_path().read_text(encoding="utf-8").splitlines()
    talks = [corpus.reduce_characters(text) for line in lines if (text := json.loads(line)["text"]).isascii()]
    return {
        "stories": (["\n\n".join(group) for group in groups] + drills(), stories.generate(400, HELD_OUT_SEED)),
        "documentation": (docs.split(corpus.DOCUMENT_BREAK)[::2], docs_held),  # half: the stories matter more
        "questions and answers": (
            [text for i, text in enumerate(talks) if i % 10], corpus.DOCUMENT_BREAK.join(talks[::10])
        ),
    }  # fmt: skip


def write_data(sources: dict[str, tuple[list[str], str]]) -> int:
    """FOLDER/data.bin and .idx: all documents, mixed; returns the number of tokens."""
    told, docs, talks = (documents for documents, _ in sources.values())
    mixed, rng = told + docs + talks * DEMO_TIMES, random.Random(0)
    mixed = [text for _, text in sorted((rng.random(), text.strip("\n")) for text in mixed)]
    with MMapIndexedDatasetBuilder(FOLDER / "data", tokenizer=TOKENIZER) as builder:
        for text in mixed:
            builder.add_item(TOKENIZER.encode(text + corpus.DOCUMENT_BREAK))
            builder.end_document()
    return MMapIndexedDataset(FOLDER / "data").n_tokens


def flags(n_tokens: int) -> TrainConfig:
    """The run: the model of notebooks 00 and 07, with longer windows."""
    return TrainConfig(
        proj_dir=str(FOLDER), data_file=str(FOLDER / "data"), data_type="binidx", vocab_size=TOKENIZER.vocab_size,
        ctx_len=CTX_LEN, n_layer=3, n_embd=128, micro_bsz=2, my_pile_stage=3,
        magic_prime=magic_prime(n_tokens, CTX_LEN), my_exit_tokens=TOKENS, lr_init=4e-3, lr_final=1e-4,
        warmup_steps=20, random_seed=0, accelerator="cpu", precision="fp32", save_minutes=0.5, epoch_save=0,
    )  # fmt: skip


@torch.no_grad()
def bits(model: RWKV, text: str) -> float:
    """Bits a character on the beginning of a text, read as one stream with its state carried along."""
    ids, state, total = torch.tensor([TOKENIZER.encode(text[: JUDGED + 1])]), None, 0.0
    for start in range(0, ids.shape[1] - 1, CTX_LEN):
        now = ids[:, start : start + CTX_LEN + 1]
        logits, state = model(now[:, :-1], state)
        total += float(torch.nn.functional.cross_entropy(logits[0].float(), now[0, 1:], reduction="sum"))
    return total / (ids.shape[1] - 1) / log(2)


def yardstick(documents: list[str], held_out: str) -> float:
    learnt, judged = (corpus.characters_to_ids(text) for text in ("\n".join(documents), held_out[:JUDGED]))
    return ngram_cross_entropy(learnt, judged, TOKENIZER.vocab_size, 2)


def card(path: Path, spent: dict, sources: dict[str, tuple[list[str], str]]) -> str:
    """The model card, every figure of it measured on the file itself."""
    model, size = RWKV.from_checkpoint(path, dtype=torch.float32), path.stat().st_size
    licences = {
        "stories": "grammar in `rwkv_nb/data/stories.py`, and drills in its words, Apache-2.0",
        "documentation": f"docstrings and language reference of Python {platform.python_version()}, PSF-2.0",
        "questions and answers": "the ASCII ones of `data/demo.jsonl`, Apache-2.0",
    }
    rows = "".join(
        f"| {name} | {licences[name]} | {sum(map(len, documents)):,} | {yardstick(documents, held_out):.2f} "
        f"| {bits(model, held_out):.3f} |\n"
        for name, (documents, held_out) in sources.items()
    )
    samples = "".join(
        f"Prompt `{prompt!r}`:\n\n```text\n{prompt}{write(model, prompt)}\n```\n\n" for prompt in PROMPTS
    )
    c, threads = model.config, f"{spent['threads']} thread{'s' * (spent['threads'] != 1)}"
    return f"""# data/small.pth

A small RWKV-5.2, so that notebooks 08 and 09 have a trained model at once. It is a toy: it tells stories about cats and
lamps, in which it often forgets who owned what, and has the tone of Python's documentation and of questions and answers
without their sense. Made by `python scripts/make_small_checkpoint.py`, which also wrote this page.

| | |
|:--|:--|
| sizes | n_layer {c.n_layer}, n_embd {c.n_embd}, head size {c.head_size_a}, vocab_size {c.vocab_size}; \
{sum(p.numel() for p in model.parameters()):,} parameters |
| file | {size:,} bytes, bfloat16, official names; SHA-256 `{hashlib.sha256(path.read_bytes()).hexdigest()}` |
| tokenizer | characters, `vocab.json` beside it: {TOKENIZER.name}; three empty lines end a document |
| training | {spent["tokens"]:,} characters in {spent["seconds"]:.0f} s on {threads}, float32, windows of \
{CTX_LEN}, seed 0, torch {torch.__version__.split("+")[0]} |
| licence | Apache-2.0, as the repository; what it learnt from has the licences below |

| text | what it is, its licence | characters to learn from | held out: bits a character of a bigram | of this model |
|:--|:--|--:|--:|--:|
{rows}
No model can have fewer than {stories.entropy_bits_per_character():.3f} bits a character on the stories: that is the
entropy of their grammar.

## What it writes

temperature {HOW.temperature}, top_p {HOW.top_p}, no penalties, seed 0.

{samples}The last answer is made up: do not believe it.
"""


def write(model: RWKV, prompt: str) -> str:
    g = generate(model, TOKENIZER, prompt, 320, HOW, generator=torch.Generator().manual_seed(0),
                 stop=[corpus.DOCUMENT_BREAK])  # fmt: skip
    return "".join(g).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="stop after so much training; the same command goes on")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    sources, notes = texts(), FOLDER / "spent.json"
    cfg = flags(write_data(sources))
    spent = json.loads(notes.read_text()) if notes.exists() else {"seconds": 0.0, "tokens": 0}
    if not spent["tokens"]:
        train(cfg.replace(my_pile_stage=1), progress=False)  # initial weights
    watch = Monitor(every_seconds=10, on_record=lambda r: print(f"{r.tokens:,} characters: {r.loss / log(2):.3f} bits"))
    model = train(cfg, callbacks=[watch], max_seconds=args.seconds, progress=False)
    if not watch.records and spent["tokens"] < TOKENS:
        raise SystemExit(f"{FOLDER}: this run is over, but not how long it took: remove the folder and begin again")
    if watch.records:
        spent = {"seconds": spent["seconds"] + watch.seconds, "tokens": watch.records[-1].tokens,
                 "threads": torch.get_num_threads()}
        notes.write_text(json.dumps(spent))
    if spent["tokens"] < TOKENS:
        print(f"{spent['tokens']:,} of {TOKENS:,} characters; call again to go on")
        return
    save_checkpoint(model, TARGET, "bf16")
    TOKENIZER.save(TARGET.with_name("vocab.json"))
    TARGET.with_suffix(".md").write_text(card(TARGET, spent, sources), encoding="utf-8")
    print(f"wrote {TARGET.name}, vocab.json, {TARGET.stem}.md")


if __name__ == "__main__":
    main()

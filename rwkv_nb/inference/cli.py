"""`python -m rwkv_nb generate`: continue a prompt, or keep a conversation.

    python -m rwkv_nb generate --model rwkv-final.pth --prompt "The eagle" --n_tokens 100
    python -m rwkv_nb generate --model RWKV-5-World-7B.pth --strategy 'cuda fp16' --chat
    python -m rwkv_nb generate --model RWKV-5-World-7B.pth --strategy auto --plan

With --strategy auto the quickest strategy is taken that fits the memory found; --plan shows a strategy's bytes and
whether they fit, and loads nothing. Environment variables: RWKV_JIT_ON and RWKV_CUDA_ON are the `rwkv` package's own
switches (`package.py`); our engines need neither.

Text is printed as it comes. The flags of sampling have the names of the `rwkv` package's PIPELINE_ARGS. In a
conversation the state is kept between turns: what was said before is not read again.

What it is not: an engine (`engine.py`) or the loop (`generation.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import: not before it is needed
    import torch

    from rwkv_nb.data.protocol import Tokenizer
    from rwkv_nb.model.config import ModelConfig

    from .protocol import Engine
    from .sampling import SamplingArgs

PROGRAM = "python -m rwkv_nb generate"
USER, ASSISTANT = "User:", "Assistant:"  # the form that World models were tuned with
HELP = "Empty line or /quit: leave. /reset: forget everything. /retry: another answer. Ctrl-C: stop the answer."


def parser() -> argparse.ArgumentParser:
    """Flags and their defaults."""
    from .sampling import SamplingArgs

    made = argparse.ArgumentParser(PROGRAM, description="Write with an RWKV-5 model.", allow_abbrev=False)
    add, default = made.add_argument, SamplingArgs()
    add("--model", required=True, help="a .pth file of RWKV-5.2")
    add("--strategy", default="cpu fp32", help="such as 'cuda fp16i8 *10 -> cpu fp32'; auto: the quickest that fits "
                                               "(default: %(default)s)")  # fmt: skip
    add("--plan", action="store_true", help="show what the strategy puts where and whether it fits, and end")
    add("--engine", default="auto", help="auto, ours or package (the `rwkv` package); default: %(default)s")
    add("--tokenizer", help="a vocab.json, or rwkv_vocab_v20230424; default: World for 65536 tokens, else the "
                            "vocab.json beside the model")  # fmt: skip
    add("--prompt", help="the beginning of the text; default: standard input")
    add("--chat", action="store_true", help="a conversation in the form 'User: … Assistant:'")
    add("--n_tokens", type=int, default=256, help="write at most so many tokens, or of an answer (%(default)s)")
    for name, kind, text in (
        ("temperature", float, "below 1 surer, above 1 wilder; 0: the likeliest token, always"),
        ("top_p", float, "the likeliest tokens that together reach this; 1: all"),
        ("top_k", int, "at most so many tokens; 0: no limit"),
        ("alpha_presence", float, "taken once from the logit of every token written so far"),
        ("alpha_frequency", float, "taken from it once more for each time that it was written"),
        ("alpha_decay", float, "factor on these counts at each step: what is long past is forgiven"),
        ("chunk_len", int, "tokens of the prompt read at a time"),
    ):
        add(f"--{name}", type=kind, default=getattr(default, name), help=f"{text} (%(default)s)")
    add("--token_ban", type=int, nargs="*", default=(), help="ids that are never drawn")
    add("--token_stop", type=int, nargs="*", help="ids that end the text; default with World: 0, the end of a document")
    add("--stop", action="append", default=[], help="a text that ends the writing; may be repeated")
    add("--seed", type=int, help="the same seed writes the same text")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code; ValueError and OSError are the caller's to print."""
    options = parser().parse_args(list(argv))
    from .sampling import SamplingArgs

    fields = {name: getattr(options, name) for name in SamplingArgs.__dataclass_fields__}
    fields |= {"token_ban": tuple(options.token_ban), "token_stop": tuple(options.token_stop or ())}
    args = SamplingArgs(**fields)  # before anything large is loaded
    import torch

    from rwkv_nb.data.tokenizer import WorldTokenizer

    from .engine import load_engine, read_config, tokenizer_for
    from .generation import generate

    config = read_config(options.model)  # what does not belong together is refused before gigabytes are read
    tokenizer = tokenizer_for(config, options.model, options.tokenizer)
    strategy = choose(config, options.strategy, options.engine, options.plan)
    if options.plan:
        return 0
    engine = load_engine(options.model, strategy, options.engine)
    if options.token_stop is None and isinstance(tokenizer, WorldTokenizer):
        args = dataclasses.replace(args, token_stop=(0,))
    generator = None
    if options.seed is not None:
        try:
            generator = torch.Generator().manual_seed(options.seed)
        except (RuntimeError, ValueError, OverflowError) as error:
            raise ValueError(f"--seed {options.seed}: must be a whole number that fits into 64 bits") from error
    if options.chat:
        return chat(engine, tokenizer, args, options.n_tokens, generator, options.stop)
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    print(prompt, end="", flush=True)
    for piece in generate(engine, tokenizer, prompt, options.n_tokens, args, generator=generator, stop=options.stop):
        print(piece, end="", flush=True)
    print()
    return 0


def choose(config: ModelConfig, strategy: str, engine: str, show: bool) -> str:
    """The strategy to load; "auto" becomes the best for the memory found. show: print its plan.

    Raises ValueError if the strategy cannot be, or with "auto" if none fits.
    """
    if strategy != "auto" and not show:
        return strategy
    from . import report
    from .devices import this_machine
    from .engine import ours_can, slowness
    from .memory import UNPACKING, best_strategy, memory_plan
    from .strategy import parse_strategy

    machine = this_machine()
    slow = UNPACKING if engine == "package" else slowness()
    if strategy == "auto":
        needed = best_strategy(config, machine, slow, ours_can if engine == "ours" else None)
        if needed is None:
            free = ", ".join(f"{name} {device.memory / 1e9:.1f} GB" for name, device in machine.items())
            raise ValueError(f"--strategy auto: {config.n_params:,} parameters fit in no strategy"
                             f"{' of our engine' if engine == 'ours' else ''}; free: {free}")
        print(f"strategy: {needed.plan.text}", file=sys.stderr)
    else:
        plan = parse_strategy(strategy, config.n_layer)
        needed = memory_plan(plan, config, slow if ours_can(plan) else UNPACKING)
    if show:
        print(f"{config.n_layer} layers of {config.n_embd}, {config.vocab_size} tokens, {config.n_params:,} parameters")
        print(report.text(needed, machine))
    return needed.plan.text


def chat(
    engine: Engine, tokenizer: Tokenizer, args: SamplingArgs, n_tokens: int, generator: torch.Generator | None = None,
    stop: Sequence[str] = (), ask: Callable[[str], str] = input,
) -> int:  # fmt: skip
    """Keep a conversation until an empty line. `ask` shows a prompt and returns a line, as `input` does."""
    from .generation import generate

    print(HELP)
    before = heard = None  # (state, whether it ends with the beginning of a turn); before: the last question
    question = ""
    stops = [f"\n\n{USER}", *stop]
    while True:
        try:
            said = ask(f"\n{USER} ").strip()
        except EOFError:
            break
        if said in ("", "/quit"):
            break
        if said == "/reset":
            heard = None
            continue
        if said == "/retry":
            if not question:
                continue
            heard = before
        else:
            before, question = heard, said
        state, begun = heard or (None, True)
        opening = "" if begun and state is not None else USER if state is None else f"\n\n{USER}"
        g = generate(
            engine, tokenizer, f"{opening} {question}\n\n{ASSISTANT}", n_tokens, args, state, generator, stop=stops
        )
        print(ASSISTANT, end="", flush=True)
        try:
            for piece in g:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            g.cancel()
        print()
        heard = (g.state, g.stopped_by == stops[0])
    return 0

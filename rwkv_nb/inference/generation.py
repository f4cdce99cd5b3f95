"""Writing text: read a prompt, then draw a token, read it, draw the next.

    for piece in generate(model, tokenizer, "The eagle", 100, SamplingArgs()):
        print(piece, end="")

`generate` returns a `Generation`: iterate over it for the pieces of text, ask it for `text`, `tokens`, `state`.
`generate_batch` writes several texts at once, for little more than the time of one.

What it is not: the choice of a token (`sampling.py`), penalties and stop strings (`row.py`), or strategies for large
models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rwkv_nb.data.protocol import Tokenizer
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.model.options import join_states

from .protocol import Engine
from .row import Row
from .sampling import SamplingArgs


def generate(
    model: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    n_tokens: int,
    args: SamplingArgs | None = None,
    state: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
    stop: Sequence[str] = (),
    logits: Tensor | None = None,
) -> Generation:
    """Continue a prompt by up to n_tokens tokens.

    Args:
        model: an `RWKV`, a `Decoder`, or what is called like them. Dropout is off while it writes, whatever its mode.
        tokenizer: WorldTokenizer or CharTokenizer, the one that the model was trained with.
        prompt: read before the first draw. An empty one stands for the start of a text: token 0, the end of the
            document before, with the World tokenizer; a newline with characters.
        n_tokens: at most so many; a token of args.token_stop ends the text sooner.
        args: settings; None takes the defaults.
        state: continue after what this state has read; None starts fresh. It is not changed.
        generator: a CPU torch.Generator for repeatable draws.
        stop: texts that end the writing when they appear, and are not shown themselves.
        logits: the prediction that came with `state`. With both, an empty prompt reads nothing: writing goes on from
            where the state stands, so that one prompt, read once, can be continued many times.

    Returns:
        A `Generation`. Nothing is computed before it is iterated over.

    Raises:
        ValueError: model and tokenizer do not belong together, the prompt cannot be encoded, or n_tokens < 0.
    """
    return Generation(model, tokenizer, prompt, n_tokens, args or SamplingArgs(), state, generator, stop, logits)


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """What stands for "a text begins here" when a prompt is empty."""
    if isinstance(tokenizer, WorldTokenizer):
        return [0]
    try:
        return tokenizer.encode("\n")
    except ValueError as error:
        raise ValueError(
            "generate: the prompt is empty and the vocabulary has no newline to start from; "
            "give a prompt of at least one character"
        ) from error


def first_tokens(
    tokenizer: Tokenizer, prompt: str, state: list[Tensor] | None, logits: Tensor | None
) -> list[int]:
    """What is read before the first draw: the prompt; nothing if it is empty and state and logits go on from there.

    Raises ValueError for logits without the state that they belong to.
    """
    if logits is not None and state is None:
        raise ValueError("generate: logits are given without the state that they belong to; give both, or neither")
    return tokenizer.encode(prompt) or ([] if logits is not None else start_tokens(tokenizer))


class Generation:
    """A text being written; iterating over it gives the pieces as they come (whole characters, never empty).

    Attributes:
        tokens: ids drawn so far, without the stop token.
        text: their text so far.
        state: the model's state after the prompt and all of `tokens`. Valid between pieces and at the end, so that
            `generate(…, prompt=more, state=self.state)` goes on from there. After a stop string it has read that too.
        logits: (V,) the model's prediction for the token after those, without penalties.
        stopped_by: the token of args.token_stop or the text of `stop` that ended the writing; None if there was none.
        cancelled: `cancel` was called.
    """

    def __init__(
        self, model: Engine, tokenizer: Tokenizer, prompt: str, n_tokens: int, args: SamplingArgs,
        state: list[Tensor] | None, generator: torch.Generator | None, stop: Sequence[str] = (),
        logits: Tensor | None = None,
    ):  # fmt: skip
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.prompt_tokens = first_tokens(tokenizer, prompt, state, logits)
        self.state, self.logits = state, logits
        self._cancelled = False
        self._row = Row(tokenizer, model.config.vocab_size, n_tokens, args, stop, generator)
        self._pieces = self._write()

    tokens = property(lambda self: self._row.tokens)
    text = property(lambda self: self._row.text)
    stopped_by = property(lambda self: self._row.stopped_by)
    cancelled = property(lambda self: self._cancelled)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """Write no more, from any thread: the iteration ends after the token at hand, or the chunk of the prompt.

        `state` stays valid: it has read `tokens`, or that part of the prompt.
        """
        self._cancelled = True

    def _write(self) -> Iterator[str]:
        for start in range(0, len(self.prompt_tokens), self.args.chunk_len):
            if self._cancelled:
                break
            self._read(self.prompt_tokens[start : start + self.args.chunk_len])
        while not (self._cancelled or self._row.over):
            token = self._row.draw(self.logits)
            if token is None:
                break
            self._read([token])
            if piece := self._row.take(token):
                yield piece
        if rest := self._row.finish():
            yield rest

    def _read(self, tokens: list[int]) -> None:
        self.logits, self.state = read(self.model, tokens, self.state, self.args.chunk_len)


def generate_batch(
    model: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    n_tokens: int,
    args: SamplingArgs | None = None,
    states: Sequence[list[Tensor] | None] | None = None,
    generators: Sequence[torch.Generator | None] | None = None,
    stop: Sequence[str] = (),
    logits: Sequence[Tensor | None] | None = None,
) -> list[Row]:
    """Continue several prompts together; each row is what `generate` would write for it alone, with its own generator.

    Args: as `generate`, one prompt, state, generator and logits a row. Prompts may differ in length: each is read on
        its own, then all rows take their steps together, and a row that is over leaves.

    Returns:
        A `Row` for each prompt, with `text`, `tokens`, `stopped_by`, and `state`, its own state at the end.
    """
    check_tokenizer(model, tokenizer)
    args, n = args or SamplingArgs(), len(prompts)
    states, generators, found = (
        [None] * n if given is None else list(given) for given in (states, generators, logits)
    )
    if not n == len(states) == len(generators) == len(found):
        raise ValueError(
            f"generate_batch: {n} prompts, {len(states)} states, {len(generators)} generators, {len(found)} logits; "
            "give one of each a row"
        )
    rows = [Row(tokenizer, model.config.vocab_size, n_tokens, args, stop, g) for g in generators]
    tokens = [first_tokens(tokenizer, *each) for each in zip(prompts, states, found, strict=True)]
    for i in range(n):
        if tokens[i]:
            found[i], states[i] = read(model, tokens[i], states[i], args.chunk_len)
    while active := [i for i in range(n) if not rows[i].over]:
        drawn = {i: token for i in active if (token := rows[i].draw(found[i])) is not None}
        if not drawn:
            break
        together = join_states([states[i] for i in drawn])
        after, together = _step(model, torch.tensor([[token] for token in drawn.values()]), together)
        for b, (i, token) in enumerate(drawn.items()):
            found[i], states[i] = after[b, -1].float().cpu(), [x[b : b + 1] for x in together]
            rows[i].take(token)
    for row, state in zip(rows, states, strict=True):
        row.finish()
        row.state = state
    return rows


def read(
    model: Engine, tokens: list[int], state: list[Tensor] | None, chunk_len: int
) -> tuple[Tensor, list[Tensor]]:
    """Feed tokens to the model in chunks: the logits (V,) after the last, float32 on the CPU, and the state."""
    for start in range(0, len(tokens), chunk_len):
        logits, state = _step(model, torch.tensor([tokens[start : start + chunk_len]]), state)
    return logits[0, -1].float().cpu(), state


@torch.no_grad()
def _step(model, idx: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    dropping = model.training and model.config.dropout > 0
    if dropping:
        model.eval()
    try:
        return model(idx.to(model.emb.weight.device), state, full_output=False)
    finally:
        if dropping:
            model.train()


def check_tokenizer(model: Engine, tokenizer: Tokenizer) -> None:
    """Raise ValueError if these two cannot belong together."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"generate: the tokenizer has vocab_size = {tokenizer.vocab_size}, the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )

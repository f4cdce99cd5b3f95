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

from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.model.options import join_states
from rwkv_nb.model.rwkv import RWKV

from .row import Row
from .sampling import SamplingArgs


def generate(
    model: RWKV,
    tokenizer,
    prompt: str,
    n_tokens: int,
    args: SamplingArgs | None = None,
    state: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
    stop: Sequence[str] = (),
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

    Returns:
        A `Generation`. Nothing is computed before it is iterated over.

    Raises:
        ValueError: model and tokenizer do not belong together, the prompt cannot be encoded, or n_tokens < 0.
    """
    return Generation(model, tokenizer, prompt, n_tokens, args or SamplingArgs(), state, generator, stop)


def start_tokens(tokenizer) -> list[int]:
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


class Generation:
    """A text being written; iterating over it gives the pieces as they come (whole characters, never empty).

    Attributes:
        tokens: ids drawn so far, without the stop token.
        text: their text so far.
        state: the model's state after the prompt and all of `tokens`. Valid between pieces and at the end, so that
            `generate(…, prompt=more, state=self.state)` goes on from there. After a stop string it has read that too.
        logits: (V,) the model's prediction for the token after those, without penalties.
        stopped_by: the token of args.token_stop or the text of `stop` that ended the writing; None if there was none.
    """

    def __init__(self, model, tokenizer, prompt, n_tokens, args, state, generator, stop=()):
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.prompt_tokens = tokenizer.encode(prompt) or start_tokens(tokenizer)
        self.state = state
        self.logits: Tensor | None = None
        self._row = Row(tokenizer, model.config.vocab_size, n_tokens, args, stop, generator)
        self._pieces = self._write()

    tokens = property(lambda self: self._row.tokens)
    text = property(lambda self: self._row.text)
    stopped_by = property(lambda self: self._row.stopped_by)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """Write no more: the iteration ends after the token at hand. From any thread; `state` stays valid."""
        self._row.over = True

    def _write(self) -> Iterator[str]:
        self.logits, self.state = read(self.model, self.prompt_tokens, self.state, self.args.chunk_len)
        while not self._row.over:
            token = self._row.draw(self.logits)
            if token is None:
                break
            self.logits, self.state = read(self.model, [token], self.state, self.args.chunk_len)
            if piece := self._row.take(token):
                yield piece
        if rest := self._row.finish():
            yield rest


def generate_batch(
    model,
    tokenizer,
    prompts: Sequence[str],
    n_tokens: int,
    args: SamplingArgs | None = None,
    states: Sequence[list[Tensor] | None] | None = None,
    generators: Sequence[torch.Generator | None] | None = None,
    stop: Sequence[str] = (),
) -> list[Row]:
    """Continue several prompts together; each row is what `generate` would write for it alone, with its own generator.

    Args: as `generate`, one prompt, state and generator a row. Prompts may differ in length: each is read on its own,
        then all rows take their steps together, and a row that is over leaves.

    Returns:
        A `Row` for each prompt, with `text`, `tokens`, `stopped_by`, and `state`, its own state at the end.
    """
    check_tokenizer(model, tokenizer)
    args, n = args or SamplingArgs(), len(prompts)
    states, generators = list(states or [None] * n), list(generators or [None] * n)
    if not n == len(states) == len(generators):
        raise ValueError(
            f"generate_batch: {n} prompts, {len(states)} states, {len(generators)} generators; give one of each a row"
        )
    rows = [Row(tokenizer, model.config.vocab_size, n_tokens, args, stop, g) for g in generators]
    tokens = [tokenizer.encode(prompt) or start_tokens(tokenizer) for prompt in prompts]
    logits: list[Tensor] = [torch.empty(0)] * n
    for i in range(n):
        logits[i], states[i] = read(model, tokens[i], states[i], args.chunk_len)
    while active := [i for i in range(n) if not rows[i].over]:
        drawn = {i: token for i in active if (token := rows[i].draw(logits[i])) is not None}
        if not drawn:
            break
        together = join_states([states[i] for i in drawn])
        found, together = _step(model, torch.tensor([[token] for token in drawn.values()]), together)
        for b, (i, token) in enumerate(drawn.items()):
            logits[i], states[i] = found[b, -1].float().cpu(), [x[b : b + 1] for x in together]
            rows[i].take(token)
    for row, state in zip(rows, states, strict=True):
        row.finish()
        row.state = state
    return rows


def read(model, tokens: list[int], state: list[Tensor] | None, chunk_len: int) -> tuple[Tensor, list[Tensor]]:
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


def check_tokenizer(model, tokenizer) -> None:
    """Raise ValueError if these two cannot belong together."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"generate: the tokenizer has vocab_size = {tokenizer.vocab_size}, the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )

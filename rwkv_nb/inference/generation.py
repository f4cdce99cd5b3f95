"""Writing text: read a prompt, then draw a token, read it, draw the next.

    for piece in generate(model, tokenizer, "The eagle", 100, SamplingArgs()):
        print(piece, end="")

`generate` returns a `Generation`: iterate over it for the pieces of text, ask it for `text`, `tokens`, `state`.

Penalties for repetition, as in the `rwkv` package: a token that was generated (the prompt does not count) loses
alpha_presence + alpha_frequency * occ from its logit, where occ counts its occurrences. At each step all occ are first
multiplied by alpha_decay; then the new token's grows by 1, or by 0 if its text is a digit, a space or a tab.

What it is not: the choice of a token, which is in `sampling.py`; the strategies for large models.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_nb.data.tokenizer import IncrementalDecoder, WorldTokenizer
from rwkv_nb.model.rwkv import RWKV

from .sampling import SamplingArgs, sample_logits

NOT_COUNTED = frozenset(" \t0123456789")  # texts of tokens that repeat without growing penalty


def generate(
    model: RWKV,
    tokenizer,
    prompt: str,
    n_tokens: int,
    args: SamplingArgs | None = None,
    state: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue a prompt by up to n_tokens tokens.

    Args:
        model: an `RWKV`. Dropout is off while it writes, whatever its mode.
        tokenizer: WorldTokenizer or CharTokenizer, the one that the model was trained with.
        prompt: read before the first draw. An empty one stands for the start of a text: token 0, the end of the
            document before, with the World tokenizer; a newline with characters.
        n_tokens: at most so many; a token of args.token_stop ends the text sooner.
        args: settings; None takes the defaults.
        state: continue after what this state has read; None starts fresh. It is not changed.
        generator: a CPU torch.Generator for repeatable draws.

    Returns:
        A `Generation`. Nothing is computed before it is iterated over.

    Raises:
        ValueError: model and tokenizer do not belong together, the prompt cannot be encoded, or n_tokens < 0.
    """
    return Generation(model, tokenizer, prompt, n_tokens, args or SamplingArgs(), state, generator)


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
            `generate(…, prompt=more, state=self.state)` goes on from there.
        logits: (V,) the model's prediction for the token after those, without penalties.
        stopped_by: the token of args.token_stop that ended the text; None if there was none.
    """

    def __init__(self, model, tokenizer, prompt, n_tokens, args, state, generator):
        if not isinstance(n_tokens, int) or n_tokens < 0:
            raise ValueError(f"generate: n_tokens = {n_tokens!r} must be a whole number of at least 0")
        V = model.config.vocab_size
        if tokenizer.vocab_size != V:
            raise ValueError(
                f"generate: the tokenizer has vocab_size = {tokenizer.vocab_size}, the model {V}; "
                "use the tokenizer that the model was trained with"
            )
        self.model, self.tokenizer, self.args, self.generator = model, tokenizer, args, generator
        self.n_tokens = n_tokens
        self.prompt_tokens = tokenizer.encode(prompt) or start_tokens(tokenizer)
        self.tokens: list[int] = []
        self.text = ""
        self.state = state
        self.logits: Tensor | None = None
        self.stopped_by: int | None = None
        self._pieces = self._write()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @torch.no_grad()
    def _read(self, tokens: list[int]) -> None:
        """Feed tokens to the model in chunks; leaves state and logits after the last."""
        device = self.model.emb.weight.device
        dropping = self.model.training and self.model.config.dropout > 0
        if dropping:
            self.model.eval()
        try:
            for start in range(0, len(tokens), self.args.chunk_len):
                idx = torch.tensor([tokens[start : start + self.args.chunk_len]], device=device)
                logits, self.state = self.model(idx, self.state, full_output=False)
        finally:
            if dropping:
                self.model.train()
        self.logits = logits[0, -1].float().cpu()

    def _write(self) -> Iterator[str]:
        args, decoder = self.args, IncrementalDecoder(self.tokenizer)
        self._read(self.prompt_tokens)
        n_known = max(self.tokenizer.vocab) + 1  # the World vocabulary leaves a few ids without a text
        seen = torch.zeros(len(self.logits), dtype=torch.bool)
        occ = torch.zeros(len(self.logits), dtype=torch.float64)
        while len(self.tokens) < self.n_tokens:
            logits = self.logits - (seen * args.alpha_presence + occ * args.alpha_frequency)
            logits[n_known:] = -torch.inf
            token = sample_logits(logits, args, self.generator)
            if token in args.token_stop:
                self.stopped_by = token
                break
            occ *= args.alpha_decay
            seen[token] = True
            occ[token] += self.tokenizer.decode([token]) not in NOT_COUNTED
            self._read([token])
            self.tokens.append(token)
            piece = decoder.push(token)
            self.text += piece
            if piece:
                yield piece
        rest = decoder.finish()  # bytes of a character that was never completed, as U+FFFD
        self.text += rest
        if rest:
            yield rest

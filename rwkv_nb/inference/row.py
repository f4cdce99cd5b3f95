"""One text being written, apart from the model: which token comes next, what text it completes, whether it is over.

`generate` has one row, `generate_batch` several. Penalties for repetition, as in the `rwkv` package: a token that was
generated (the prompt does not count) loses alpha_presence + alpha_frequency * occ from its logit, where occ counts its
occurrences. At each step all occ are first multiplied by alpha_decay; then the new token's grows by 1, or by 0 if its
text is a digit, a space or a tab.

What it is not: the choice among probabilities (`sampling.py`), or the reading of tokens (`generation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_nb.data.protocol import Tokenizer
from rwkv_nb.data.tokenizer import IncrementalDecoder

from .sampling import SamplingArgs, sample_logits

PIECES = 4096  # of text that are kept apart
NOT_COUNTED = frozenset(" \t0123456789")  # texts of tokens that repeat without growing penalty


class Row:
    """What has been written and what is still allowed.

    Attributes:
        tokens: ids drawn so far, without a stop token.
        text: what of them may be shown: never a stop string, nor its beginning at the end while more may come.
        over: nothing more will be drawn. stopped_by: the stop token (int) or stop string that ended it, or None.
        state: with `generate_batch`, the model's state after the prompt and all of `tokens`.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, n_tokens: int, args: SamplingArgs, stop: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        if not isinstance(n_tokens, int) or n_tokens < 0:
            raise ValueError(f"generate: n_tokens = {n_tokens!r} must be a whole number of at least 0")
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"generate: stop = {stop!r} must be a list of texts of at least one character each")
        self.tokenizer, self.args, self.n_tokens, self.stop = tokenizer, args, n_tokens, tuple(stop)
        self.generator = generator
        self.tokens: list[int] = []
        self._shown: list[str] = []  # pieces, joined now and then: a text would be copied at every token
        self.stopped_by: int | str | None = None
        self.over = n_tokens == 0
        self.state: list[Tensor] | None = None
        self._decoder, self._held = IncrementalDecoder(tokenizer), ""  # held: perhaps the beginning of a stop string
        self._n_known = max(tokenizer.vocab) + 1  # the World vocabulary leaves a few ids without a text
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._occ = torch.zeros(vocab_size, dtype=torch.float64)

    @property
    def text(self) -> str:
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def draw(self, logits: Tensor) -> int | None:
        """The next token, from the model's logits (V,); None if it is a stop token: then the row is over."""
        token = sample_logits(self.penalised(logits), self.args, self.generator)
        if token in self.args.token_stop:
            self.stopped_by, self.over = token, True
            return None
        self.count(token)
        return token

    def penalised(self, logits: Tensor) -> Tensor:
        """Logits (V,) less the penalties of what was drawn, -inf for ids that have no text. A new tensor."""
        found = logits - (self._seen * self.args.alpha_presence + self._occ * self.args.alpha_frequency)
        found[self._n_known :] = -torch.inf
        return found

    def count(self, token: int) -> None:
        """Remember for the penalties that a token was drawn; `draw` does so itself."""
        self._occ *= self.args.alpha_decay
        self._seen[token] = True
        self._occ[token] += self.tokenizer.decode([token]) not in NOT_COUNTED

    def take(self, token: int) -> str:
        """Add a token that was drawn; returns the text that can now be shown."""
        self.tokens.append(token)
        self.over = len(self.tokens) >= self.n_tokens
        return self._show(self._decoder.push(token))

    def finish(self) -> str:
        """The rest of the text: what was held back, with U+FFFD for a character that was never completed."""
        self.over = True
        piece = self._show(self._decoder.finish()) if not isinstance(self.stopped_by, str) else ""
        rest, self._held = (self._held, "") if not isinstance(self.stopped_by, str) else ("", "")
        self._keep(rest)
        return piece + rest

    def _show(self, piece: str) -> str:
        text = self._held + piece
        found = [(at, -len(s), s) for s in self.stop if (at := text.find(s)) >= 0]
        if found:  # the first to begin; of those the longest
            at, _, self.stopped_by = min(found)
            self.over, shown, self._held = True, text[:at], ""
        else:
            keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._keep(shown)
        return shown

    def _keep(self, shown: str) -> None:
        self._shown.append(shown)
        if len(self._shown) > PIECES:
            self._shown = ["".join(self._shown)]

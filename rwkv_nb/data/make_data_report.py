"""What make_data prints: numbers, previews, and the flags to paste.

What it is not: the work itself (make_data.py) or the prime's arithmetic (magic_prime.py).
Source of the contents: what RWKV-LM RWKV-v5/make_data.py prints, with the reasons that it leaves out.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_nb.data.magic_prime import SAMPLES_PER_EPOCH, MagicPrime
from rwkv_nb.data.tokenizer import IncrementalDecoder, WorldTokenizer

PREVIEW = 100  # tokens shown of each end of an item, as in the official script


@dataclass(frozen=True)
class MakeDataReport:
    """What make_data did. `str()` of it is a report to print; nothing in it depends on time or place."""

    jsonl: str
    prefix: str
    n_epoch: int
    seed: int  # the one that was drawn, if none was given
    documents: int
    items: int  # documents * n_epoch
    tokens: int
    dtype: str
    skipped: int  # bad lines left out (on_error="skip")
    problems: tuple[str, ...]  # the first few of them
    first: str  # previews of the first and the last item
    last: str
    vocab_size: int  # of the tokenizer
    magic: MagicPrime  # prime, ratio, mini-epochs, and whether official trainers take them

    @property
    def prime(self) -> int | None:
        """The magic prime for ctx_len, None if there is too little data."""
        return self.magic.prime

    @property
    def flags(self) -> str:
        """To paste after `train`; empty without a prime."""
        data = f"--data_file {shlex.quote(self.prefix)} --data_type binidx --vocab_size {self.vocab_size}"
        return f"{self.magic.flags} {data}" if self.magic.flags else ""

    def __str__(self) -> str:
        lines = [f"{self.jsonl} -> {self.prefix}.bin, {self.prefix}.idx"]
        if self.skipped:
            more = f" and {self.skipped - len(self.problems)} more" if self.skipped > len(self.problems) else ""
            lines += [f"bad lines skipped: {self.skipped}", *(f"  {problem}" for problem in self.problems)]
            lines += [f"  {more.strip()}"] if more else []
        lines += ["-" * 30 + " first item", self.first, "-" * 30 + " last item", self.last, "-" * 30,
                  f"{self.tokens} tokens, {self.items} items ({self.documents} documents, {self.n_epoch} epochs), "
                  f"dtype {self.dtype}, seed {self.seed}; read back and verified"]
        return "\n".join(lines + self._about_prime())

    def _about_prime(self) -> list[str]:
        magic = self.magic
        if magic.prime is None:
            return [f"no magic_prime for ctx_len {magic.ctx_len}: {magic.reason}"]
        verdict = {True: "accepts it", False: "refuses it"}
        lines = [f"magic_prime {magic.prime} for ctx_len {magic.ctx_len}: {magic.ratio:.4f} of {magic.slots} slots, "
                 f"{magic.prime / SAMPLES_PER_EPOCH:.2f} mini-epochs of {SAMPLES_PER_EPOCH} samples",
                 f"official trainer of December 2023 (ratio over 0.99) {verdict[magic.accepted_2023]}, "
                 f"today's (over 0.9) {verdict[magic.accepted_today]}"]
        if magic.mini_epochs == 0:
            lines.append(f"small data: one mini-epoch reads each chunk {SAMPLES_PER_EPOCH / magic.prime:.1f} times")
        return [*lines, self.flags]


def preview(tokenizer: WorldTokenizer, ids: Sequence[int], limit: int = PREVIEW) -> str:
    """Text of `ids`, or of the first and the last `limit` of them; a character that the cut divides is left out."""
    if len(ids) <= limit:
        return tokenizer.decode(ids)
    head = IncrementalDecoder(tokenizer)  # holds back what a cut leaves of a character
    tail = tokenizer.decode_bytes(ids[-limit:])
    whole = next((i for i, byte in enumerate(tail) if byte & 0xC0 != 0x80), len(tail))  # 0b10xxxxxx goes on a character
    return "".join(map(head.push, ids[:limit])) + "\n" + "· " * 15 + "\n" + tail[whole:].decode("utf-8")

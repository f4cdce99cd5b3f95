"""A run that can start and what is wrong with another, shared by the tests of the command line."""

from pathlib import Path

import numpy as np
import pytest

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.training import cli
from rwkv_nb.training.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


class World:
    """The name and hash of the World tokenizer, as PREFIX.meta.json states them."""

    name, vocab_size = "rwkv_vocab_v20230424", 65536
    sha256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


def write_data(prefix, n_tokens=3000, highest=300, tokenizer=None):
    with MMapIndexedDatasetBuilder(prefix, dtype=np.uint16, tokenizer=tokenizer) as builder:
        builder.add_item((np.arange(n_tokens) * 11 % (highest + 1)).astype(np.uint16))
        builder.end_document()
    return str(prefix)


def words(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def problems(flags):
    with pytest.raises(ConfigError) as caught:
        cli.check(words(flags))
    return [cli.as_flag(text) for text in caught.value.problems]

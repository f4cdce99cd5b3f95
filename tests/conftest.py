"""What tests of several folders share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Tensors this small gain nothing from more, and lose much where other programs use the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

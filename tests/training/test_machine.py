"""What a machine is good at: the choice of threads. (Formats and the allocator are tested where they are used.)"""

from __future__ import annotations

import pytest
import torch

from rwkv_nb.training.machine import choose_threads


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("together", "alone", "threads"), [(10.0, 6.0, 2), (1.0, 9.0, 1), (5.0, 5.0, 2)])
def test_the_faster_number_of_threads_stays(together, alone, threads):
    asked = []

    def speed():
        asked.append(torch.get_num_threads())
        return together if asked[-1] == 2 else alone

    assert choose_threads(speed) == max(together, alone)
    assert torch.get_num_threads() == threads and asked == [2, 1]


def test_one_thread_is_measured_once():
    torch.set_num_threads(1)
    calls = []
    assert choose_threads(lambda: calls.append(1) or 3.0) == 3.0
    assert calls == [1] and torch.get_num_threads() == 1

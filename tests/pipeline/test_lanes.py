"""Work in lanes: what one thread makes, in order, with torch's threads shared out and given back."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pipeline.evaluate.lanes import in_lanes


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("lanes", "parts", "together", "threads"),
    [(0, 5, 1, 4), (1, 5, 1, 4), (2, 5, 2, 2), (3, 7, 3, 2), (4, 2, 2, 2), (8, 9, 8, 1), (2, 1, 1, 4), (2, 0, 0, 0)],
)
def test_lanes_share_torch_s_threads_and_give_them_back(lanes, parts, together, threads):
    meeting = threading.Barrier(max(together, 1))  # no lane goes on before as many are at work

    def work(part):
        if part < together:
            meeting.wait(timeout=30)
        return part, torch.get_num_threads()

    assert in_lanes(work, range(parts), lanes) == [(part, threads) for part in range(parts)]
    assert torch.get_num_threads() == 4


def test_the_first_part_that_fails_ends_it():
    begun, meeting = [], threading.Barrier(2)

    def work(part):
        begun.append(part)
        if part < 2:
            meeting.wait(timeout=30)
            raise ValueError(part)
        time.sleep(0.01)  # or else all might be done before the failure is heard of

    with pytest.raises(ValueError, match="0"):
        in_lanes(work, range(1000), 2)
    assert len(begun) < 1000
    assert torch.get_num_threads() == 4

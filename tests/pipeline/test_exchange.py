"""What ranks tell each other before training: the same value, or the same failure, on each of them."""

from __future__ import annotations

import datetime
import time

import pytest

from data_prep.record import DataError
from pipeline import exchange, ranks
from pipeline.failure import LostRanksError, TrainingError
from tests.processes import run_ranks


def outcomes(rank: int, world: int) -> list[str]:
    """What a rank sees of values and failures, its own and others'."""

    def fails(error: Exception | None) -> None:
        if error:
            raise error

    attempts = [
        lambda: str(exchange.from_main(lambda: rank + 7)),
        lambda: exchange.from_main(lambda: fails(DataError("of rank 0"))),
        lambda: exchange.from_main(lambda: fails(PermissionError("no"))),
        lambda: exchange.together(lambda: fails(DataError(f"of rank {rank}") if rank == 1 else None)),
        lambda: exchange.together(lambda: fails(OSError(28, "full") if rank == 2 else None)),
        lambda: str(exchange.together(lambda: None)),
    ]
    seen = []
    for attempt in attempts:
        try:
            seen.append(attempt())
        except (DataError, TrainingError) as error:
            seen.append(f"{type(error).__name__}: {error}")
    return seen


def test_all_ranks_see_the_same():
    assert (
        run_ranks(3, outcomes)
        == [
            [
                "7",
                "DataError: of rank 0",
                "TrainingError: rank 0: PermissionError: no",
                "DataError: of rank 1",
                "TrainingError: rank 2: OSError: [Errno 28] full",
                "None",
            ]
        ]
        * 3
    )


def slow_and_lost(rank, world):
    """A rank is longer at work than the ranks had time to meet; then the last one never comes to a meeting."""
    exchange.MEETING = datetime.timedelta(seconds=2)
    told = exchange.from_main(lambda: time.sleep(4) or "at last")
    exchange._patient_group_of.cache_clear()
    began = time.monotonic()
    if rank < world - 1:
        with pytest.raises(LostRanksError), ranks.losses_told():
            exchange.from_main(lambda: None)
    else:
        time.sleep(4)
    return told, time.monotonic() - began < 20


def test_ranks_wait_for_hours_for_one_that_works_but_not_for_one_that_does_not_come():
    assert run_ranks(2, slow_and_lost) == [("at last", True)] * 2


def test_a_rank_alone_needs_no_group():
    assert exchange.from_main(lambda: 3) == 3
    with pytest.raises(PermissionError):
        exchange.together(lambda: (_ for _ in ()).throw(PermissionError("no")))

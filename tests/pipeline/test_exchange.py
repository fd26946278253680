"""What ranks tell each other before training: the same value, or the same failure, on each of them."""

from __future__ import annotations

import pytest

from data_prep.record import DataError
from pipeline import exchange
from pipeline.failure import TrainingError
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


def test_a_rank_alone_needs_no_group():
    assert exchange.from_main(lambda: 3) == 3
    with pytest.raises(PermissionError):
        exchange.together(lambda: (_ for _ in ()).throw(PermissionError("no")))

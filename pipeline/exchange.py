"""What the ranks tell each other: before training what one found for all, and after a step, in one collective, its
loss, the samples used, and whether to stop."""

from __future__ import annotations

import datetime
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.record import DataError
from pipeline.data.plan import Ids
from pipeline.failure import TrainingError

T = TypeVar("T")
log = logging.getLogger(__name__)


class StepReport(NamedTuple):
    """One step as all ranks saw it; every rank holds the same values."""

    loss: float
    ids: Ids
    bad: int
    stop: bool


def report(loss: Tensor, id_B: Tensor, *, bad: int, stop: bool, sizes: Sequence[int]) -> StepReport:
    """Sum the ranks' losses and bad samples, join their ids in rank order, and stop if any rank wants to.

    Args:
        loss: () this rank's share.
        id_B: int64 ids of this rank's samples.
        bad: samples of this rank's batch that were replaced.
        stop: whether this rank was asked to stop.
        sizes: B of every rank.

    Collective: every rank calls it.
    """
    # The loss travels as the bits of its float64, so that one integer tensor holds everything.
    own = torch.zeros(3 + max(sizes), dtype=torch.int64, device=loss.device)
    own[0] = loss.detach().double().view(torch.int64)
    own[1], own[2] = bad, int(stop)
    own[3 : 3 + len(id_B)] = id_B.to(loss.device)
    every = [own]
    if len(sizes) > 1:
        every = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(every, own)
    rows = torch.stack(every).cpu()
    ids = [row[3 : 3 + size].numpy() for row, size in zip(rows, sizes, strict=True)]
    return StepReport(
        loss=float(rows[:, 0].contiguous().view(torch.float64).sum()),
        ids=np.concatenate(ids),
        bad=int(rows[:, 1].sum()),
        stop=bool(rows[:, 2].any()),
    )


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank.

    Raises:
        DataError: where it did on rank 0, on every rank; a TrainingError for what else is raised there.

    Collective: every rank calls it.
    """
    if not dist.is_initialized():
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        box = list(_tried(make))
    dist.broadcast_object_list(box, src=0, group=_patient_group())
    if box[1]:
        raise box[1]
    return box[0]


def together(work: Callable[[], None]) -> None:
    """Do `work` on every rank; where it fails on one, it has failed on all.

    Raises:
        DataError: of the first rank that met one; a TrainingError for what else is raised.

    Collective: every rank calls it.
    """
    if not dist.is_initialized():
        return work()
    _, failure = _tried(work)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, failure, group=_patient_group())
    for found in every:
        if found:
            raise found
    return None


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `work` gives, or raises, in a form that can be sent."""
    try:
        return work(), None
    except DataError as error:
        return None, error
    except Exception as error:
        log.debug("before training", exc_info=True)
        return None, TrainingError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")


@functools.cache
def _patient_group() -> Any:
    """Of all ranks, for what one of them may take hours over: hashing or counting large data."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))

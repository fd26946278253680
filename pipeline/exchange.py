"""What the ranks tell each other: before training what one found for all, and of each step, in one collective that is
read a step late, its loss, the samples used, and whether to stop."""

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
from torch.distributed import distributed_c10d

from data_prep.record import DataError
from pipeline.data.plan import Ids
from pipeline.failure import TrainingError

T = TypeVar("T")
log = logging.getLogger(__name__)

# torch ≥ 2.13 has it under another name, and warns of this one.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SET_TIMEOUT = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
MEETING, PATIENCE = datetime.timedelta(minutes=10), datetime.timedelta(hours=12)


class StepReport(NamedTuple):
    """One step as all ranks saw it; every rank holds the same values, but for `numbers`.

    Attributes:
        loss: summed over ranks.
        numbers: this rank's others.
        ids: (N,) all samples, in rank order.
        bad: samples that were replaced, over ranks.
        stop: whether any rank was asked to stop.
        save: whether any rank wants a checkpoint.
    """

    loss: float
    numbers: list[float]
    ids: Ids
    bad: int
    stop: bool
    save: bool


class Sending:
    """A step's report on its way, in one collective; nobody waits for it before it is read.

    Args:
        loss: () this rank's share.
        numbers: () each, of this rank.
        id_B: int64 ids of this rank's samples.
        bad: samples of this rank's batch that were replaced.
        stop: whether this rank was asked to stop.
        save: whether this rank wants a checkpoint.
        sizes: B of every rank.

    Collective: every rank makes it.
    """

    def __init__(
        self,
        loss: Tensor,
        numbers: Sequence[Tensor],
        id_B: Tensor,
        *,
        bad: int,
        stop: bool,
        save: bool,
        sizes: Sequence[int],
    ) -> None:
        device = loss.device
        # MPS has no float64; a number travels as the bits of an integer of its own size, so that one tensor holds all.
        self._real, whole = (torch.float32, torch.int32) if device.type == "mps" else (torch.float64, torch.int64)
        real = torch.stack([value.detach().to(self._real) for value in (loss, *numbers)]).view(whole).long()
        plain = torch.zeros(3 + max(sizes), dtype=torch.int64)
        plain[:3] = torch.tensor([bad, stop, save])
        plain[3 : 3 + len(id_B)] = id_B
        own = torch.cat([real, plain.to(device, non_blocking=True)])
        self._sizes, self._count, self._whole = sizes, len(real), whole
        self._rank, self._work, every = 0, None, own
        if len(sizes) > 1:
            self._rank, every = dist.get_rank(), own.new_empty(len(sizes) * len(own))
            self._work = ALL_GATHER(every, own, async_op=True)
        self._every, self._copied = every, None
        if device.type == "cuda":
            if self._work:
                self._work.wait()  # the stream does, not this thread
            self._every = torch.empty_like(every, device="cpu", pin_memory=True)
            self._every.copy_(every, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepReport:
        """Wait until it is here."""
        if self._copied:
            self._copied.synchronize()
        elif self._work:
            self._work.wait()
        rows = self._every.cpu().reshape(len(self._sizes), -1)
        real = rows[:, : self._count].to(self._whole).contiguous().view(self._real)
        plain = rows[:, self._count :]
        ids = [row[3 : 3 + size].numpy() for row, size in zip(plain, self._sizes, strict=True)]
        return StepReport(
            loss=float(real[:, 0].double().sum()),
            numbers=real[self._rank, 1:].tolist(),
            ids=np.concatenate(ids),
            bad=int(plain[:, 0].sum()),
            stop=bool(plain[:, 1].any()),
            save=bool(plain[:, 2].any()),
        )


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank.

    Raises:
        DataError: where it did on rank 0, on every rank; a TrainingError for what else is raised there.

    Collective: every rank calls it.
    """
    if not dist.is_initialized():
        return make()
    group = _patient_group()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        box = list(_tried(make))
    dist.broadcast_object_list(box, src=0, group=group)
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
    group = _patient_group()
    _, failure = _tried(work)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, failure, group=group)
    for found in every:
        if found:
            raise found
    return None


def any_rank(flag: bool) -> bool:
    """Whether a flag is up on any rank. Collective: every rank calls it."""
    if not dist.is_initialized():
        return flag
    up = torch.tensor(int(flag))
    dist.all_reduce(up, dist.ReduceOp.MAX)
    return bool(up)


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `work` gives, or raises, in a form that can be sent."""
    try:
        return work(), None
    except DataError as error:
        return None, error
    except Exception as error:
        log.debug("before training", exc_info=True)
        return None, TrainingError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")


def _patient_group() -> Any:
    """Of all ranks, for what one of them may take hours over: hashing or counting large data."""
    return _patient_group_of(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _patient_group_of(world: Any) -> Any:
    """Made once for each world of ranks: one that is left and joined again is another."""
    # A rank may die before all are in the group, which is noticed only after its time-out. Nobody is at work yet.
    group: Any = dist.new_group(backend="gloo", timeout=MEETING)
    SET_TIMEOUT(PATIENCE, group)
    return group

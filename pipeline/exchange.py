"""What the ranks tell each other after a step, in one collective: loss, samples used, and whether to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.plan import Ids


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

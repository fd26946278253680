"""The order of samples: a pure function of (shard sizes, seed, epoch), cut into global batches and ranks.

    shards, permuted by epoch      |--7--|---2---|-0-|----5----|--1--|---3---|   the line: N samples
    cut into C equal lanes         |------- lane 0 ------|------- lane 1 ----|
    windows, shuffled inside       |--w0--|----w1----|w2-|-w0-|----w1----|w2-|   borders staggered by lane
    global batch k                 B / C consecutive samples of each lane, lanes in order
    rank r of W                    positions floor(r·B/W) … floor((r+1)·B/W) of the global batch

Nothing else enters: not ranks, workers, or where a run was interrupted. A sample's id is its number in the split,
counted over the shards in the manifest's order; ids are what batches, logs and seeds speak of. Permutations are a
stable argsort of raw Philox4x64 bits (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which no
library version changes; whoever changes the order raises PLAN_VERSION.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.record import DataError

PLAN_VERSION = 1

Ids = NDArray[np.int64]


class PlanError(DataError):
    """A plan that these settings and this data cannot have, or a stream state of another one."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sample is seen when. Settings in, ids out; it reads no data.

    Attributes:
        fingerprint: of the split whose samples are ordered.
        sizes: samples a shard, in the manifest's order.
        seed: of every permutation.
        global_batch: B, pairs a step over all ranks.
        lanes: C; divides B.
        window: samples that are shuffled among each other within a lane.
    """

    fingerprint: str
    sizes: tuple[int, ...]
    seed: int
    global_batch: int
    lanes: int = 1
    window: int = 1 << 22
    _orders: dict[tuple[object, ...], Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.global_batch % self.lanes:
            raise PlanError(
                f"data.lanes = {self.lanes} does not divide train.batch_size = {self.global_batch}. "
                "Choose lanes that do; 1 always works."
            )
        if self.samples < self.global_batch:
            raise PlanError(
                f"the data has {self.samples} samples, fewer than one batch of {self.global_batch}. "
                f"Lower train.batch_size to at most {max(self.samples, 1)}, or add data."
            )

    @functools.cached_property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the tail of fewer than B samples waits for another epoch's shuffle."""
        return self.samples // self.global_batch

    def global_ids(self, step: int) -> Ids:
        """(B,) ids of global batch `step`, counted from 0 over all epochs, in order. O(B) once a window is made."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.lanes
        positions = np.arange(step_in_epoch * share, (step_in_epoch + 1) * share)
        return np.concatenate([self._lane_ids(epoch, lane, positions) for lane in range(self.lanes)])

    def rank_ids(self, step: int, rank: int, world: int) -> Ids:
        """The ids of `step` that rank `rank` of `world` takes."""
        bounds = rank_bounds(self.global_batch, world)
        return self.global_ids(step)[bounds[rank] : bounds[rank + 1]]

    def substitute(self, sample: int, attempt: int) -> int:
        """The sample that stands in for an unreadable one: the same choice on any rank, in any run."""
        bits = _philox(self.seed, "substitute", sample, attempt).random_raw(1)
        return int(bits[0] % np.uint64(self.samples))

    def locate(self, sample: int) -> tuple[int, int]:
        """Id → (shard, index in shard)."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, int(sample - self._starts[shard])

    def state(self, step: int) -> dict[str, Any]:
        """The stream's state once `step` global batches were attempted: all that an exact resume needs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return {
            "plan_version": PLAN_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "global_batch": self.global_batch,
            "lanes": self.lanes,
            "window": self.window,
            "tail": "drop",
            "mixture": [[self.fingerprint, 1.0]],
        }

    def resume(self, state: dict[str, Any]) -> int:
        """The number of global batches that a saved state has attempted.

        Raises:
            PlanError: the state belongs to another order; every differing key is named.
        """
        epoch, step_in_epoch = int(state["epoch"]), int(state["step_in_epoch"])
        step = epoch * self.steps_per_epoch + step_in_epoch
        own = self.state(step)
        changed = [f"{key}: {state.get(key)!r} -> {own[key]!r}" for key in own if state.get(key) != own[key]]
        if changed:
            raise PlanError(
                f"the checkpoint's order of samples is not this run's ({'; '.join(changed)}). "
                "Give the data and settings that the run was started with, or start another run folder."
            )
        return step

    @functools.cached_property
    def _starts(self) -> Ids:
        """(shards + 1,) first id of each shard, and N."""
        return np.cumsum((0, *self.sizes), dtype=np.int64)

    def _lane_ids(self, epoch: int, lane: int, positions: Ids) -> Ids:
        """Ids at `positions` (ascending) of a lane's shuffled order."""
        begin, end = (self.samples * edge // self.lanes for edge in (lane, lane + 1))
        # A first window of its own length for each lane: no two lanes cross into new shards at the same step.
        first = max(1, min(self.window, end - begin) * (lane + 1) // self.lanes)
        windows = np.where(positions < first, 0, 1 + (positions - first) // self.window)
        line = np.empty_like(positions)
        for window in np.unique(windows):
            low = 0 if window == 0 else first + (window - 1) * self.window
            high = min(first if window == 0 else low + self.window, end - begin)
            chosen = windows == window
            order = self._permutation(int(high - low), "window", epoch, lane, int(window))
            line[chosen] = begin + low + order[positions[chosen] - low]
        shards = self._permutation(len(self.sizes), "shards", epoch)
        ends = np.cumsum(np.diff(self._starts)[shards], dtype=np.int64)
        place = np.searchsorted(ends, line, side="right")
        # Where a sample lies in its shard, counted back from the shard's end in the line and in the split.
        ids: Ids = self._starts[shards[place] + 1] - (ends[place] - line)
        return ids

    def _permutation(self, length: int, purpose: str, *keys: int) -> Ids:
        """A permutation of its own for each purpose and key; the latest are kept."""
        key = (purpose, *keys)
        if key not in self._orders:
            if len(self._orders) > 2 * self.lanes + 2:
                self._orders.clear()
            bits = _philox(self.seed, purpose, *keys).random_raw(length)
            self._orders[key] = np.argsort(bits, kind="stable")
        order: Ids = self._orders[key]
        return order


def rank_bounds(batch: int, world: int) -> list[int]:
    """W + 1 borders of the ranks' shares of a batch; shares differ by at most one."""
    return [rank * batch // world for rank in range(world + 1)]


def batch_sha256(ids: Sequence[int] | Ids) -> str:
    """The hash of a global batch's ordered ids, as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()


def sample_uniforms(seed: int, epoch: int, sample: int, count: int) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1): all that is random about a sample in an epoch, its text and its crop."""
    bits = _philox(seed, "sample", epoch, sample).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _philox(seed: int, purpose: str, *keys: int) -> np.random.Philox:
    """A generator of its own for each purpose and key: 128 bits of a hash are Philox's key."""
    text = ":".join([purpose, *map(str, (seed, *keys))])
    key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key)

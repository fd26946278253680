"""The order of samples: a pure function of (shard sizes, seed, step), cut into global batches and ranks.

    shards, permuted by epoch      |--7--|---2---|-0-|----5----|--1--|---3---|   the line: N samples
    cut into C equal lanes         |------- lane 0 ------|------- lane 1 ----|
    windows, shuffled inside       |w0|-w1-|----w2----|w3|w0|---w1----|--w2--|   borders staggered by lane
    global batch k                 B / C consecutive samples of each lane, lanes in order
    rank r of W                    positions floor(r·B/W) … floor((r+1)·B/W) of the global batch

Where C does not divide B, lane l gives positions floor(l·B/C) … floor((l+1)·B/C), and is as much longer as it gives
more. Several datasets: each is a line with C lanes of its own, and has a fixed number of places in every global batch,
spread evenly over it. Nothing else enters: not ranks, workers, or where a run was interrupted.

A sample's id is its number, counted over the shards in the manifests' order; ids are what batches, logs and seeds
speak of. Whoever changes the order raises PLAN_VERSION.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.record import DataError
from pipeline.data.philox import permutation, philox

PLAN_VERSION = 2
# Unreadable substitutes in a row that say that the data, not a sample, is broken. The first half of them are looked
# for in the same shard, which is at hand.
SUBSTITUTES = 16
# Up to so many samples, all are shuffled together.
WHOLE = 1 << 22
# Shards that are shuffled together where all cannot be.
WINDOW_SHARDS = 8
# Orders of windows that are kept of each dataset, in bytes; the latest ones.
KEPT = 100 << 20

Ids = NDArray[np.int64]
Tail = Literal["drop", "pad", "wrap"]


class PlanError(DataError):
    """A plan that these settings and this data cannot have, or a stream state of another one."""


class Share(NamedTuple):
    """One dataset of a plan.

    Attributes:
        fingerprint: of the split whose samples are ordered.
        sizes: samples a shard, in the manifest's order.
        weight: its part of every global batch, relative to the other datasets' weights.
        name: for messages.
    """

    fingerprint: str
    sizes: ArrayLike
    weight: float = 1.0
    name: str = "the data"


class Draw(NamedTuple):
    """Planned samples: their ids, and for each how often its dataset had been gone through before."""

    ids: Ids
    epochs: Ids


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sample is seen when. Settings in, ids out; it reads no data.

    Attributes:
        datasets: one, or several that are mixed.
        seed: of every permutation.
        global_batch: B, pairs a step over all ranks.
        lanes: C.
        window: samples that are shuffled among each other within a lane; None for all of a lane's.
        tail: what becomes of an epoch's last, incomplete batch: `drop` leaves its samples for another epoch's
            shuffle, `pad` fills it with the epoch's first ones, `wrap` with those of the next epoch.
    """

    datasets: Sequence[Share]
    seed: int
    global_batch: int
    lanes: int = 1
    window: int | None = None
    tail: Tail = "drop"

    def __post_init__(self) -> None:
        if self.lanes > self.global_batch:
            raise PlanError(
                f"data.lanes = {self.lanes} is more than train.batch_size = {self.global_batch}, so that some lanes "
                "would never be read. Lower it; 1 always works."
            )
        for dataset, order in zip(self.datasets, self._orders, strict=True):
            if order.count == 0:
                raise PlanError(
                    f"{dataset.name}: weight {dataset.weight} gives it none of the {self.global_batch} places of a "
                    "batch. Raise the weight or train.batch_size."
                )
            needed = order.count if self.tail == "drop" or (self.tail == "pad" and self.lanes > 1) else 1
            if order.samples < needed:
                raise PlanError(
                    f"{dataset.name} has {order.samples} samples, fewer than the {needed} that it gives to a batch of "
                    f"{self.global_batch}. Lower train.batch_size, or add data."
                )
        fingerprints = [dataset.fingerprint for dataset in self.datasets]
        if len(set(fingerprints)) < len(fingerprints):
            raise PlanError("the same dataset is listed twice. Give it once, with a larger weight.")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # what was made is made again

    @functools.cached_property
    def fingerprint(self) -> str:
        """The dataset's; of several, a hash of all."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        return hashlib.sha256("\n".join(dataset.fingerprint for dataset in self.datasets).encode()).hexdigest()

    @functools.cached_property
    def samples(self) -> int:
        """Samples of all datasets."""
        return sum(order.samples for order in self._orders)

    @property
    def dropped_tail(self) -> int:
        """Samples that an epoch of each dataset leaves out, together."""
        return sum(order.samples % order.count for order in self._orders) if self.tail == "drop" else 0

    def epoch(self, step: int) -> int:
        """How often the first dataset had been gone through before the last sample of `step`."""
        return self._orders[0].epoch_of_last(step)

    def first_step(self, epoch: int) -> int:
        """The first step that begins in an epoch of the first dataset."""
        return self._orders[0].first_step(epoch)

    def global_ids(self, step: int) -> Ids:
        """(B,) ids of global batch `step`, counted from 0 over all epochs, in order."""
        return self.draw(step, 0, self.global_batch).ids

    def draw(self, step: int, begin: int, end: int) -> Draw:
        """Positions begin … end of global batch `step`. O(end - begin) once their windows are made."""
        parts = [order.draw(step, *piece) for order, *piece in self._pieces(begin, end)]
        return Draw(np.concatenate([part.ids for part in parts]), np.concatenate([part.epochs for part in parts]))

    def shards(self, step: int, begin: int, end: int, ahead: int = 1) -> list[int]:
        """The shards that positions begin … end need from `step` on: those of their windows, and of `ahead` more.

        Soonest first: each lane's shards of this window, then of the next one, lanes in turn.
        """
        needed = [
            list(order.shards(step, lane, low, high, ahead)) for order, lane, low, high in self._pieces(begin, end)
        ]
        in_turn = (shard for windows in itertools.zip_longest(*needed, fillvalue=()) for w in windows for shard in w)
        return list(dict.fromkeys(in_turn))

    def substitute(self, sample: int, attempt: int) -> int:
        """The sample that stands in for an unreadable one: the same choice on any rank, in any run."""
        shard = self.locate(sample)[0]
        first, size = int(self._starts[shard]), int(self._starts[shard + 1] - self._starts[shard])
        if attempt >= SUBSTITUTES // 2:
            order = next(order for order in self._orders if sample < order.offset + order.samples)
            first, size = order.offset, order.samples
        bits = philox(self.seed, "substitute", sample, attempt).random_raw(1)
        return first + int(bits[0] % np.uint64(size))

    def locate(self, ids: ArrayLike) -> tuple[Ids, Ids]:
        """Ids → (shards, indices in them); shards are numbered through the datasets."""
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        return shards, np.asarray(ids) - self._starts[shards]

    def state(self, step: int) -> dict[str, Any]:
        """The stream's state once `step` global batches were attempted: all that an exact resume needs."""
        epoch, step_in_epoch = self._orders[0].place(step)
        return {
            "plan_version": PLAN_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "global_batch": self.global_batch,
            "lanes": self.lanes,
            "window": self.window,
            "tail": self.tail,
            "mixture": [[dataset.fingerprint, order.count] for dataset, order in self._by_dataset],
        }

    def changes(self, state: dict[str, Any]) -> list[str]:
        """What differs between a saved state's order of samples and this one, each as `key: old -> new`."""
        own = self.state(0)
        return [
            f"{key}: {state.get(key)!r} -> {own[key]!r}"
            for key in own
            if state.get(key) != own[key] and key not in ("epoch", "step_in_epoch")
        ]

    def step_of(self, state: dict[str, Any]) -> int:
        """The number of global batches that a saved state of this plan has attempted."""
        return self.first_step(int(state["epoch"])) + int(state["step_in_epoch"])

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[_Order, int, int, int]]:
        """(dataset's order, lane, first, end) of positions begin … end of a global batch, in order.

        A lane's part of the batch is that of the first dataset, then that of the second, …
        """
        lane = int(np.searchsorted(self._lane_starts, begin, side="right")) - 1
        while lane < self.lanes and (at := int(self._lane_starts[lane])) < end:
            for order in self._orders:
                low, high = max(begin - at, 0), min(end - at, order.part(lane))
                if low < high:
                    yield order, lane, low, high
                at += order.part(lane)
            lane += 1

    @property
    def _by_dataset(self) -> Iterator[tuple[Share, _Order]]:
        return zip(self.datasets, self._orders, strict=True)

    @functools.cached_property
    def _lane_starts(self) -> Ids:
        """(C + 1,) where each lane's part of a global batch begins, and B."""
        return np.arange(self.lanes + 1) * self.global_batch // self.lanes

    @functools.cached_property
    def _starts(self) -> Ids:
        """(shards + 1,) first id of each shard, and N."""
        return np.concatenate([[0], *(order.starts[1:] + order.offset for order in self._orders)]).astype(np.int64)

    @functools.cached_property
    def _orders(self) -> list[_Order]:
        made = list[_Order]()
        offset = shard = 0
        for dataset, firsts in zip(self.datasets, self._first_places(), strict=True):
            made.append(_Order(dataset, self, firsts, offset, shard))
            offset += made[-1].samples
            shard += len(made[-1].starts) - 1
        return made

    def _first_places(self) -> list[Ids]:
        """For each dataset (C + 1,): how many of its places in a global batch lie before each lane's, and all of them.

        Its k-th of n places is where (k + 1/2) · B / n comes among all datasets' such numbers.
        """
        counts = self._counts()
        wanted = [(np.arange(count) + 0.5) / count for count in counts]
        owners = np.repeat(np.arange(len(counts)), counts)[np.argsort(np.concatenate(wanted), kind="stable")]
        return [np.concatenate([[0], np.cumsum(owners == number)])[self._lane_starts] for number in range(len(counts))]

    def _counts(self) -> list[int]:
        """Places of each dataset in a global batch: B, divided by largest remainder."""
        weights = [dataset.weight for dataset in self.datasets]
        exact = [self.global_batch * weight / sum(weights) for weight in weights]
        counts = [int(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
        for index in by_remainder[: self.global_batch - sum(counts)]:
            counts[index] += 1
        return counts


class _Order:
    """One dataset's samples in lanes: (step, lane, place in its part of the batch) → id.

    Args:
        dataset: whose.
        plan: with its seed, lanes, window and tail.
        firsts: (C + 1,) how many of its places in a global batch lie before each lane's, and n, all of them.
        offset: its first id.
        first_shard: its first shard's number.
    """

    def __init__(self, dataset: Share, plan: Plan, firsts: Ids, offset: int, first_shard: int) -> None:
        self.count, self.offset, self.first_shard = int(firsts[-1]), offset, first_shard
        self._firsts: list[int] = firsts.tolist()
        self.key, self.lanes, self.window, self.tail = (
            (plan.seed, dataset.fingerprint),
            plan.lanes,
            plan.window,
            plan.tail,
        )
        self.starts: Ids = np.concatenate([[0], np.cumsum(np.asarray(dataset.sizes, np.int64))]).astype(np.int64)
        self.samples = int(self.starts[-1])
        self._kept: OrderedDict[tuple[int, int, int], NDArray[Any]] = OrderedDict()
        self._kept_bytes = 0
        self._line = functools.lru_cache(maxsize=2)(self._make_line)

    def part(self, lane: int) -> int:
        """Places that a lane has in a global batch."""
        return self._firsts[lane + 1] - self._firsts[lane]

    def place(self, step: int) -> tuple[int, int]:
        """Step → (epoch, step in epoch)."""
        epoch = step * self.count // self.samples if self.tail == "wrap" else step // self._steps
        return epoch, step - self.first_step(epoch)

    def epoch_of_last(self, step: int) -> int:
        """The epoch of the last sample of a step."""
        return ((step + 1) * self.count - 1) // self.samples if self.tail == "wrap" else self.place(step)[0]

    def first_step(self, epoch: int) -> int:
        """The first step that begins in an epoch."""
        return -(-epoch * self.samples // self.count) if self.tail == "wrap" else epoch * self._steps

    @property
    def _steps(self) -> int:
        return -(-self.samples // self.count) if self.tail == "pad" else self.samples // self.count

    def draw(self, step: int, lane: int, low: int, high: int) -> Draw:
        """Samples low … high of those that a lane gives to a step."""
        epochs, positions = self._positions(step, lane, low, high)
        ids = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            ids[epochs == epoch] = self._ids(epoch, lane, positions[epochs == epoch])
        return Draw(ids + self.offset, epochs)

    def shards(self, step: int, lane: int, low: int, high: int, ahead: int) -> Iterator[list[int]]:
        """The shards of each window that a lane's samples low … high of a step lie in, and of `ahead` more."""
        epochs, positions = self._positions(step, lane, low, high)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            for window in np.unique(self._window_of(epoch, lane, positions[epochs == epoch])):
                yield self._shards_of(epoch, lane, int(window))
        for _ in range(ahead):
            epoch, window = self._after(epoch, lane, int(window))
            yield self._shards_of(epoch, lane, window)

    def _shards_of(self, epoch: int, lane: int, window: int) -> list[int]:
        begin, _ = self._lane(epoch, lane)
        first, end = self._window(epoch, lane, window)
        shards, ends = self._line(epoch)
        low, high = np.searchsorted(ends, [begin + first, begin + end - 1], side="right")
        return [int(shard) + self.first_shard for shard in shards[low : high + 1]]

    def _after(self, epoch: int, lane: int, window: int) -> tuple[int, int]:
        """The epoch and window that follow a window."""
        begin, end = self._lane(epoch, lane)
        if self._window(epoch, lane, window)[1] < end - begin:
            return epoch, window + 1
        while True:
            epoch += 1
            begin, end = self._lane(epoch, lane)
            if begin < end:  # `wrap` may leave a lane without a sample in an epoch that is shorter than a batch
                return epoch, 0

    def _positions(self, step: int, lane: int, low: int, high: int) -> tuple[Ids, Ids]:
        """(epochs, positions in the lane) of the samples low … high that it gives to a step."""
        if self.tail == "wrap":
            taken = self._firsts[lane] + np.arange(low, high) + step * self.count
            epochs = taken // self.samples
            before = self._taken(epochs * self.samples, lane + 1) - self._taken(epochs * self.samples, lane)
            return epochs, self._taken(taken, lane + 1) - self._taken(taken, lane) - before
        epoch, step_in_epoch = self.place(step)
        begin, end = self._lane(epoch, lane)
        first = step_in_epoch * self.part(lane)
        positions = np.arange(first + low, first + high) % (end - begin)
        return np.full_like(positions, epoch), positions

    def _lane(self, epoch: int, lane: int) -> tuple[int, int]:
        """A lane's stretch of the line, as long as its part of the batch asks for."""
        if self.tail == "wrap":  # what the batches between an epoch's first and last sample take of each lane
            first, end = epoch * self.samples, (epoch + 1) * self.samples
            low, high = (int(self._taken(end, edge) - self._taken(first, edge)) for edge in (lane, lane + 1))
            return low, high
        low, high = self._firsts[lane : lane + 2]
        return self.samples * low // self.count, self.samples * high // self.count

    def _taken(self, count: Any, lane: int) -> Any:
        """Of the first `count` samples of all batches, those that belong to lanes before `lane`."""
        first = self._firsts[lane]
        return count // self.count * first + np.minimum(count % self.count, first)

    def _ids(self, epoch: int, lane: int, positions: Ids) -> Ids:
        """Ids at positions of a lane's shuffled order."""
        begin, _ = self._lane(epoch, lane)
        windows = self._window_of(epoch, lane, positions)
        line = np.empty_like(positions)
        for window in np.unique(windows):
            low, high = self._window(epoch, lane, int(window))
            chosen = windows == window
            line[chosen] = self._shuffled(high - low, (epoch, lane, int(window)))[positions[chosen] - low]
            line[chosen] += begin + low  # only now: the order within a window is kept in a narrow type
        shards, ends = self._line(epoch)
        place = np.searchsorted(ends, line, side="right")
        # Where a sample lies in its shard, counted back from the shard's end in the line and in the split.
        ids: Ids = self.starts[shards[place] + 1] - (ends[place] - line)
        return ids

    def _window_of(self, epoch: int, lane: int, positions: Ids) -> Ids:
        first, second = self._first_borders(epoch, lane)
        later = 2 + (positions - second) // (self.window or 1)
        return np.where(positions < first, 0, np.where(positions < second, 1, later))

    def _window(self, epoch: int, lane: int, window: int) -> tuple[int, int]:
        """(first, end) positions of a window in its lane."""
        first, second = self._first_borders(epoch, lane)
        length = self.window or 0
        later = second + (window - 2) * length
        low, high = {0: (0, first), 1: (first, second)}.get(window, (later, later + length))
        begin, end = self._lane(epoch, lane)
        return low, min(high, end - begin)

    def _first_borders(self, epoch: int, lane: int) -> tuple[int, int]:
        """The ends of a lane's first two windows; all later ones have the full length.

        The first holds two shards at most, so that training can begin once they are there. The second has a length
        of its own for each lane, so that no two lanes cross into new shards at the same step.
        """
        begin, end = self._lane(epoch, lane)
        if self.window is None:
            return end - begin, end - begin
        _, ends = self._line(epoch)
        second_shard = min(int(np.searchsorted(ends, begin, side="right")) + 1, len(ends) - 1)
        first = min(int(ends[second_shard]) - begin, self.window)
        return first, first + max(1, self.window * (lane + 1) // self.lanes)

    def _make_line(self, epoch: int) -> tuple[NDArray[np.uint32], Ids]:
        """An epoch's shards in order, and where each ends in the line."""
        shards = permutation(len(self.starts) - 1, *self.key, "shards", epoch).astype(np.uint32)
        return shards, np.cumsum(np.diff(self.starts)[shards])

    def _shuffled(self, length: int, window: tuple[int, int, int]) -> NDArray[Any]:
        """The order within a window (epoch, lane, number); the latest are kept, in the smallest type that does."""
        if (found := self._kept.get(window)) is not None:
            self._kept.move_to_end(window)
            return found
        order = permutation(length, *self.key, "window", *window).astype(np.uint16 if length <= 1 << 16 else np.uint32)
        self._kept[window] = order
        self._kept_bytes += order.nbytes
        while self._kept_bytes > KEPT and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return order


def layout(samples: int, shards: int, batch: int, world: int, *, at_hand: bool) -> tuple[int, int | None]:
    """(lanes, window) for a run that starts now.

    Where any sample can be read at any time, up to WHOLE samples are shuffled together. Else each rank reads a lane of
    its own, so that no two nodes read the same shards, and where these have to arrive first, a few of them at a time.
    """
    lanes = 1 if at_hand and samples <= WHOLE else min(world, batch)
    if at_hand:
        return lanes, None if samples <= WHOLE else WHOLE
    return lanes, WINDOW_SHARDS * -(-int(samples) // shards)


def rank_bounds(batch: int, world: int) -> list[int]:
    """W + 1 borders of the ranks' shares of a batch; shares differ by at most one."""
    return [rank * batch // world for rank in range(world + 1)]


def batch_sha256(ids: Sequence[int] | Ids) -> str:
    """The hash of a global batch's ordered ids, as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()

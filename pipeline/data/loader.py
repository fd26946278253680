"""plan + store + transforms → this rank's batches, in order, from any step.

    step ──plan──▶ ids ──store──▶ bytes ──transforms──▶ crop, text ──tokenizer──▶ Batch

Loader processes make a batch in parts, each from its step number alone, so workers, prefetching and restarts cannot
change what a step sees; they write into memory that the trainer reads (`shared`). A sample that cannot be read is
replaced by the one that the plan names, and reported.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_prep.record import DataError
from pipeline.data import transforms
from pipeline.data.ahead import Ahead
from pipeline.data.philox import SampleUniforms
from pipeline.data.plan import SUBSTITUTES, Plan
from pipeline.data.shared import START, Ring, Slot, Watch
from pipeline.data.store import ARRIVING, OPEN, ShardStore, Stored
from pipeline.data.transforms import BadSample, Texts
from pipeline.failure import REQUEUE, TrainingError

# Samples of a part at the most: a first batch is made by all processes together, and little waits to be taken.
PART = 64
# Seconds between looks at which shards are needed next.
LOOK_AHEAD_S = 1.0

log = logging.getLogger(__name__)


class LoaderError(TrainingError):
    """A loader process that died, hangs, or met an error of ours."""


class LoaderKilledError(LoaderError):
    """A loader process that was killed from outside, mostly since memory was short: the same command goes on."""

    code = REQUEUE


class Replaced(NamedTuple):
    """A planned sample that could not be used, and the one that stood in for it."""

    sample: int
    key: str
    shard: str
    reason: str
    substitute: int


class Batch(NamedTuple):
    """One rank's share of a global batch: B pairs, C = 3, S = image size, L = context length.

    Its tensors lie in the loader's memory: they are this batch until the next one is asked for.
    """

    image_BCSS: Tensor  # uint8, channels last
    token_BL: Tensor  # int64
    id_B: Tensor  # int64, the samples that were used
    image_B: Tensor  # int64, equal for samples of one photo
    replaced: list[Replaced]


@dataclass(frozen=True)
class Augmentation:
    """How a sample's bytes become a crop and a text."""

    size: tuple[int, int]
    crop_scale: tuple[float, float]
    interpolation: str
    grayscale: float
    fields: Mapping[str, float]
    decoder: str = "fast"


class Part(NamedTuple):
    """Positions begin … end of global batch `step`, which a rank's batch has from `at` on."""

    step: int
    begin: int
    end: int
    at: int


class Made(NamedTuple):
    """What a loader process says of a part: what was replaced, or why it could not be made."""

    replaced: list[Replaced]
    failure: Exception | None = None


class _Place(NamedTuple):
    """A sample in an epoch: where it lies, three numbers in [0, 1) and the shapes that its crop may have."""

    epoch: int
    sample: int
    shard: int
    place: int
    uniforms: list[float]
    shapes: list[float]


class _Told(NamedTuple):
    """A sample's text, the number of its photo, and which sample it is."""

    text: str
    photo: int
    sample: int


@dataclass(eq=False)
class Maker(Dataset[Made]):
    """Part → its samples, written into the ring; in a loader process, or in the trainer if there are none."""

    plan: Plan
    store: ShardStore
    augmentation: Augmentation
    tokenize: Callable[[list[str]], Tensor]
    bounds: tuple[int, int]
    ring: Ring
    watch: Watch
    _uniforms: SampleUniforms = field(init=False)
    _ahead: Ahead | None = field(default=None, init=False)
    _looked: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self._uniforms = SampleUniforms(self.plan.seed, transforms.UNIFORMS)

    def __getitem__(self, part: Part) -> Made:
        worker = info.id if (info := get_worker_info()) else 0
        try:
            self._look_ahead(part.step, worker)
            made = self._make(part, worker)
        except DataError as error:
            return Made([], error)
        except Exception:  # noqa: BLE001 (raised again in the trainer)
            return Made([], LoaderError(f"loader process {worker} failed:\n{traceback.format_exc()}"))
        self.watch.done(worker)
        return made

    def _make(self, part: Part, worker: int) -> Made:
        """Read, then find the texts, then decode: each by itself for all samples keeps a processor's caches warm."""
        slot, drawn = self.ring.slot(part.step), self.plan.draw(part.step, part.begin, part.end)
        rows = slice(part.at, part.at + part.end - part.begin)
        places = list(self._places(drawn.epochs.tolist(), drawn.ids.tolist()))
        read = [self._read(place, worker) for place in places]
        told: list[_Told | BadSample] = [self._tell(place, stored) for place, stored in zip(places, read, strict=True)]
        replaced = list[Replaced]()
        for row, out_1CSS in enumerate(slot.image_BCSS[rows].split(1)):
            place, stored, found = places[row], read[row], told[row]
            if not isinstance(found, BadSample):
                self.watch.at(worker, place.shard)
                found = self._crop(place, stored, out_1CSS) or found
            if isinstance(found, BadSample):
                found = self._replace(place, stored, found, out_1CSS, worker, replaced)
            told[row] = found
        texts, photos, samples = zip(*told, strict=True)
        slot.token_BL[rows] = self.tokenize(list(texts))
        slot.image_B[rows], slot.id_B[rows] = torch.tensor(photos), torch.tensor(samples)
        return Made(replaced)

    def _places(self, epochs: list[int], samples: list[int]) -> Iterator[_Place]:
        """Where samples lie, and what is random about them."""
        uniforms_NK = self._uniforms(epochs, samples)
        shapes_NK = transforms.crop_shapes(uniforms_NK[:, 3:], self.augmentation.crop_scale)
        columns = (*self.plan.locate(samples), uniforms_NK[:, :3], shapes_NK)
        return map(_Place, epochs, samples, *(column.tolist() for column in columns))

    def _read(self, place: _Place, worker: int) -> Stored:
        self.watch.at(worker, place.shard)
        return self.store.read(place.shard, place.place)

    def _tell(self, place: _Place, stored: Stored) -> _Told | BadSample:
        field_u, text_u, _ = place.uniforms
        try:
            texts = Texts(stored.txt, stored.json)
            text = texts.choose(self.augmentation.fields, field_u, text_u)
        except BadSample as error:
            return error
        return _Told(text, texts.image_number(stored.image), place.sample)

    def _crop(self, place: _Place, stored: Stored, out_1CSS: Tensor) -> BadSample | None:
        how = self.augmentation
        try:
            transforms.CROPS[how.decoder](stored.image, place.shapes, how.interpolation, out_1CSS)
        except BadSample as error:
            return error
        transforms.maybe_grayscale(out_1CSS, how.grayscale, place.uniforms[2])
        return None

    def _replace(
        self, planned: _Place, stored: Stored, why: BadSample, out_1CSS: Tensor, worker: int, replaced: list[Replaced]
    ) -> _Told:
        """Write the crop of the first readable sample that the plan names in place of one."""
        place = planned
        for attempt in range(SUBSTITUTES):
            substitute = self.plan.substitute(planned.sample, attempt)
            shard = self.store.name(place.shard)
            replaced.append(Replaced(place.sample, stored.key, shard, str(why), substitute))
            (place,) = self._places([planned.epoch], [substitute])
            stored = self._read(place, worker)
            found = self._tell(place, stored)
            if isinstance(found, _Told):
                found = self._crop(place, stored, out_1CSS) or found
            if isinstance(found, _Told):
                return found
            why = found
        raise DataError(
            f"sample {planned.sample} and {SUBSTITUTES} substitutes for it are unreadable; the last was {stored.key} "
            f"in {self.store.name(place.shard)} ({why}). Run `python -m data_prep verify`."
        )

    def _look_ahead(self, step: int, worker: int) -> None:
        """Let the shards that come next arrive; each process sees to some of them."""
        if time.monotonic() - self._looked < LOOK_AHEAD_S:
            return
        self._looked, workers = time.monotonic(), max(self.watch.workers, 1)
        self._ahead = self._ahead or Ahead(self.store, max(1, ARRIVING // workers))
        shards = self.plan.shards(step, *self.bounds)
        self._ahead.want(shards[worker::workers])
        self.store.use(shards)


class Stream:
    """This rank's batches of `steps`, in order, prepared ahead by loader processes. A context; iterate inside it.

    Args:
        plan: the order of samples.
        store: where they are.
        augmentation: what is made of their bytes.
        tokenize: (B,) texts → (B, L) int64.
        context_length: L.
        bounds: this rank's first position in a global batch, and the end.
        steps: global batches, counted from 0 over all epochs.
        workers: loader processes; 0 works in the caller's.
        prefetch: parts that each prepares ahead.
        timeout_s: how long one may be at a shard.
        pin: whether a CUDA device copies from the shared memory by itself.
    """

    def __init__(
        self,
        plan: Plan,
        store: ShardStore,
        augmentation: Augmentation,
        tokenize: Callable[[list[str]], Tensor],
        context_length: int,
        bounds: tuple[int, int],
        steps: range,
        *,
        workers: int,
        prefetch: int = 4,
        timeout_s: int = 120,
        pin: bool = False,
    ) -> None:
        batch = bounds[1] - bounds[0]
        self._parts, self._steps, self._timeout_s, self._pin = -(-batch // PART), steps, timeout_s, pin
        # A step may be written once the trainer has asked for the one that has its slot before the last.
        ahead = max(workers * prefetch - 1, 0) // self._parts
        self._ring = Ring(ahead + 3, batch, augmentation.size, context_length)
        self._watch, self._received = Watch(workers), 0
        self._maker = Maker(plan, store, augmentation, tokenize, bounds, self._ring, self._watch)
        self._loader = DataLoader(
            self._maker,
            sampler=_PartsOf(steps, bounds, self._parts),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            timeout=timeout_s if workers else 0,
            worker_init_fn=_begin,
            multiprocessing_context=START if workers else None,
        )

    def __enter__(self) -> Self:
        self._made: Any = iter(self._loader)
        if self._pin:
            self._ring.pin()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # torch tells of a death wherever the trainer is, by a RuntimeError.
        problem = self._dead() if isinstance(error, RuntimeError) and not isinstance(error, TrainingError) else None
        if self._watch.workers:
            self._end_processes()
        if self._pin:
            self._ring.unpin()
        if problem:
            raise problem from error

    def __iter__(self) -> Iterator[Batch]:
        for step in self._steps:
            replaced = []
            for _ in range(self._parts):
                replaced += self._next()
            slot: Slot = self._ring.slot(step)
            yield Batch(*slot, replaced)

    def memory(self) -> int:
        """Bytes that the loader processes have for themselves."""
        return self._watch.taken()

    def _next(self) -> list[Replaced]:
        while True:
            began = time.monotonic()
            try:
                made = next(self._made)
            except RuntimeError as error:  # torch's own: what a loader process meets is a value
                if problem := self._dead() or self._stuck():
                    raise problem from error
                if time.monotonic() - began < self._timeout_s:
                    raise
                continue  # the part takes long, but its process gets on
            self._received += 1
            if made.failure:
                raise made.failure
            return made.replaced

    def _end_processes(self) -> None:
        """At once, whatever they are doing: one that hangs would keep the trainer from ending."""
        heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises for those that are killed here
        for process in self._made._workers:
            process.kill()
            process.join()
        self._made._shutdown_workers()  # else only once nothing refers to it any more
        signal.signal(signal.SIGCHLD, heard)

    def _dead(self) -> LoaderError | None:
        """What is said of a loader process that has died."""
        for worker, process in enumerate(self._made._workers if self._watch.workers else ()):
            if process.exitcode:
                ended = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit {process.exitcode}"
                kind = LoaderKilledError if process.exitcode == -signal.SIGKILL else LoaderError
                return kind(
                    f"loader process {worker} ({process.pid}) has died ({ended}), {self._where(worker)}. Where memory "
                    "was short (`dmesg` tells), lower data.workers or data.prefetch."
                )
        return None

    def _stuck(self) -> LoaderError | None:
        """What is said of the loader process that has been at one sample for longest, if that is too long.

        Others than the one whose part is awaited may be idle for as long as they like.
        """
        awaited = self._received % self._watch.workers  # torch deals parts to its processes in turn
        waited = [self._watch.waited_s(worker) for worker in range(self._watch.workers)]
        late = [
            worker
            for worker, seconds in enumerate(waited)
            if seconds > self._timeout_s and (worker == awaited or self._watch.shard(worker) is not None)
        ]
        if not late:
            return None
        # One that stops with the lock of torch's queue keeps others from getting on, who are then at no shard.
        worker = max(late, key=lambda worker: (self._watch.shard(worker) is not None, waited[worker]))
        return LoaderError(
            f"loader process {worker} ({self._made._workers[worker].pid}) has been {self._where(worker)} for "
            f"{waited[worker]:.0f} s, longer than data.timeout_s = {self._timeout_s:g}. Look at the disk or the server "
            "that the shard is on, or raise data.timeout_s."
        )

    def _where(self, worker: int) -> str:
        shard = self._watch.shard(worker)
        return "between two batches" if shard is None else f"at {self._maker.store.name(shard)}"


@dataclass(frozen=True)
class _PartsOf:
    """The parts of every step, in the order in which they are made."""

    steps: range
    bounds: tuple[int, int]
    count: int

    def __iter__(self) -> Iterator[Part]:
        begin, size = self.bounds[0], self.bounds[1] - self.bounds[0]
        cuts = [size * number // self.count for number in range(self.count + 1)]
        for step in self.steps:
            for low, high in itertools.pairwise(cuts):
                yield Part(step, begin + low, begin + high, low)


def _begin(_: int) -> None:
    """The first thing that a loader process does."""
    # A stop request reaches the whole process group; loader processes must live until the trainer has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS sets no limit and does not take that for one
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(most, 4 * OPEN)), most))


def _as_it_is(made: Any) -> Any:
    return made

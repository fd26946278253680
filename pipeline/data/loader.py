"""plan + store + transforms → this rank's batches, in order, from any step.

    step ──plan──▶ ids ──store──▶ bytes ──transforms──▶ crop, text ──tokenizer──▶ Batch

A whole batch is made by one loader process from its step number alone, so workers, prefetching and restarts cannot
change what a step sees. A sample that cannot be read is replaced by the one that the plan names, and reported.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.record import DataError
from pipeline.data import transforms
from pipeline.data.plan import Plan, sample_uniforms
from pipeline.data.store import ShardStore

# So many unreadable substitutes in a row say that the data, not a sample, is broken.
SUBSTITUTES = 16


class Replaced(NamedTuple):
    """A planned sample that could not be used, and the one that stood in for it."""

    sample: int
    key: str
    shard: str
    reason: str
    substitute: int


class Batch(NamedTuple):
    """One rank's share of a global batch: B pairs, C = 3, S = image size, L = context length."""

    image_BCSS: Tensor  # noqa: N815  uint8
    token_BL: Tensor  # noqa: N815  int64
    id_B: Tensor  # noqa: N815  int64, the samples that were used
    replaced: list[Replaced]


@dataclass(frozen=True)
class Augmentation:
    """How a sample's bytes become a crop and a text."""

    size: tuple[int, int]
    crop_scale: tuple[float, float]
    interpolation: str
    grayscale: float
    fields: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class RankBatches(Dataset[Batch]):
    """step → this rank's Batch; step counts global batches from 0 over all epochs."""

    plan: Plan
    store: ShardStore
    augmentation: Augmentation
    tokenize: Callable[[list[str]], Tensor]
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch:
        epoch = step // self.plan.steps_per_epoch
        images, texts, used, replaced = [], [], [], []
        for planned in self.plan.rank_ids(step, self.rank, self.world):
            image_CSS, text, sample, bad = self._sample(epoch, int(planned))
            images.append(image_CSS)
            texts.append(text)
            used.append(sample)
            replaced += bad
        return Batch(torch.stack(images), self.tokenize(texts), torch.tensor(used), replaced)

    def _sample(self, epoch: int, planned: int) -> tuple[Tensor, str, int, list[Replaced]]:
        sample, replaced = planned, list[Replaced]()
        for attempt in range(SUBSTITUTES):
            shard, index = self.plan.locate(sample)
            stored = self.store.read(shard, index)
            uniforms = sample_uniforms(self.plan.seed, epoch, sample, transforms.UNIFORMS)
            try:
                text = transforms.choose_text(stored.texts, self.augmentation.fields, uniforms[:2])
                image_CSS = transforms.random_crop(
                    transforms.decode(stored.image),
                    self.augmentation.size,
                    self.augmentation.crop_scale,
                    self.augmentation.interpolation,
                    uniforms[3:],
                )
                image_CSS = transforms.maybe_grayscale(image_CSS, self.augmentation.grayscale, uniforms[2])
            except transforms.BadSample as error:
                substitute = self.plan.substitute(planned, attempt)
                name = self.store.shards[shard].name
                replaced.append(Replaced(sample, stored.key, name, str(error), substitute))
                sample = substitute
            else:
                return image_CSS, text, sample, replaced
        raise DataError(
            f"sample {planned} and {SUBSTITUTES - 1} substitutes for it are unreadable; the last was "
            f"{replaced[-1].key} in {replaced[-1].shard} ({replaced[-1].reason}). Run `python -m data_prep verify`."
        )


def stream(
    batches: RankBatches, steps: range, *, workers: int, prefetch: int, timeout_s: int, pin_memory: bool
) -> Iterator[Batch]:
    """This rank's batches of `steps`, in order, prepared ahead by loader processes."""
    loader = DataLoader(
        batches,
        sampler=steps,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        timeout=timeout_s if workers else 0,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    return iter(loader)


def _leave_signals_to_the_trainer(_: int) -> None:
    # A stop request reaches the whole process group; loader processes must live until the trainer has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch

"""Memorisation: how much better a model matches pairs that it was trained on than held-out ones of the same kind.

Shapes: N pairs of either, D = embedding width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data_prep import manifest
from data_prep.manifest import Dataset
from data_prep.record import TRAIN
from pipeline import exchange
from pipeline.evaluate import retrieval
from pipeline.evaluate.embed import Embedder, distinct, rows
from pipeline.evaluate.lot import lot
from pipeline.evaluate.measures import EmbedTexts, OpenSet
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item, read_tar
from pipeline.evaluate.statistics import Sampled
from pipeline.trained import TrainedModel

TASK = "memorisation"
WAYS = ("image_retrieval", "text_retrieval")
# Train shards are read, in a drawn order, until there are so many times the samples that are wanted.
POOL = 10


class Pairs(NamedTuple):
    """N images, each with one caption."""

    items: list[Item]
    captions: list[str]


def prepare(
    embedder: Embedder, data: Path, opened: OpenSet, image_ND: Tensor, embed: EmbedTexts
) -> tuple[OpenSet, Callable[[], Result]]:
    """Pairs of a held-out retrieval set and as many train pairs of the same sources, embedded, and how they are scored.

    Args:
        embedder: of a model that was trained on this dataset; a run's is checked for that.
        data: the dataset.
        opened: the set.
        image_ND: unit-norm, of its images.
        embed: its texts → (M, D) unit-norm.

    Raises:
        EvaluationError: the run was trained on other data, or the train split has no pair of the set's sources.

    Collective: every rank calls it.
    """
    held_out, train = exchange.from_main(lambda: draw(embedder.model, manifest.read(data), opened.items))
    unique = distinct(train.captions)
    train_ND, find = embedder.images(train.items), rows(unique, embedder.texts(unique))
    place = {item.key: number for number, item in enumerate(opened.items)}
    further = OpenSet(
        replace(opened.source, name=f"{opened.source.name}.memorisation"),
        [*held_out.items, *train.items],
        [*held_out.captions, *train.captions],
    )

    def figures() -> Result:
        held_ND = image_ND[[place[item.key] for item in held_out.items]]
        result = measure(held_ND, embed(held_out.captions), train_ND, find(train.captions))
        sources = dict(Counter(_source(item) for item in train.items))
        return replace(
            result, describe=lambda: {"pairs": {"held_out": len(held_ND), "train": len(train_ND), "sources": sources}}
        )

    return further, figures


def measure(held_image_ND: Tensor, held_text_ND: Tensor, train_image_ND: Tensor, train_text_ND: Tensor) -> Result:
    """Recall@1 both ways within N held-out pairs, and within N train pairs; _memorised is the second less the first.

    The first N images of the result are held out, the others train. A resample draws from all 2 N, so that how the two
    halves come out is independent, as in two bootstraps.

    Args:
        held_image_ND: unit-norm; row i pairs with row i of the texts; so with the others.
    """
    pairs = len(held_image_ND)
    sampled: dict[str, Sampled] = {}
    chance: dict[str, float] = {}
    parts = [
        retrieval.measure(image_ND, text_ND, range(pairs)).sampled
        for image_ND, text_ND in ((held_image_ND, held_text_ND), (train_image_ND, train_text_ND))
    ]
    for way in WAYS:
        name = f"{way}_recall@1"
        held_N, train_N = (part[name].values for part in parts)
        sampled[f"{name}_held_out"] = Sampled.of(held_N)
        sampled[f"{name}_train"] = Sampled.of(train_N, images=np.arange(pairs) + pairs)
        # The difference of two means, as the mean of two groups' means.
        sampled[f"{name}_memorised"] = Sampled.of(
            np.concatenate([-2 * held_N, 2 * train_N]), groups=np.repeat([0, 1], pairs)
        )
        chance |= {f"{name}_held_out": 1 / pairs, f"{name}_train": 1 / pairs}
    return Result(TASK, 2 * pairs, sampled, chance)


def draw(model: object, dataset: Dataset, held_out: Sequence[Item]) -> tuple[Pairs, Pairs]:
    """Held-out pairs and train pairs, as many of each source in both, one caption an image; always the same ones.

    Raises:
        EvaluationError: the model is a run that was trained on other data, or no source is in both.
    """
    if isinstance(model, TrainedModel):
        _check_trained_on(model.run, dataset)
    wanted = Counter(_source(item) for item in held_out)
    found = _candidates(dataset, wanted)
    if not any(found.values()):
        raise EvaluationError(
            f"{dataset.path}: --memorisation compares held-out pairs with train pairs of the same sources, and the "
            f"train split has no captions of {', '.join(sorted(wanted))}. Choose another set by --set."
        )
    shards: dict[str, set[str]] = {}
    for source, keys in found.items():
        for _, key, shard in sorted(keys)[: wanted[source]]:
            shards.setdefault(shard, set()).add(key)
    items = [
        item for shard, keys in sorted(shards.items()) for item in read_tar(dataset.path / shard) if item.key in keys
    ]
    train = Pairs(items, [_drawn(item, item.record["captions"]) for item in items])
    room = Counter(_source(item) for item in items)
    kept = []
    for item in sorted(held_out, key=lambda item: lot("held out", item.key)):
        room[_source(item)] -= 1
        kept += [item] if room[_source(item)] >= 0 else []
    return Pairs(kept, [_drawn(item, item.captions) for item in kept]), train


def _check_trained_on(run: Path, dataset: Dataset) -> None:
    known = json.loads((run / "environment.json").read_text(encoding="utf-8"))["datasets"]
    found = dataset.fingerprint(TRAIN)
    if found not in known.values():
        raise EvaluationError(
            f"{run} was trained on {', '.join(known)}, and not on the train split of {dataset.path} (fingerprint "
            f"{found[:12]}). Memorisation needs the data that it was trained on: --data {next(iter(known))}."
        )


def _candidates(dataset: Dataset, wanted: Counter[str]) -> dict[str, list[tuple[int, str, str]]]:
    """Of each wanted source POOL times as many train samples with captions, or all: (lot, key, shard)."""
    found: dict[str, list[tuple[int, str, str]]] = {source: [] for source in wanted}
    for name in sorted((shard.name for shard in dataset.split(TRAIN)), key=lambda name: lot("shard", name)):
        for row in manifest.read_table(dataset.path / manifest.table_of(name), ["key", "source", "captions"]):
            if row["captions"] and row["source"] in found:
                found[row["source"]].append((lot("train", row["key"]), row["key"], name))
        if all(len(found[source]) >= POOL * count for source, count in wanted.items()):
            break
    return found


def _source(item: Item) -> str:
    return str(item.record.get("source", "(none)"))


def _drawn(item: Item, captions: Sequence[str]) -> str:
    return captions[lot("caption", item.key) % len(captions)]

"""What two sharded datasets, or the splits of one, have in common: by id, by bytes, by looks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest
from data_prep.leakage import THUMBNAIL_BYTES, alike
from data_prep.manifest import Dataset
from data_prep.record import TRAIN

COLUMNS = ["key", "ids", "sha256", "original_sha256", "perceptual_hash", "thumbnail"]
EXAMPLES = 5


@dataclass(frozen=True)
class Overlap:
    """Images that two splits share.

    Attributes:
        first, second: split names, `DATASET:SPLIT`.
        images: of the first split that the second has, too, counted once under the first of the reasons that holds.
        reasons: `id`, `bytes` or `looks` → images.
        examples: some of their keys in the first split.
        leak: whether one trains what the other evaluates.
    """

    first: str
    second: str
    images: int
    reasons: dict[str, int]
    examples: tuple[str, ...]
    leak: bool


def overlaps(first: Dataset, second: Dataset | None = None) -> list[Overlap]:
    """Compare every split of one dataset with the evaluation sets of the other, and the two train splits by id and
    bytes; within one dataset where there is no second. Memory grows with the evaluation sets, and by 8 bytes an id for
    the train splits.
    """
    found = _against_evaluation(first, second or first)
    if second:
        found += [overlap for overlap in _against_evaluation(second, first) if overlap.leak]
        found += _trains(first, second)
    return found


def _rows(dataset: Dataset, split: str) -> Iterator[dict[str, Any]]:
    for shard in dataset.shards:
        if shard.split == split:
            yield from manifest.read_table(dataset.path / manifest.table_of(shard.name), COLUMNS)


def _splits(dataset: Dataset) -> list[str]:
    return list(dict.fromkeys(shard.split for shard in dataset.shards))


def _names(row: dict[str, Any]) -> dict[str, list[str]]:
    return {"id": row["ids"], "bytes": [row["sha256"], row["original_sha256"]]}


def _against_evaluation(ours: Dataset, theirs: Dataset) -> list[Overlap]:
    """Our splits against their evaluation sets."""
    known: dict[str, set[str]] = defaultdict(set)
    hashes, thumbnails, owners = [], [], []
    for split in _splits(theirs):
        if split == TRAIN:
            continue
        for row in _rows(theirs, split):
            for names in _names(row).values():
                for name in names:
                    known[name].add(split)
            hashes.append(int(row["perceptual_hash"], 16))
            thumbnails.append(row["thumbnail"])
            owners.append(split)
    hash_N = np.array(hashes, dtype=np.uint64)
    thumbnail_NP = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL_BYTES)
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    examples: dict[tuple[str, str], list[str]] = defaultdict(list)
    for split in _splits(ours):
        for row in _rows(ours, split):
            reasons: dict[str, str] = {}
            for number in alike(row["perceptual_hash"], row["thumbnail"], hash_N, thumbnail_NP):
                reasons[owners[number]] = "looks"
            for reason, names in reversed(_names(row).items()):
                reasons |= {owner: reason for name in names for owner in known.get(name, ())}
            for owner, reason in reasons.items():
                # A split shares everything with itself, and two evaluation sets of one dataset are named once.
                if ours is theirs and split != TRAIN and split <= owner:
                    continue
                counts[split, owner][reason] += 1
                examples[split, owner].append(row["key"])
                del examples[split, owner][EXAMPLES:]
    return [
        Overlap(
            f"{ours.name}:{split}",
            f"{theirs.name}:{owner}",
            reasons.total(),
            dict(reasons),
            tuple(examples[split, owner]),
            split == TRAIN,
        )
        for (split, owner), reasons in counts.items()
    ]


def _trains(first: Dataset, second: Dataset) -> list[Overlap]:
    """What both train on, which is no leak and good to know."""
    if TRAIN not in _splits(first) or TRAIN not in _splits(second):
        return []
    reasons = {}
    for reason in ("id", "bytes"):
        common = np.intersect1d(_digests(first, reason), _digests(second, reason))
        if len(common):
            reasons[reason] = len(common)
    if not reasons:
        return []
    names = f"{first.name}:{TRAIN}", f"{second.name}:{TRAIN}"
    return [Overlap(*names, max(reasons.values()), reasons, (), False)]


def _digests(dataset: Dataset, reason: str) -> NDArray[np.int64]:
    """64 bits of each image's own id, or of its stored bytes."""
    column = {"id": "ids", "bytes": "sha256"}[reason]
    values = (row[column] if reason == "bytes" else row[column][0] for row in _rows(dataset, TRAIN))
    return np.unique(np.fromiter(map(hash, values), dtype=np.int64))

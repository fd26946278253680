"""Held-out images: what training must not contain, by id, by bytes and by looks.

A photo may be known by several ids (COCO's and Flickr's), and a copy of it may lie under an id of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data_prep.images import StoredImage
from data_prep.record import Record

# Two images of one difference hash are the same photo if no value of their 8 × 8 RGB thumbnails differs by more.
# Measured: re-encoded copies of photos differ by at most 5, halved ones by 12; of 9,000 generated scenes, whose plain
# backgrounds make the difference hash collide, the nearest two that share one differ by 32.
MAX_THUMBNAIL_DIFFERENCE = 16


@dataclass(frozen=True)
class HeldOut:
    """The images of all evaluation sets.

    Attributes:
        ids: every id of each photo.
        files: sha256 of the original files and of the stored images.
        looks: perceptual hash → thumbnails in hex; empty where near-duplicates are let through.
    """

    ids: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    looks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def knows(self, record: Record) -> bool:
        """Whether a photo is held out, by its ids."""
        return not self.ids.isdisjoint(record.ids)

    def reason_against(self, image: StoredImage) -> str | None:
        """Why an image must not train, if it must not: the reason under which it is counted."""
        if image.original_sha256 in self.files or image.sha256 in self.files:
            return "held_out_file"
        for thumbnail in self.looks.get(image.perceptual_hash, ()):
            if _alike(bytes.fromhex(thumbnail), image.thumbnail):
                return "held_out_look"
        return None

    def sha256(self) -> str:
        """The hash of the whole set, for the manifest."""
        looks = [f"{name} {' '.join(thumbnails)}" for name, thumbnails in sorted(self.looks.items())]
        lines = [*sorted(self.ids), *sorted(self.files), *looks]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def held_out_ids(records: Iterable[Record]) -> frozenset[str]:
    """Every id of every photo in an evaluation set, those included that only another record tells.

    A Flickr30K test photo is held out as `flickr:N`; that COCO shows it as `coco:M`, COCO's record knows, and VQA's,
    which has the COCO id alone, must go too.
    """
    records = list(records)
    held = {name for record in records if record.evaluation for name in record.ids}
    aliased = [record.ids for record in records if record.also_known_as]
    while found := {name for ids in aliased if not held.isdisjoint(ids) for name in ids} - held:
        held |= found
    return frozenset(held)


def _alike(first: bytes, second: bytes) -> bool:
    return max(abs(a - b) for a, b in zip(first, second, strict=True)) <= MAX_THUMBNAIL_DIFFERENCE

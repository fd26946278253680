"""Held-out images: what training must not contain, by id, by bytes and by looks.

A photo may be known by several ids (COCO's and Flickr's), and a copy of it may lie under an id of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from data_prep.images import StoredImage
from data_prep.record import Record


@dataclass(frozen=True)
class HeldOut:
    """The images of all evaluation sets.

    Attributes:
        ids: every id of each photo.
        files: sha256 of the original files and of the stored images.
        looks: perceptual hashes; empty where near-duplicates are let through.
    """

    ids: frozenset[str] = frozenset()
    files: frozenset[str] = field(default=frozenset())
    looks: frozenset[str] = field(default=frozenset())

    def knows(self, record: Record) -> bool:
        """Whether a photo is held out, by its ids."""
        return not self.ids.isdisjoint(record.ids)

    def reason_against(self, image: StoredImage) -> str | None:
        """Why an image must not train, if it must not: the reason under which it is counted."""
        if image.original_sha256 in self.files or image.sha256 in self.files:
            return "held_out_file"
        if image.perceptual_hash in self.looks:
            return "held_out_look"
        return None

    def sha256(self) -> str:
        """The hash of the whole set, for the manifest."""
        lines = [*sorted(self.ids), *sorted(self.files), *sorted(self.looks)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def held_out_ids(records: Iterable[Record]) -> frozenset[str]:
    """Every id of every photo in an evaluation set."""
    return frozenset(name for record in records if record.evaluation for name in record.ids)

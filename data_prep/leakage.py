"""Held-out images: what training must not contain, by id, by bytes and by looks.

A photo may be known by several ids (COCO's and Flickr's), and a copy of it may lie under an id of its own.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.images import HASH_SIDE, StoredImage
from data_prep.locations import open_file
from data_prep.manifest import write_atomically

# Two images are the same photo if their difference hashes differ in at most so many of 64 bits, and no value of their
# 8 × 8 RGB thumbnails by more than so much: the first alone would take any two plain backgrounds for copies. Measured
# on 569 photos: of copies at JPEG quality 30 to 90, at 0.9, half and a third of the size, 99 % or more are found, of
# those that lost 2 % on every side 61 %. Different photos that agree in 10 bits: none (two agree in 11, thumbnails 120
# apart); of 3,000 generated scenes, the nearest two that do are 44 apart.
MAX_HASH_BITS = 10
MAX_THUMBNAIL_DIFFERENCE = 24

THUMBNAIL_BYTES = 3 * HASH_SIDE**2


@dataclass(frozen=True)
class HeldOut:
    """The images of all evaluation sets, as far as an image itself can tell that it is one of them.

    Attributes:
        files: sha256 of the original files and of the stored images, in hex.
        looks: (perceptual hash in hex, thumbnail) of each image; none where near-duplicates are let through.
    """

    files: frozenset[str] = frozenset()
    looks: tuple[tuple[str, bytes], ...] = ()

    def reason_against(self, image: StoredImage) -> str | None:
        """Why an image must not train, if it must not: the reason under which it is counted."""
        if image.original_sha256 in self.files or image.sha256 in self.files:
            return "held_out_file"
        if self.looks and len(alike(image.perceptual_hash, image.thumbnail, self._hash_N, self._thumbnail_NP)):
            return "held_out_look"
        return None

    @cached_property
    def _hash_N(self) -> NDArray[np.uint64]:  # noqa: N802
        return np.array([int(name, 16) for name, _ in self.looks], dtype=np.uint64)

    @cached_property
    def _thumbnail_NP(self) -> NDArray[np.uint8]:  # noqa: N802
        return np.frombuffer(b"".join(thumbnail for _, thumbnail in self.looks), np.uint8).reshape(-1, THUMBNAIL_BYTES)

    def sha256(self) -> str:
        """The hash of the whole set."""
        looks = [f"{name} {thumbnail.hex()}" for name, thumbnail in self.looks]
        return hashlib.sha256("\n".join([*sorted(self.files), *looks]).encode()).hexdigest()

    def save(self, path: Path, within: Path | None = None) -> None:
        """Write a file that `load` reads; `within` as in `data_prep.locations.appearing`."""
        buffer = io.BytesIO()
        files = np.array([bytes.fromhex(name) for name in sorted(self.files)], dtype="V32")
        np.savez(buffer, files=files, hashes=self._hash_N, thumbnails=self._thumbnail_NP)
        write_atomically(path, buffer.getvalue(), within)

    @classmethod
    def load(cls, path: Path) -> HeldOut:
        with open_file(path) as file, np.load(file, allow_pickle=False) as content:
            pairs = zip(content["hashes"].tolist(), content["thumbnails"], strict=True)
            looks = tuple((f"{number:016x}", thumbnail.tobytes()) for number, thumbnail in pairs)
            return cls(frozenset(name.tobytes().hex() for name in content["files"]), looks)


def alike(
    perceptual_hash: str, thumbnail: bytes, hash_N: NDArray[np.uint64], thumbnail_NP: NDArray[np.uint8]
) -> NDArray[np.intp]:
    """Which of N images look like this one; P = the bytes of a thumbnail."""
    near = np.flatnonzero(np.bitwise_count(hash_N ^ np.uint64(int(perceptual_hash, 16))) <= MAX_HASH_BITS)
    difference_NP = thumbnail_NP[near].astype(np.int16) - np.frombuffer(thumbnail, np.uint8)
    alike_N: NDArray[np.intp] = near[np.abs(difference_NP).max(axis=1, initial=0) <= MAX_THUMBNAIL_DIFFERENCE]
    return alike_N


def all_ids(held: Iterable[str], aliases: Collection[tuple[str, ...]]) -> frozenset[str]:
    """Every id of the held-out photos, those included that only another record tells.

    A Flickr30K test photo is held out as `flickr:N`; that COCO shows it as `coco:M`, COCO's record knows, and VQA's,
    which has the COCO id alone, must go too.

    Args:
        held: ids of the photos in evaluation sets.
        aliases: for each photo that has several ids, all of them.
    """
    known = set(held)
    while found := {name for ids in aliases if not known.isdisjoint(ids) for name in ids} - known:
        known |= found
    return frozenset(known)

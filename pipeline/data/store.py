"""Shard → the bytes of its samples, read in place from ordinary tars.

Where a sample's members lie is read from the tar's own headers when a shard is first touched: 512 bytes a member, no
index file. A shard is checked against the dataset's manifest before a sample of it is used.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.manifest import Shard
from data_prep.record import DataError

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")

# Member extension → (offset of its data in the tar, bytes).
Members = dict[str, tuple[int, int]]


class ShardError(DataError):
    """A shard that is missing, damaged, or not the one that the manifest lists."""


@dataclass(frozen=True)
class Sample:
    """The bytes of one sample: its image, and its text members by extension."""

    key: str
    image: bytes
    texts: dict[str, bytes]


@dataclass
class ShardStore:
    """Random access to the samples of a list of shards.

    Files are opened and their headers read at first use, in each process for itself.
    """

    root: Path
    shards: Sequence[Shard]
    _open: dict[int, tuple[int, list[tuple[str, Members]]]] = field(default_factory=dict, init=False, repr=False)

    def check_files(self) -> None:
        """Raise ShardError unless every shard is there with its listed size."""
        wrong = []
        for shard in self.shards:
            path = self.root / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                wrong.append(f"{shard.name} ({'missing' if size is None else f'{size} bytes, {shard.bytes} listed'})")
        if wrong:
            raise ShardError(
                f"{self.root}: {len(wrong)} of {len(self.shards)} shards are not what the manifest lists: "
                f"{', '.join(wrong[:10])}. Build the dataset again, or copy them anew."
            )

    def check_hashes(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Raise ShardError unless every shard has its listed sha256; `progress` hears of each shard's bytes."""
        for shard in self.shards:
            with (self.root / shard.name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise ShardError(
                    f"{self.root / shard.name}: sha256 is {found}, the manifest lists {shard.sha256}. "
                    "The shard is damaged: build the dataset again, or copy it anew."
                )
            progress(shard.bytes)

    def read(self, shard: int, index: int) -> Sample:
        """The sample at `index` of shard number `shard`."""
        descriptor, samples = self._opened(shard)
        key, members = samples[index]
        parts = {extension: os.pread(descriptor, size, offset) for extension, (offset, size) in members.items()}
        image = next((parts.pop(extension) for extension in IMAGE_EXTENSIONS if extension in parts), b"")
        return Sample(key, image, parts)

    def _opened(self, shard: int) -> tuple[int, list[tuple[str, Members]]]:
        if shard not in self._open:
            path = self.root / self.shards[shard].name
            descriptor = os.open(path, os.O_RDONLY)
            samples = read_headers(descriptor, path)
            if len(samples) != self.shards[shard].samples:
                os.close(descriptor)
                raise ShardError(
                    f"{path}: holds {len(samples)} samples, the manifest lists {self.shards[shard].samples}."
                )
            self._open[shard] = descriptor, samples
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "shards": self.shards, "_open": {}}  # file descriptors stay in their process


def read_headers(descriptor: int, path: Path) -> list[tuple[str, Members]]:
    """Find the samples of an open tar: (key, members) in order, members that share a key being one sample.

    A member whose extension is neither an image's nor a text's is skipped, whatever it holds.

    Raises:
        ShardError: the headers are not those of a whole, plain tar.
    """
    samples: dict[str, Members] = {}
    size = os.fstat(descriptor).st_size
    offset = 0
    while True:
        header = os.pread(descriptor, BLOCK, offset)
        if len(header) == BLOCK and not any(header):
            return list(samples.items())
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ShardError(f"{path}: no tar header at byte {offset} ({error}). The shard is damaged.") from None
        data = offset + BLOCK
        offset = data + -(-member.size // BLOCK) * BLOCK
        if member.size < 0 or offset > size:
            raise ShardError(f"{path}: {member.name} ends at byte {offset}, the file at {size}. The shard is cut off.")
        if not member.isreg():
            continue
        # webdataset's rule: a sample's key ends at the first dot of the file's name.
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        if extension in IMAGE_EXTENSIONS or extension in TEXT_EXTENSIONS:
            samples.setdefault(key, {})[extension] = (data, member.size)

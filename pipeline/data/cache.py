"""A folder of this machine's for what is fetched and found out, shared by all processes.

CACHE/shards/KEY.npy    where a shard's samples lie, 24 bytes each; that it is there says that it was verified
CACHE/shards/KEY.tar    a copy of a remote shard; the longest unused go when room is needed
CACHE/locks/            locks of the file system: one process does what many need, and a killed one leaves none
CACHE/counts/           how many samples foreign tars hold that say so nowhere
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.locations import appearing
from data_prep.record import DataError
from pipeline.data.tar_index import Places

ROOM = "room"
# What copies of remote shards may take by default, in GB.
LIMIT_GB = 100.0
# What says that a folder is full, not ours to write, or on a file system without locks.
UNUSABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTDIR, errno.EEXIST),
)


def cache_folder(asked: str = "") -> Path:
    """Where copies of remote shards are kept, and what is known of those on this machine."""
    return Path(asked or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clip-pipeline"))


@dataclass(frozen=True)
class Cache:
    """The folder, and the bytes that copies of remote shards may take in it."""

    path: Path
    limit: int

    def copy(self, key: str) -> Path:
        """Where the copy of a remote shard is kept."""
        return self.path / "shards" / f"{key}.tar"

    def places(self, key: str) -> Path:
        """Where it is kept where a shard's samples lie."""
        return self.path / "shards" / f"{key}.npy"

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of a key, alone among all processes and threads of this machine.

        Raises:
            DataError: the folder cannot be used.
        """
        with contextlib.ExitStack() as stack:
            with self._usable():
                file = stack.enter_context(self._lock_file(name).open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def appearing(self, path: Path, size: int) -> Iterator[IO[bytes]]:
        """A copy of `size` bytes to write, which appears once it is complete; its room is taken from the start.

        Raises:
            DataError: the disk has no room for it, or the folder cannot be used.
        """
        with self._usable(), appearing(path) as file:
            with self.lock(ROOM):
                self._make_room(size)
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            yield file

    def keep_places(self, key: str, places: Places) -> None:
        """Remember where a shard's samples lie, and that it was verified.

        Raises:
            DataError: the disk has no room, or the folder cannot be used.
        """
        with self._usable(), appearing(self.places(key)) as file:
            np.save(file, places)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            raise DataError(
                f"{self.path}: cannot be written to ({error.strerror}). Free some room, lower data.cache_gb, or choose "
                "another folder, on a disk of this machine, with data.cache=…"
            ) from None

    def _make_room(self, needed: int) -> None:
        """Remove copies, the longest unused first, until `needed` bytes fit within the limit.

        None whose lock is held: that shard is arriving.
        """
        found = []
        for entry in os.scandir(self.path / "shards"):
            if not entry.name.endswith(".npy"):
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry)))
        taken = sum(size for _, size, _ in found)
        for _, size, copy in sorted(found):
            if taken + needed <= self.limit:
                break
            with self._lock_file(copy.name).open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                copy.unlink(missing_ok=True)
                copy.with_suffix(".npy").unlink(missing_ok=True)
                taken -= size

    def _lock_file(self, name: str) -> Path:
        """A few thousand locks serve millions of keys."""
        path = self.path / "locks" / (name if name == ROOM else name[:3])
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

"""Shard → the bytes of its samples: in place, or from a copy on this machine that all its ranks share.

A shard arrives once: it is fetched if it is remote, hashed if its sha256 is known, and its headers are read. What was
found is kept in the cache under a hash of the shard's path, size, sha256 and time of last change (remote: ETag), so
that the next run, and every other process, begins at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.locations import FINAL, read_blocks, retried, stat_file
from data_prep.manifest import Shard, sha256
from pipeline.data.cache import Cache
from pipeline.data.tar_index import BLOCK, Places, ShardError, key_at, read_index
from pipeline.data.tars import TarSet

# A remote shard is fetched in blocks, each tried again by itself.
FETCHED = 32 << 20
# Members further apart than this are read one by one.
APART = 64 << 10
# Shards that a process keeps open at the most, with two files each, where its limit of files lets it.
OPEN = 16_384
# Shards that arrive at a time: enough to fill a line over which one transfer is slow.
ARRIVING = 4

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """The bytes of one sample; a member that it lacks is empty."""

    header: memoryview
    image: memoryview
    txt: memoryview
    json: memoryview

    @property
    def key(self) -> str:
        """As webdataset names it."""
        return key_at(self.header.tobytes())


class _Opened(NamedTuple):
    descriptor: int
    places: Places
    remote: bool


@dataclass(frozen=True)
class _Source:
    """A shard, where it is, and under which name the cache knows it."""

    path: Path
    row: Shard
    version: str
    remote: bool
    key: str


class ShardStore:
    """Random access to the samples of the shards of one or several sets, numbered through.

    Each process opens files for itself; copies of the store that were forked or pickled are independent.

    Args:
        sets: the shards.
        cache: for what is known of them, and copies of remote ones.
        verify: whether shards on this machine are hashed before they are used; remote ones always are.
    """

    def __init__(self, sets: Sequence[TarSet], cache: Cache, *, verify: bool = True) -> None:
        self.sets, self.cache, self.verify = sets, cache, verify
        self._starts = np.cumsum([0, *(len(one.shards) for one in sets)])
        self._opened: OrderedDict[int, _Opened] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": OrderedDict()}

    def name(self, shard: int) -> str:
        """For messages and logs."""
        one, row, _ = self._find(shard)
        return row.name if len(self.sets) == 1 else f"{one.address}/{row.name}"

    def bytes_of(self, shards: Sequence[int], *, remote: bool) -> int:
        """The bytes of some shards, or of the remote ones among them."""
        found = [self._find(shard) for shard in shards]
        return sum(row.bytes for one, row, _ in found if one.remote or not remote)

    def read(self, shard: int, index: int) -> Stored:
        """The sample at `index` of shard number `shard`."""
        descriptor, places, _ = self._opened.get(shard) or self._open(shard)
        members = [(first * BLOCK, length) for first, length in places[index].tolist()]
        present = sorted([member for member in members if member[0]])
        begin, end = present[0][0], sum(present[-1])
        if end - begin <= sum([length for _, length in present]) + APART:
            base = begin - BLOCK
            span = _read(descriptor, base, end - base)
            parts = [span[offset - base : offset - base + length] if length else span[:0] for offset, length in members]
            return Stored(span[:BLOCK], *parts)
        return Stored(*(_read(descriptor, *member) for member in [(begin - BLOCK, BLOCK), *members]))

    def bring(self, shards: Sequence[int], arrived: Callable[[int], None] = lambda _: None) -> None:
        """Let shards arrive, several at a time; `arrived` hears of the bytes of each.

        Raises:
            DataError: one of them cannot be used; see `arrive`.
        """
        with ThreadPoolExecutor(ARRIVING) as pool:
            waiting = [pool.submit(self.arrive, shard) for shard in shards]
            try:
                for shard, done in zip(shards, waiting, strict=True):
                    done.result()
                    arrived(self.bytes_of([shard], remote=False))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def arrive(self, shard: int) -> tuple[Path, Path]:
        """See to it that a shard is here and verified; (its tar, the places of its samples).

        Raises:
            ShardError: it is missing, damaged, or not the one that was listed.
            DataError: it cannot be fetched, or there is no room.
        """
        source = self._source(shard)
        tar = self.cache.copy(source.key) if source.remote else source.path
        places = self.cache.places(source.key)
        if places.is_file() and tar.is_file():
            return tar, places
        with self.cache.lock(source.key):
            if source.remote and not tar.is_file():
                self._fetch(source, tar)
            elif not source.remote and not places.is_file() and self.verify and source.row.sha256:
                _check_hash(source)
            if not places.is_file():
                self.cache.keep_places(source.key, _places(tar, source))
        return tar, places

    def use(self, shards: Sequence[int]) -> None:
        """Say that shards are needed now or soon: their copies are kept longest."""
        for shard in shards:
            if self.sets[self._set(shard)].remote:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self.cache.copy(self._source(shard).key))

    def _open(self, shard: int) -> _Opened:
        self._close_unneeded()
        while True:
            tar, places = self.arrive(shard)
            with contextlib.suppress(FileNotFoundError):  # evicted just now: again
                found = np.asarray(np.load(places, mmap_mode="r"))
                remote = self.sets[self._set(shard)].remote
                self._opened[shard] = _Opened(os.open(tar, os.O_RDONLY), found, remote)
                return self._opened[shard]

    def _close_unneeded(self) -> None:
        """Close what was evicted, whose room is free only then, and the longest open of too many."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = OPEN if files == resource.RLIM_INFINITY else min(OPEN, files // 4)
        for shard, opened in list(self._opened.items()):
            if len(self._opened) >= most or (opened.remote and os.fstat(opened.descriptor).st_nlink == 0):
                os.close(opened.descriptor)
                del self._opened[shard]

    def _source(self, shard: int) -> _Source:
        one, row, version = self._find(shard)
        path = one.path(row.name)
        identity = (row.bytes, row.sha256 or version)
        if one.remote:
            return _Source(path, row, version, True, _key(path, *identity))
        try:
            status = path.stat()
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error}). Copy it anew, or build the dataset again.") from None
        if status.st_size != row.bytes:
            raise ShardError(f"{path}: {status.st_size} bytes, {row.bytes} were listed. Copy it anew.")
        return _Source(path, row, version, False, _key(path.resolve(), *identity, status.st_mtime_ns, self.verify))

    def _fetch(self, source: _Source, tar: Path) -> None:
        """Copy a remote shard to this machine, and see that it is the listed one."""
        began, row = time.monotonic(), source.row

        def fetch() -> None:
            digest = hashlib.sha256()
            with self.cache.appearing(tar, row.bytes) as file:
                for block in read_blocks(source.path, row.bytes, FETCHED):
                    digest.update(block)
                    file.write(block)
                if row.sha256 and digest.hexdigest() != row.sha256:
                    raise ConnectionError(f"sha256 is {digest.hexdigest()}, the manifest lists {row.sha256}")
                if not row.sha256 and stat_file(source.path) != (row.bytes, source.version):
                    raise ShardError(f"{source.path}: changed since the run began. Start it again.")

        try:
            retried(source.path, fetch)
        except FINAL as error:
            raise ShardError(f"{source.path}: cannot be fetched ({type(error).__name__}: {error}).") from None
        log.info("fetched %s, %.1f MB, in %.2f s", row.name, row.bytes / 1e6, time.monotonic() - began)

    def _find(self, shard: int) -> tuple[TarSet, Shard, str]:
        number = self._set(shard)
        one, index = self.sets[number], int(shard - self._starts[number])
        return one, one.shards[index], one.versions[index] if one.versions else ""

    def _set(self, shard: int) -> int:
        return int(np.searchsorted(self._starts, shard, side="right")) - 1


def _read(descriptor: int, offset: int, length: int) -> memoryview:
    """Bytes of a file, in memory that tensors may share; fewer at its end."""
    buffer = memoryview(bytearray(length))
    return buffer[: os.preadv(descriptor, [buffer], offset)]


def _key(*identity: object) -> str:
    return hashlib.sha256("\n".join(map(str, identity)).encode()).hexdigest()[:32]


def _check_hash(source: _Source) -> None:
    found = sha256(source.path)
    if found != source.row.sha256:
        raise ShardError(
            f"{source.path}: sha256 is {found}, the manifest lists {source.row.sha256}. The shard is damaged: copy it "
            "anew, or build the dataset again."
        )


def _places(tar: Path, source: _Source) -> Places:
    """Where a shard's samples lie, by its headers."""
    row = source.row
    if not row.bytes:
        raise ShardError(f"{source.path}: is empty. Copy it anew.")
    with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        found = read_index(lambda offset, length: view[offset : offset + length], len(view), str(source.path))
    if len(found.places) != row.samples:
        raise ShardError(
            f"{source.path}: holds {len(found.places)} samples, {row.samples} were listed. Either it is damaged, or "
            "the list beside it (the manifest, sizes.json or NNNNN_stats.json) is another's: make it anew."
        )
    if found.ignored:
        log.info("%s: %d members are neither image nor text, and are ignored", row.name, found.ignored)
    return found.places

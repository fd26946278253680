"""The tars that are trained on: those of a dataset that data_prep sealed, or any other tool's, in place.

A foreign tar is known by its size and its ETag (on this machine by its size and its first bytes, which a copy has too),
and its samples by what lies beside it: sizes.json (open_clip) or NNNNN_stats.json (img2dataset). Where there is
neither, headers are counted, once. Nothing is written there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep import manifest
from data_prep.locations import File, exists, is_local, list_files, open_file, path_of, read_json, stat_file
from data_prep.manifest import Shard, Shards, write_atomically
from data_prep.record import TRAIN, DataError
from pipeline.data.cache import Cache
from pipeline.data.tar_index import ShardError, read_index

# Questions that a server is asked at a time.
ASKED_AT_ONCE = 32
# First bytes of a foreign tar on this machine that tell it from others: its first header, and what its first image
# begins with.
TELLING = 4096
# Shards of many that a message names.
NAMED = 10

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TarSet:
    """Tars that are trained on together.

    Attributes:
        address: what the shards' names are relative to: a folder, or an address such as s3://bucket/folder.
        shards: in order; without sha256 where they are foreign.
        versions: of foreign shards, what changes when they do; empty for sealed ones.
        fingerprint: contract 1's for sealed ones; of foreign ones, over their sizes, versions and samples.
    """

    address: str
    shards: Shards
    versions: Sequence[str]
    fingerprint: str

    @property
    def remote(self) -> bool:
        """Whether shards are fetched before they are read."""
        return not is_local(path_of(self.address))

    @property
    def at_hand(self) -> bool:
        """Whether any sample can be read at any time: sealed, and on this machine."""
        return not self.remote and not self.versions

    def path(self, name: str) -> Path:
        """Where a shard is. Made anew each time: connections must not cross into a forked process."""
        return path_of(f"{self.address}/{name}")

    def check(self) -> None:
        """See that every shard is there, with its listed size.

        Raises:
            ShardError: the first missing or wrong ones, by name.
        """
        names: list[str] = self.shards.table.column("name").to_pylist()
        found = _stat(self.address, names)
        problems = []
        for name, size in zip(names, self.shards.numbers("bytes").tolist(), strict=True):
            if (file := found.get(name)) is None:
                problems.append(f"{name} (missing)")
            elif file.size not in (size, None):
                problems.append(f"{name} ({file.size} bytes, {size} listed)")
        if problems:
            raise ShardError(
                f"{self.address}: {len(problems)} of {len(names)} shards are not as listed: "
                f"{', '.join(problems[:NAMED])}. Copy them anew, or build the dataset again."
            )


def open_tars(address: str, cache: Cache) -> TarSet:
    """The tars of a sealed dataset's train split, of a folder, or of a pattern such as https://host/{00000..00041}.tar.

    Args:
        address: folder or pattern, on this machine or behind an address.
        cache: where counted headers are remembered.

    Raises:
        DataError: nothing there that can be trained on.
    """
    path_of(address)  # refuses what is neither a path nor an address, `pipe:` above all
    if "{" in address or address.endswith(".tar"):
        return _foreign(*_named(address), cache)
    address = address.rstrip("/") or "/"
    if not exists(path_of(address) / manifest.MANIFEST) and (names := _tars_in(address)):
        return _foreign(address, names, cache)
    shards = manifest.read(path_of(address)).split(TRAIN)  # or it says what is missing
    return TarSet(address, shards, (), shards.fingerprint())


def _named(pattern: str) -> tuple[str, list[str]]:
    """(folder, names of the tars in it) of a pattern."""
    from braceexpand import braceexpand

    try:
        names = [str(name) for name in braceexpand(pattern)]
    except ValueError:
        raise DataError(f"{pattern}: a brace is missing. Such a pattern is {{00000..00041}}.tar.") from None
    same = next((at for at, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), len(min(names)))
    root, slash, _ = names[0][:same].rpartition("/")
    if root.endswith(":/"):
        raise DataError(f"{pattern}: names tars of several places. Give those of each as a dataset of its own.")
    if len(set(names)) < len(names):
        raise DataError(f"{pattern}: names a tar twice.")
    return root or slash or ".", [name.removeprefix(root + slash) for name in names]


def _tars_in(address: str) -> list[str]:
    """The names of a folder's tars, in order."""
    try:
        return sorted(name for name in list_files(path_of(address)) if name.endswith(".tar"))
    except OSError as error:
        raise DataError(f"{address}: cannot be listed ({error}). Is it the right folder?") from None


def _foreign(address: str, names: list[str], cache: Cache) -> TarSet:
    found = _stat(address, names)
    if lost := [name for name in names if name not in found]:
        raise ShardError(f"{address}: {len(lost)} of {len(names)} shards are missing: {', '.join(lost[:NAMED])}.")
    if untold := [name for name in names if found[name].size is None]:
        raise DataError(
            f"{address}/{untold[0]}: its server does not say how long it is. Copy the tars to this machine."
        )
    sizes = [found[name].size or 0 for name in names]
    if is_local(path_of(address)):
        versions = _at_once(lambda name: _telling(path_of(f"{address}/{name}")), names)
    else:
        versions = [found[name].version for name in names]
    samples = _samples(address, names, sizes, versions, cache)
    rows = "".join(f"{row}\n" for row in zip(sizes, versions, samples, strict=True))
    shards = Shards.of(
        Shard(TRAIN, name, size, "", count, count) for name, size, count in zip(names, sizes, samples, strict=True)
    )
    return TarSet(address, shards, versions, hashlib.sha256(rows.encode()).hexdigest())


def _stat(address: str, names: Sequence[str]) -> dict[str, File]:
    """Size and version of those files that are there, by name; from one listing a folder, where that tells."""
    listed: dict[str, File] = {}
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        try:
            entries = list_files(path_of(f"{address}/{folder}" if folder else address))
        except (OSError, DataError):  # there is no such folder, or its server lists none
            continue
        listed |= {f"{folder}/{name}" if folder else name: file for name, file in entries.items()}
    asked = [name for name in names if name not in listed or listed[name].size is None]

    def ask(name: str) -> File | None:
        try:
            return stat_file(path_of(f"{address}/{name}"))
        except FileNotFoundError:
            return None

    answers = zip(asked, _at_once(ask, asked), strict=True)
    return {name: listed[name] for name in names if name in listed} | {name: file for name, file in answers if file}


def _telling(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(TELLING)).hexdigest()


def _samples(address: str, names: list[str], sizes: list[int], versions: Sequence[str], cache: Cache) -> list[int]:
    """How many samples each tar holds."""
    known: dict[str, int] = {name: int(count) for name, count in _json(f"{address}/sizes.json").items()}
    if any("successes" in _json(f"{address}/{_stats_of(name)}") for name in (names[0], names[-1])):
        unknown = [name for name in names if name not in known]
        stats = zip(unknown, _at_once(lambda name: _json(f"{address}/{_stats_of(name)}"), unknown), strict=True)
        known |= {name: int(told["successes"]) for name, told in stats if "successes" in told}
    places = {name: place for name, *place in zip(names, sizes, versions, strict=True) if name not in known}
    if places:
        known |= _counted(address, places, cache)
    return [known[name] for name in names]


def _counted(address: str, tars: Mapping[str, Sequence[Any]], cache: Cache) -> dict[str, int]:
    """How many samples tars hold of which nothing tells; found once, and remembered by their sizes and versions."""
    seen = hashlib.sha256(repr((address, sorted(tars.items()))).encode()).hexdigest()
    kept = cache.path / "counts" / f"{seen}.json"
    with cache.lock(seen):
        if not kept.is_file():
            log.warning(
                "%s: no sizes.json nor NNNNN_stats.json speaks of %d tars: counting their headers, once",
                *(address, len(tars)),
            )
            counts = _at_once(lambda name: _count(f"{address}/{name}", tars[name][0]), tars)
            write_atomically(kept, json.dumps(dict(zip(tars, counts, strict=True))).encode())
        counted: dict[str, int] = json.loads(kept.read_bytes())
    return counted


def _stats_of(name: str) -> str:
    return name.removesuffix(".tar") + "_stats.json"


def _count(address: str, size: int) -> int:
    with open_file(path_of(address)) as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return len(read_index(read, size, address).places)


def _json(address: str) -> dict[str, Any]:
    """What a JSON file beside the tars says, nothing if it is not there."""
    try:
        found = read_json(path_of(address))
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def _at_once(function: Callable[..., T], *items: Iterable[Any]) -> list[T]:
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(function, *items))

"""What a sharded dataset says about itself: written last, read by every later stage, verified byte by byte.

manifest.json     totals, options, counts, and the hash of every file that is not a shard's
shards.parquet    one row a shard, in order, with its hash and that of the table beside it
manifest.sha256   of manifest.json; where it is, the dataset is whole
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.locations import appearing, exists, open_file, read_bytes
from data_prep.record import TRAIN, DataError, Kind

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

SCHEMA_VERSION = 1
MANIFEST, SEAL, SHARDS = "manifest.json", "manifest.sha256", "shards.parquet"
# What a removal of samples is about to change; there only while it does.
REMOVAL = "removal.json"
# A page about the dataset, for people.
PAGE = "report.html"


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset; `name` is relative to its folder, such as train/00000.tar."""

    split: str
    name: str
    bytes: int
    sha256: str
    samples: int
    captions: int


class Shards(Sequence[Shard]):
    """Shards in order, as columns: a million of them take 120 MB, and processes that are forked share them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @staticmethod
    def of(shards: Iterable[Shard]) -> Shards:
        """Shards from objects."""
        import pyarrow as pa

        return Shards(pa.Table.from_pylist([asdict(shard) for shard in shards], schema=_columns()))

    def __len__(self) -> int:
        return self.table.num_rows  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Shard:  # type: ignore[override]
        return Shard(**self.table.slice(range(len(self))[index], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Shard]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from (Shard(**row) for row in batch.to_pylist())

    def numbers(self, column: str) -> NDArray[np.int64]:
        """(shards,) the values of `bytes`, `samples` or `captions`."""
        import numpy as np

        return np.asarray(self.table.column(column), dtype=np.int64)

    def of_split(self, name: str) -> Shards:
        """Those of one split."""
        import pyarrow as pa

        chosen = [value == name for value in self.table.column("split").to_pylist()]
        return Shards(self.table.filter(pa.array(chosen, pa.bool_())))

    def fingerprint(self) -> str:
        """sha256 over the ordered (shard sha256, samples) rows: the bytes that train, and nothing else."""
        digest = hashlib.sha256()
        for sha256, samples in zip(
            *(self.table.column(name).to_pylist() for name in ("sha256", "samples")), strict=True
        ):
            digest.update(f"{sha256} {samples}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class EvaluationSet:
    """A folder in CLIP_benchmark's layout; `samples` images."""

    name: str
    kind: Kind
    path: Path
    samples: int


@dataclass(frozen=True)
class Dataset:
    """A whole sharded dataset, its manifest checked."""

    path: Path
    name: str
    shards: Shards
    evaluation_sets: tuple[EvaluationSet, ...]
    manifest: dict[str, Any]

    def split(self, name: str) -> Shards:
        """The shards of a split, in order.

        Raises:
            DataError: there is none; the splits that there are, are named.
        """
        found = self.shards.of_split(name)
        if not found:
            known = sorted({shard.split for shard in self.shards})
            raise DataError(f"{self.path} has no split {name!r}. It has {', '.join(known) or 'no shards at all'}.")
        return found

    def fingerprint(self, name: str) -> str:
        """That of a split."""
        return self.split(name).fingerprint()


def read(path: Path) -> Dataset:
    """Read a dataset's manifest and shard table, both checked against their hashes.

    Raises:
        DataError: no dataset there, an unfinished or damaged one, or one that newer code wrote.
    """
    if exists(path / REMOVAL):
        raise DataError(f"{path}: a removal of samples was cut off. Run the same `python -m data_prep remove` again.")
    for name in (MANIFEST, SEAL, SHARDS):
        if not exists(path / name):
            raise DataError(
                f"{path}: looked for {name} and found none. Either this is not a sharded dataset, or its build was "
                "cut off: run the same `python -m data_prep build` again, it goes on where it stopped."
            )
    text = read_bytes(path / MANIFEST)
    if read_bytes(path / SEAL) != _seal(text):
        raise DataError(
            f"{path}: {MANIFEST} has sha256 {hashlib.sha256(text).hexdigest()}, and {SEAL} does not say so. One of the "
            "two was changed or damaged: restore it from a copy, or build the dataset again with --overwrite."
        )
    manifest: dict[str, Any] = json.loads(text)
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise DataError(
            f"{path / MANIFEST}: schema version {manifest['schema_version']} is newer than {SCHEMA_VERSION}, the "
            "newest that this code reads. Update it, or build the dataset again with it."
        )
    found, wanted = sha256(path / SHARDS), manifest["files"][SHARDS]
    if found != wanted:
        raise DataError(
            f"{path / SHARDS}: sha256 is {found}, {MANIFEST} lists {wanted}. The file was changed or damaged: "
            "restore it from a copy, or build the dataset again with --overwrite."
        )
    sets = tuple(
        EvaluationSet(name, known["kind"], path / "eval" / name, known["samples"])
        for name, known in manifest["splits"].items()
        if name != TRAIN
    )
    return Dataset(path, manifest["name"], Shards(_read(path / SHARDS, _columns().names)), sets, manifest)


def write(path: Path, manifest: dict[str, Any], shards: Iterable[Shard], files: Iterable[str]) -> None:
    """Seal a dataset: the shard table, then the manifest with the hash of each of `files`, then its own hash.

    The table beside each shard (`table_of`) is hashed into the shard table, so that the manifest stays small.
    """
    _write_shards(path, shards)
    hashes = {name: sha256(path / name) for name in sorted({SHARDS, *files})}
    text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest, "files": hashes}, indent=1, ensure_ascii=False)
    write_atomically(path / MANIFEST, text.encode())
    write_atomically(path / SEAL, _seal(text.encode()))


def table_of(shard: str) -> str:
    """The name of the table of samples that lies beside a shard."""
    return shard.removesuffix(".tar") + ".parquet"


def verify(path: Path, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """Hash every file of a dataset; the problems found, one sentence each, none where it is sound.

    `progress` hears of the bytes of each file that was read.
    """
    dataset = read(path)
    expected = {shard.name: shard.sha256 for shard in dataset.shards} | _read_tables(path / SHARDS)
    expected |= dataset.manifest["files"]
    problems = []
    for name, wanted in expected.items():
        if not (path / name).is_file():
            problems.append(f"{name}: missing.")
            continue
        if (found := sha256(path / name)) != wanted:
            problems.append(f"{name}: sha256 is {found}, the manifest lists {wanted}.")
        progress((path / name).stat().st_size)
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    problems += [f"{name}: not listed in the manifest." for name in sorted(present - {*expected, MANIFEST, SEAL})]
    return problems


def sha256(path: Path) -> str:
    """A file's sha256, in hex."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes, within: Path | None = None) -> None:
    """Write a file that is seen whole or not at all; `within` as in `data_prep.locations.appearing`."""
    with appearing(path, within) as file:
        file.write(data)


def _seal(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def read_table(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    rows: list[dict[str, Any]] = _read(path, columns).to_pylist()
    return rows


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    import pyarrow.parquet as pq

    with open_file(path) as file:
        # In this thread: pyarrow's own have been seen to abort the process at its end.
        return pq.ParquetFile(file, pre_buffer=False).read(columns=columns, use_threads=False)


def _columns() -> pa.Schema:
    """The columns of a Shard."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    types = {"split": text, "name": text, "bytes": number, "sha256": text, "samples": number, "captions": number}
    return pa.schema(types)


def _read_tables(path: Path) -> dict[str, str]:
    """The sha256 of the table beside each shard."""
    return {table_of(row["name"]): row["table_sha256"] for row in read_table(path, ["name", "table_sha256"])}


def _write_shards(path: Path, shards: Iterable[Shard]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [asdict(shard) | {"table_sha256": sha256(path / table_of(shard.name))} for shard in shards]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_columns().append(pa.field("table_sha256", pa.string()))), buffer)
    write_atomically(path / SHARDS, buffer.getvalue().to_pybytes())

"""Takes samples out of a finished dataset: people who opt out, photos that must go.

New shards are written beside the old ones, then a journal of all that is to change, then it changes. Killed before the
journal, nothing has happened; killed after it, the next run goes on from it.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_prep import manifest, report
from data_prep.locations import appearing, is_local
from data_prep.manifest import Dataset, Shard
from data_prep.record import TRAIN, DataError
from data_prep.shards import write_table

NEW = ".new"


def remove(path: Path, names: Collection[str]) -> Dataset:
    """Remove the samples of these keys, image ids or sha256 sums, rewriting only their shards and the manifest.

    A train sample's key is unique; an evaluation sample is named by its image id or sum.

    Raises:
        DataError: a name is not in the dataset (nothing is changed then), or the dataset is not on this machine.
    """
    if not is_local(path):
        raise DataError(f"{path}: samples are removed from datasets on this machine only. Copy it here.")
    if (path / manifest.REMOVAL).is_file():
        _apply(path)
    _discard(path)  # what a killed run left
    dataset = manifest.read(path)
    wanted, found = set(names), set()
    shards: list[Shard] = []
    changed: list[str] = []
    lines: list[dict[str, Any]] = []
    for shard in dataset.shards:
        rows = manifest.read_table(path / manifest.table_of(shard.name))
        going = {}
        for row in rows:
            called = {row["image_id"], *row["ids"], row["sha256"], row["original_sha256"]}
            hits = wanted & (called | {row["key"]} if shard.split == TRAIN else called)
            if hits:
                going[row["key"]] = row
                found |= hits
        if not going:
            shards.append(shard)
            continue
        kept = [row for row in rows if row["key"] not in going]
        shards.append(_rewrite(path, shard, kept, going))
        changed.append(shard.name)
        for row in going.values():
            where = {"image_id": row["image_id"], "source": row["source"], "split": shard.split}
            lines.append({**where, "reason": "removed", "detail": ""})
    if unknown := sorted(wanted - found):
        _discard(path)
        raise DataError(
            f"{path}: {len(unknown)} of the names are not in it, such as {unknown[0]!r}; nothing was removed."
        )
    _journal(dataset, shards, changed, lines)
    _apply(path)
    return manifest.read(path)


def _rewrite(path: Path, shard: Shard, kept: list[dict[str, Any]], going: Collection[str]) -> Shard:
    """Write a shard's tar and table without some samples, both under their names + NEW."""
    with (path / shard.name).open("rb") as old, appearing(path / (shard.name + NEW)) as file:
        with tarfile.open(fileobj=old, mode="r:") as source, tarfile.open(fileobj=file, mode="w|") as target:
            for member in source:
                if member.name.partition(".")[0] not in going:
                    target.addfile(member, source.extractfile(member))
        file.flush()
        digest, size = manifest.sha256(Path(file.name)), file.tell()
    write_table(path / (manifest.table_of(shard.name) + NEW), kept)
    captions = sum(len(row["captions"]) for row in kept)
    return dataclasses.replace(shard, bytes=size, sha256=digest, samples=len(kept), captions=captions)


def _journal(dataset: Dataset, shards: list[Shard], changed: list[str], lines: list[dict[str, Any]]) -> None:
    """Write down all that is to change."""
    content = json.loads(json.dumps(dataset.manifest))
    for split, totals in content["splits"].items():
        ours = [shard for shard in shards if shard.split == split]
        for name in ("samples", "captions", "bytes"):
            totals[name] = sum(getattr(shard, name) for shard in ours)
    removed = Counter(line["source"] for line in lines)
    for source, number in removed.items():
        reasons = content["counts"]["dropped"].setdefault(source, {})
        reasons["removed"] = reasons.get("removed", 0) + number
        content["counts"]["kept"][source] -= number
    journal = {
        "changed": changed,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "manifest": {name: value for name, value in content.items() if name not in ("schema_version", "files")},
        "files": [name for name in content["files"] if name != manifest.SHARDS],
        "quarantine": (dataset.path / "quarantine.jsonl").read_text(encoding="utf-8")
        + "".join(json.dumps(line) + "\n" for line in lines),
    }
    manifest.write_atomically(dataset.path / manifest.REMOVAL, json.dumps(journal).encode())


def _apply(path: Path) -> None:
    """Do what the journal says, however much of it is done already."""
    journal = json.loads((path / manifest.REMOVAL).read_text(encoding="utf-8"))
    (path / manifest.SEAL).unlink(missing_ok=True)
    for shard in journal["changed"]:
        for name in (shard, manifest.table_of(shard)):
            if (path / (name + NEW)).is_file():
                (path / (name + NEW)).replace(path / name)
    shards = [Shard(**row) for row in journal["shards"]]
    sizes = {Path(shard.name).name: shard.samples for shard in shards if shard.split == TRAIN}
    if sizes:
        manifest.write_atomically(path / "train/sizes.json", json.dumps(sizes).encode())
    manifest.write_atomically(path / "quarantine.jsonl", journal["quarantine"].encode())
    report.write(path, shards, journal["manifest"])
    manifest.write(path, journal["manifest"], shards, journal["files"])
    (path / manifest.REMOVAL).unlink()


def _discard(path: Path) -> None:
    for new in path.rglob(f"*{NEW}"):
        new.unlink()

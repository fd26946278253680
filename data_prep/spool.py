"""Records on their way from the sources to the shards, in files once they are many, so that memory does not grow.

A record's place in training is decided by a hash of its id. Records are dealt to files by the first bits of that hash:
each file is a stretch of the final order, small enough to be sorted by itself, and all records of one image meet in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.locations import path_of
from data_prep.record import Evaluation, Record

# Records held in memory before they go to files.
BUFFERED = 100_000
STRETCHES = 1024


def to_line(record: Record) -> str:
    """A record as JSON; its evaluation set by name alone."""
    content: dict[str, Any] = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    content |= {"path": str(record.path), "evaluation": record.evaluation.name if record.evaluation else None}
    return json.dumps({name: value for name, value in content.items() if value not in (None, ())})


def from_line(line: str, evaluation: Evaluation | None = None) -> Record:
    """The record that `to_line` wrote, of this evaluation set."""
    content = json.loads(line)
    for name in ("captions", "questions", "also_known_as", "span"):
        if name in content:
            content[name] = tuple(content[name])
    return Record(**{**content, "path": path_of(content["path"]), "evaluation": evaluation})


class Spool:
    """Lines by stretch, in `folder` once there are more than BUFFERED of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self._written: set[int] = set()
        self._waiting: dict[int, list[str]] = defaultdict(list)
        self._buffered = 0

    def add(self, stretch: int, line: str) -> None:
        self._waiting[stretch].append(line)
        self._buffered += 1
        self.count += 1
        if self._buffered >= BUFFERED:
            self._flush()

    def lines(self, stretch: int) -> Iterator[str]:
        """A stretch's lines in the order in which they came."""
        if stretch in self._written:
            with self._file(stretch).open(encoding="ascii") as file:
                for line in file:
                    yield line.rstrip("\n")
        yield from self._waiting.get(stretch, ())

    def _flush(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stretch, lines in self._waiting.items():
            with self._file(stretch).open("a", encoding="ascii") as file:
                file.writelines(f"{line}\n" for line in lines)
        self._written.update(self._waiting)
        self._waiting.clear()
        self._buffered = 0

    def _file(self, stretch: int) -> Path:
        return self.folder / f"{stretch:04d}.jsonl"


def place(seed: int, image_id: str) -> bytes:
    """Where an image stands in training: places sort like their bytes."""
    return hashlib.sha256(f"{seed}:{image_id}".encode("utf-8", "surrogatepass")).digest()


def stretch_of(place_: bytes) -> int:
    """The stretch of a place, in ascending order of places."""
    return int.from_bytes(place_[:4], "big") * STRETCHES >> 32

"""Sources → records by split, merged by image, in the order in which shards will hold them, however many they are."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep import executor, leakage, sources
from data_prep.executor import Executor
from data_prep.locations import read_bytes
from data_prep.record import DataError, Evaluation, Record
from data_prep.sources import ReadOptions
from data_prep.spool import STRETCHES, Spool, from_line, place, stretch_of, to_line

# Images read at a time where a lot is drawn by their bytes.
LOT = 500


@dataclass
class Intake:
    """All that the sources gave.

    Attributes:
        read: records by source.
        origin: sha256 of all records, in order.
        evaluation_sets: by name, in the order of their first records.
    """

    train: Spool
    held_out: Spool
    seed: int
    read: Counter[str] = field(default_factory=Counter)
    origin: str = ""
    evaluation_sets: dict[str, Evaluation] = field(default_factory=dict)
    _held_ids: set[str] = field(default_factory=set)
    _aliases: list[tuple[str, ...]] = field(default_factory=list)

    def held_out_ids(self) -> frozenset[str]:
        return leakage.all_ids(self._held_ids, self._aliases)

    def evaluation_records(self, name: str) -> Iterator[Record]:
        """An evaluation set's records, in the order of its source; an image that several rows name comes once."""
        evaluation = self.evaluation_sets[name]
        lines = self.held_out.lines(list(self.evaluation_sets).index(name))
        return iter(_merged(from_line(line, evaluation) for line in lines))

    def train_records(self, held_out: frozenset[str], drop: Callable[[Record, str], None]) -> Iterator[Record]:
        """Train records in an order drawn from their ids, so that every shard mixes all sources; one an image (what
        COCO and VQA share is merged). Those that are held out go to `drop`."""
        for stretch in range(STRETCHES):
            records = []
            for record in map(from_line, self.train.lines(stretch)):
                if held_out.isdisjoint(record.ids):
                    records.append(record)
                else:
                    drop(record, "held_out_id")
            yield from sorted(_merged(records), key=lambda record: place(self.seed, record.image_id))

    def some_records(self) -> Iterator[Record]:
        """Records as they will come, train or else evaluation ones."""
        lines = itertools.chain.from_iterable(map(self.train.lines, range(STRETCHES)))
        held_out = itertools.chain.from_iterable(map(self.held_out.lines, range(len(self.evaluation_sets))))
        return map(from_line, itertools.chain(lines, held_out))

    def add(self, record: Record) -> str:
        """Put a record where it belongs, and return its line."""
        line = to_line(record)
        self.read[record.source] += 1
        if record.also_known_as:
            self._aliases.append(record.ids)
        if record.evaluation:
            name = record.evaluation.name
            if self.evaluation_sets.setdefault(name, record.evaluation) != record.evaluation:
                raise DataError(
                    f"Two evaluation sets are called {name}, the second at {record.path.parent}. Rename one."
                )
            self._held_ids.update(record.ids)
            self.held_out.add(list(self.evaluation_sets).index(name), line)
        else:
            self.train.add(stretch_of(place(self.seed, record.image_id)), line)
        return line


def take(
    pairs: Iterable[tuple[str, Path]],
    options: ReadOptions,
    hold_out: Mapping[Evaluation, float],
    seed: int,
    folder: Path,
    cores: Executor,
) -> Intake:
    """Read all sources.

    Args:
        hold_out: evaluation set → the share of undivided images that becomes it.
        folder: for what does not fit into memory.

    Raises:
        DataError: a source is missing or malformed, or two of them contradict each other.
    """
    intake = Intake(Spool(folder / "train"), Spool(folder / "held_out"), seed)
    digest = hashlib.sha256()
    # Where images that came as bytes were put for now does not matter.
    spill = json.dumps(str(options.spill))[1:-1]
    for name, root in pairs:
        records = sources.read(name, root, options)
        for record in _by_lot(records, hold_out, cores) if hold_out else records:
            digest.update(intake.add(record).replace(spill, "").encode())
    digest.update(repr(intake.evaluation_sets).encode("utf-8", "surrogatepass"))
    intake.origin = digest.hexdigest()
    return intake


def _by_lot(records: Iterator[Record], shares: Mapping[Evaluation, float], cores: Executor) -> Iterator[Record]:
    """Draw evaluation sets from undivided records, by their images' bytes: copies of an image share its fate."""
    chunks = iter(lambda: tuple(itertools.islice(records, LOT)), ())
    bounds = list(zip(shares, itertools.accumulate(shares.values()), strict=True))
    for chunk, lots in executor.with_tasks(cores, _lots, chunks):
        for record, lot in zip(chunk, lots, strict=True):
            drawn = next((evaluation for evaluation, bound in bounds if lot < bound), None)
            yield dataclasses.replace(record, evaluation=drawn) if drawn else record


def _lots(records: tuple[Record, ...]) -> list[float]:
    """A number in [0, 1) for each image, decided by its bytes; 1 where there is nothing to draw."""
    return [_lot(record) if record.undivided else 1.0 for record in records]


def _lot(record: Record) -> float:
    try:
        content = read_bytes(record.path, record.span)
    except (OSError, ValueError):
        return 1.0  # it will be counted as missing among the train images
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


def _merged(records: Iterable[Record]) -> list[Record]:
    merged: dict[str, Record] = {}
    for record in records:
        known = merged.get(record.image_id)
        merged[record.image_id] = _merge(known, record) if known else record
    return list(merged.values())


def _merge(first: Record, second: Record) -> Record:
    """One record of two that show the same image.

    Raises:
        DataError: two files go by one name that no dataset-wide id tells apart, or an evaluation set has one twice.
    """
    if second.undivided and (first.path, first.span) != (second.path, second.span):
        raise DataError(
            f"{second.image_id} is {first.path} in one table and {second.path} in another. Give one of the tables "
            "another file name."
        )
    if second.evaluation and not second.undivided:
        raise DataError(
            f"{second.evaluation.name} has the image {second.image_id} twice: {first.path} and {second.path}. Is a "
            "source given twice?"
        )
    questions = {question["question_id"]: question for question in (*first.questions, *second.questions)}
    return dataclasses.replace(
        first,
        source="+".join(dict.fromkeys([*first.source.split("+"), second.source])),
        captions=tuple(dict.fromkeys([*first.captions, *second.captions])),
        questions=tuple(questions.values()),
        license=second.license if first.license is None else first.license,
        also_known_as=tuple(dict.fromkeys([*first.also_known_as, *second.also_known_as])),
    )

"""Sources → one sharded dataset (contract 1), with nothing in train that an evaluation set holds.

sources ──take──▶ records by split ──▶ evaluation shards ──▶ held-out ids, bytes and looks ──▶ train shards
                                                                                     manifest, last
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import executor, manifest, report
from data_prep.captions import TextRules
from data_prep.estimate import estimate
from data_prep.intake import Intake, take
from data_prep.leakage import HeldOut
from data_prep.locations import appearing, remove_tree
from data_prep.manifest import Shard
from data_prep.parts import Part, own_folder
from data_prep.record import TRAIN, DataError, Evaluation, Record
from data_prep.scores import REASON, LowScores
from data_prep.shards import BUILD, Made, Task, held_out_file, make, tools
from data_prep.sources import ReadOptions

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How a dataset is made; all but the last two are written into its manifest.

    Attributes:
        name: of the dataset.
        resize: pixels of the shorter side, never enlarged; None keeps images as they are.
        samples_per_shard: records a shard, before any is dropped.
        seed: of the order in which records are dealt to train shards.
        near_duplicates: also drop train images that look like a held-out one.
        licenses: licence ids that may train, as COCO numbers them; none means all, and also the unknown.
        rules: what is done to texts.
        hold_out: (split, share) pairs: that much of the images without splits becomes the evaluation set NAME_SPLIT.
        low: texts that fit their images too little to train.
        executor, workers: what does the work (`data_prep.executor`), and how many processes of this machine.
    """

    name: str
    resize: int | None = None
    samples_per_shard: int = 1000
    seed: int = 0
    near_duplicates: bool = True
    licenses: tuple[int, ...] = ()
    rules: TextRules = field(default_factory=TextRules)
    hold_out: tuple[tuple[str, float], ...] = ()
    low: LowScores | None = None
    executor: str = "local"
    workers: int = 1


@dataclass
class Tally:
    """What has become of the records so far; what was dropped is in files, since it may be much.

    Attributes:
        results: the tasks' result files, in order.
        files, looks: of evaluation images, see `data_prep.leakage.HeldOut`.
    """

    quarantine: Path
    shards: list[Shard] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)
    scrubbed: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    results: list[Path] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    looks: set[tuple[str, str]] = field(default_factory=set)

    def drop(self, record: Record, reason: str) -> None:
        """A record that no shard got."""
        line = {"image_id": record.image_id, "source": record.source, "split": TRAIN, "reason": reason, "detail": ""}
        self.dropped[record.source][reason] += 1
        with self.quarantine.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add(self, task: Task, made: Made) -> None:
        self.shards.append(made.shard)
        self.kept.update(made.kept)
        self.scrubbed.update(made.scrubbed)
        self.results.append(task.result)
        self.files.update(made.files)
        self.looks.update(made.looks)
        for item in made.dropped:
            self.dropped[item["source"]][item["reason"]] += 1

    def quarantined(self) -> Iterator[str]:
        """A line for each image or text that was dropped."""
        if self.quarantine.is_file():
            with self.quarantine.open(encoding="utf-8") as file:
                yield from file
        for path in self.results:
            for item in json.loads(path.read_text(encoding="utf-8"))["dropped"]:
                yield json.dumps(item) + "\n"


def build(
    pairs: list[tuple[str, Path]],
    out: Path,
    options: Options,
    reading: ReadOptions,
    progress: Progress = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    part: Part | None = None,
) -> manifest.Dataset | None:
    """Build a dataset, or finish one that was cut off, or make one part's share of its shards.

    Args:
        progress: hears of (stage, images done, images in all).
        say: hears what it will take, and what was there already.
        part: see `data_prep.parts`.

    Returns:
        The dataset, where it is whole; None after a part's share.

    Raises:
        DataError: a source is missing or malformed or has no records, two of them contradict each other, or `out` holds
            something else (files of other origin, or a dataset that other sources or options made) or has no room.
    """
    if not 1 <= options.samples_per_shard <= 10_000:
        raise DataError(
            f"--samples-per-shard is 1 to 10000, since keys count in four digits; {options.samples_per_shard}."
        )
    _refuse_foreign(out)
    with own_folder(out, alone=part is None) as scratch:
        reading = dataclasses.replace(reading, spill=scratch / "spill")
        with executor.EXECUTORS[options.executor](options.workers) as cores:
            shares = {Evaluation(f"{options.name}_{split}", "retrieval"): share for split, share in options.hold_out}
            intake = take(pairs, reading, shares, options.seed, scratch, cores)
            if not intake.read:
                raise DataError(f"{', '.join(f'{name}={root}' for name, root in pairs)}: no records at all.")
            if options.low and not any(map(options.low.of, intake.some_records())):
                raise DataError(
                    f"--scores: none of the {len(options.low.texts):,} images with a text below {options.low.below} is "
                    "in these sources. Were others scored? Images are known by their ids."
                )
            recorded = _recorded(options, reading)
            origin = hashlib.sha256(f"{intake.origin} {recorded}".encode()).hexdigest()
            if found := _finished(out, origin):
                return found
            scratch.mkdir(parents=True, exist_ok=True)
            manifest.write_atomically(out / BUILD / ORIGIN, json.dumps({"origin": origin}).encode(), scratch)

            images = intake.held_out.count + intake.train.count
            parts = part.parts if part else 1
            say(estimate(intake.some_records(), images, out, options.resize, options.workers * parts))
            tally = Tally(scratch / "dropped.jsonl")
            run = functools.partial(_run, tally=tally, cores=cores, progress=progress, say=say)
            # Evaluation sets first: what they hold decides what may train.
            evaluation = _evaluation_tasks(intake, out, scratch, options)
            run("evaluation sets", part.in_turn(evaluation) if part else evaluation, intake.held_out.count)
            looks = ((name, bytes.fromhex(thumbnail)) for name, thumbnail in sorted(tally.looks))
            held_out = HeldOut(frozenset(tally.files), tuple(looks) if options.near_duplicates else ())
            held_out.save(held_out_file(out, held_out.sha256()), scratch)
            ids = intake.held_out_ids()
            records = _licensed(intake.train_records(ids, tally.drop), options.licenses, tally)
            tasks = _train_tasks(records, out, scratch, options, held_out.sha256())
            run("train", part.share(tasks) if part else tasks, intake.train.count // parts)
            # Another process may have begun or ended here meanwhile, and must not be sealed as this one's.
            if (found := _finished(out, origin)) or part:
                return found
            if options.low:
                low, count = sum(counts[REASON] for counts in tally.dropped.values()), options.low.summary()["texts"]
                say(f"{low:,} texts left out, of {count:,} scored below {options.low.below}")

        content = {
            "name": options.name,
            "origin": origin,
            "options": recorded,
            "splits": _describe(intake.evaluation_sets.values(), tally.shards),
            "counts": {
                "read": dict(sorted(intake.read.items())),
                # An image of two sources counts once, under both names.
                "kept": dict(sorted(tally.kept.items())),
                "dropped": {name: dict(sorted(counts.items())) for name, counts in sorted(tally.dropped.items())},
                "scrubbed": dict(sorted((+tally.scrubbed).items())),
            },
            "held_out_sha256": hashlib.sha256("\n".join([*sorted(ids), held_out.sha256()]).encode()).hexdigest(),
            "tools": tools(),
        }
        files = _write_side_files(out, intake.evaluation_sets.values(), tally)
        report.write(out, tally.shards, content)
        manifest.write(out, content, tally.shards, [*files, manifest.PAGE])
    remove_tree(out / BUILD)
    return manifest.read(out)


# The file below BUILD that says what a dataset under way is made from.
ORIGIN = "origin.json"
QUARANTINE = "quarantine.jsonl"


def _licensed(records: Iterable[Record], licenses: tuple[int, ...], tally: Tally) -> Iterator[Record]:
    for record in records:
        if not licenses or record.license in licenses:
            yield record
        else:
            tally.drop(record, "license")


def _refuse_foreign(out: Path) -> None:
    ours = (out / manifest.SEAL).is_file() or (out / BUILD).is_dir()
    if not ours and out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no dataset. Choose another --out.")


def _finished(out: Path, origin: str) -> manifest.Dataset | None:
    """What is to be built, if `out` already holds it whole.

    Raises:
        DataError: it holds something else.
    """
    found, state = None, "a finished"
    if (out / manifest.SEAL).is_file():
        found = manifest.read(out).manifest["origin"]
    elif (out / BUILD / ORIGIN).is_file():
        found, state = json.loads((out / BUILD / ORIGIN).read_text(encoding="utf-8"))["origin"], "an unfinished"
    if found not in (None, origin):
        raise DataError(
            f"{out} holds {state} dataset made from other sources or options. Choose another --out, repeat the "
            "command that made it, or replace it with --overwrite."
        )
    if found is None or state == "an unfinished":
        return None
    remove_tree(out / BUILD)  # of a build that was killed just after the seal, or of a part that came late
    return manifest.read(out)


def _evaluation_tasks(intake: Intake, out: Path, scratch: Path, options: Options) -> Iterator[Task]:
    for name in sorted(intake.evaluation_sets):
        first = 0
        for number, part in enumerate(_parts(intake.evaluation_records(name), options.samples_per_shard)):
            keys = tuple(f"s{first + index:07d}" for index in range(len(part)))
            first += len(part)
            tar = f"eval/{name}/test/{number}.tar"
            yield Task(out, scratch, tar, name, part, keys, options.resize, options.rules)


def _train_tasks(
    records: Iterator[Record], out: Path, scratch: Path, options: Options, held_out: str
) -> Iterator[Task]:
    for number, part in enumerate(_parts(records, options.samples_per_shard)):
        keys = tuple(f"{number:05d}{index:04d}" for index in range(len(part)))
        low = tuple(map(options.low.of, part)) if options.low else ()
        tar = f"train/{number:05d}.tar"
        yield Task(out, scratch, tar, TRAIN, part, keys, options.resize, options.rules, held_out, low)


def _parts(records: Iterator[Record], size: int) -> Iterator[tuple[Record, ...]]:
    return iter(lambda: tuple(itertools.islice(records, size)), ())


def _run(
    stage: str,
    tasks: Iterable[Task],
    total: int,
    tally: Tally,
    cores: executor.Executor,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Make shards; `total` counts records before any were merged or held out."""
    done = 0
    shards: Counter[bool] = Counter()
    for task, made in executor.with_tasks(cores, make, tasks):
        tally.add(task, made)
        shards[made.found] += 1
        done += len(task.records)
        progress(stage, min(done, total), total)
    progress(stage, total, total)
    if shards[True]:
        say(f"{stage}: {shards[True]:,} of {shards.total():,} shards were there already")


def _write_side_files(out: Path, evaluation_sets: Iterable[Evaluation], tally: Tally) -> list[str]:
    """The small files that other tools look for, and the list of what was dropped; their names are returned."""
    contents: dict[str, str] = {}
    sizes = {Path(shard.name).name: shard.samples for shard in tally.shards if shard.split == TRAIN}
    if sizes:
        contents["train/sizes.json"] = json.dumps(sizes)
    for evaluation in evaluation_sets:
        folder = f"eval/{evaluation.name}"
        tars = sum(shard.split == evaluation.name for shard in tally.shards)
        contents[f"{folder}/test/nshards.txt"] = f"{tars}\n"
        contents[f"{folder}/dataset_type.txt"] = f"{DATASET_TYPES[evaluation.kind]}\n"
        if evaluation.kind == "classification":
            contents[f"{folder}/classnames.txt"] = "".join(f"{name}\n" for name in evaluation.class_names)
            templates = "".join(f"{template}\n" for template in evaluation.templates)
            contents[f"{folder}/zeroshot_classification_templates.txt"] = templates
    for name, text in contents.items():
        manifest.write_atomically(out / name, text.encode("utf-8", "replace"))
    with appearing(out / QUARANTINE) as file:
        for line in tally.quarantined():
            file.write(line.encode())
    return [*contents, QUARANTINE]


# What CLIP_benchmark calls the kinds; it knows the first two, and takes an absent file for classification.
DATASET_TYPES = {
    "classification": "classification",
    "retrieval": "retrieval",
    "selection": "image_caption_selection",
    "vqa": "vqa",
}


def _describe(evaluation_sets: Iterable[Evaluation], shards: Iterable[Shard]) -> dict[str, Any]:
    """Totals of each split."""
    kinds = {evaluation.name: evaluation.kind for evaluation in evaluation_sets}
    described: dict[str, Any] = {}
    for shard in shards:
        totals = described.setdefault(
            shard.split, {"kind": kinds.get(shard.split, TRAIN), "shards": 0, "samples": 0, "captions": 0, "bytes": 0}
        )
        totals["shards"] += 1
        totals["samples"] += shard.samples
        totals["captions"] += shard.captions
        totals["bytes"] += shard.bytes
    return described


def _recorded(options: Options, reading: ReadOptions) -> dict[str, Any]:
    recorded = dataclasses.asdict(dataclasses.replace(options, low=None)) | dataclasses.asdict(reading)
    del recorded["executor"], recorded["workers"], recorded["spill"]  # the bytes do not depend on them
    del recorded["low"]
    return recorded | ({"scores": options.low.summary()} if options.low else {})

"""Sources → one sharded dataset (contract 1), with nothing in train that an evaluation set holds.

sources ──read──▶ records ──merge by image──▶ held-out ids ──▶ evaluation shards ──▶ held-out hashes ──▶ train shards
                                                                                                manifest, last
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import executor, leakage, manifest, sources
from data_prep.leakage import HeldOut
from data_prep.record import TRAIN, DataError, Evaluation, Record
from data_prep.shards import BUILD, Made, Task, make

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How a dataset is made; all but `workers` are written into its manifest.

    Attributes:
        name: of the dataset.
        resize: pixels of the shorter side, never enlarged; None keeps images as they are.
        samples_per_shard: records a shard, before any is dropped.
        seed: of the order in which records are dealt to train shards.
        near_duplicates: also drop train images that look like a held-out one.
        workers: processes.
    """

    name: str
    resize: int | None = None
    samples_per_shard: int = 1000
    seed: int = 0
    near_duplicates: bool = True
    workers: int = 1


def build(
    pairs: list[tuple[str, Path]],
    out: Path,
    options: Options,
    table: sources.TableOptions,
    progress: Progress = lambda stage, done, total: None,
) -> manifest.Dataset:
    """Build a dataset, or finish one that was cut off; `progress` hears of (stage, images done, images in all).

    Raises:
        DataError: a source is missing or malformed or has no records, two of them contradict each other, or `out` holds
            something else: files of other origin, or a dataset that other sources or options made.
    """
    if not 1 <= options.samples_per_shard <= 10_000:
        raise DataError(
            f"--samples-per-shard is 1 to 10000, since keys count in four digits; {options.samples_per_shard}."
        )
    records = [record for name, root in pairs for record in sources.read(name, root, table)]
    if not records:
        raise DataError(f"{', '.join(f'{name}={root}' for name, root in pairs)}: no records at all.")
    read = Counter(record.source for record in records)
    order = hashlib.sha256()
    for record in records:
        order.update(repr(record).encode("utf-8", "surrogatepass"))
    origin = hashlib.sha256(f"{order.hexdigest()} {_recorded(options, table)}".encode()).hexdigest()
    if _is_finished(out, origin):
        shutil.rmtree(out / BUILD, ignore_errors=True)  # where a build was killed just after the seal
        return manifest.read(out)

    held_out = HeldOut(ids=leakage.held_out_ids(records))
    merged, dropped = _train_records(records, held_out)
    by_set = _evaluation_sets(records)
    manifest.write_atomically(_claim(out), json.dumps({"origin": origin}).encode())

    with executor.processes(options.workers) as cores:
        # Evaluation sets first: what they hold decides what may train.
        evaluation_tasks = [
            task
            for evaluation in sorted(by_set, key=lambda s: s.name)
            for task in _evaluation_tasks(evaluation, by_set[evaluation], out, options)
        ]
        made = _run("evaluation sets", evaluation_tasks, cores, progress)
        held_out = dataclasses.replace(
            held_out,
            files=frozenset(name for result in made for name in result.files),
            looks=_looks(made) if options.near_duplicates else {},
        )
        made += _run("train", _train_tasks(merged, out, options, held_out), cores, progress)

    dropped += [item for result in made for item in result.dropped]
    described = _describe(by_set, made)
    files = _write_side_files(out, by_set, made, dropped)
    manifest.write(
        out,
        {
            "name": options.name,
            "origin": origin,
            "options": _recorded(options, table),
            "splits": described,
            "counts": _counts(read, made, dropped),
            "held_out_sha256": held_out.sha256(),
            "tools": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("pillow", "pyarrow", "webdataset")},
            },
        },
        [result.shard for result in made],
        files,
    )
    shutil.rmtree(out / BUILD)
    return manifest.read(out)


def _claim(out: Path) -> Path:
    """The file that says, while a build is under way, what it is made from."""
    (out / BUILD).mkdir(parents=True, exist_ok=True)
    return out / BUILD / "origin.json"


def _is_finished(out: Path, origin: str) -> bool:
    """Whether `out` already holds what is to be built.

    Raises:
        DataError: it holds something else.
    """
    found, state = None, "a finished"
    if (out / manifest.SEAL).is_file():
        found = manifest.read(out).manifest["origin"]
    elif (out / BUILD / "origin.json").is_file():
        found, state = json.loads((out / BUILD / "origin.json").read_text(encoding="utf-8"))["origin"], "an unfinished"
    elif out.is_dir() and any(path.name != BUILD for path in out.iterdir()):
        raise DataError(f"{out} is not empty and holds no dataset. Choose another --out.")
    if found not in (None, origin):
        raise DataError(
            f"{out} holds {state} dataset made from other sources or options. Choose another --out, repeat the "
            "command that made it, or replace it with --overwrite."
        )
    return found is not None and state == "a finished"


def _evaluation_sets(records: Iterable[Record]) -> dict[Evaluation, list[Record]]:
    """Each evaluation set's records, no image twice and no name for two sets."""
    by_set: dict[Evaluation, list[Record]] = defaultdict(list)
    known: dict[tuple[str, str], Record] = {}
    names: dict[str, Evaluation] = {}
    for record in records:
        if not record.evaluation:
            continue
        name = record.evaluation.name
        if names.setdefault(name, record.evaluation) != record.evaluation:
            raise DataError(f"Two evaluation sets are called {name}, the second at {record.path.parent}. Rename one.")
        twin = known.setdefault((name, record.image_id), record)
        if twin is not record:
            raise DataError(
                f"{name} has the image {record.image_id} twice: {twin.path} and {record.path}. Is a source given twice?"
            )
        by_set[record.evaluation].append(record)
    return by_set


def _looks(made: Iterable[Made]) -> dict[str, tuple[str, ...]]:
    looks: dict[str, set[str]] = defaultdict(set)
    for result in made:
        for name, thumbnail in result.looks:
            looks[name].add(thumbnail)
    return {name: tuple(sorted(thumbnails)) for name, thumbnails in sorted(looks.items())}


def _train_records(records: list[Record], held_out: HeldOut) -> tuple[list[Record], list[Mapping[str, str]]]:
    """Train records, one an image (what COCO and VQA share is merged), without those held out by id."""
    merged: dict[str, Record] = {}
    dropped: list[Mapping[str, str]] = []
    for record in records:
        if record.evaluation:
            continue
        if held_out.knows(record):
            where = {"image_id": record.image_id, "source": record.source, "split": TRAIN}
            dropped.append({**where, "reason": "held_out_id", "detail": ""})
            continue
        known = merged.get(record.image_id)
        merged[record.image_id] = _merge(known, record) if known else record
    return list(merged.values()), dropped


def _merge(first: Record, second: Record) -> Record:
    """One record of two that show the same image.

    Raises:
        DataError: two tables call different files by one name, which no dataset-wide id tells apart.
    """
    if second.source == "table" and first.path != second.path:
        raise DataError(
            f"{second.image_id} is {first.path} in one table and {second.path} in another. Give one of the tables "
            "another file name."
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


def _train_tasks(records: list[Record], out: Path, options: Options, held_out: HeldOut) -> list[Task]:
    """Deal records to shards in an order drawn from their ids, so that every shard mixes all sources."""
    mixed = sorted(records, key=lambda record: hashlib.sha256(f"{options.seed}:{record.image_id}".encode()).digest())
    tasks = []
    for number, part in enumerate(_parts(mixed, options.samples_per_shard)):
        keys = tuple(f"{number:05d}{index:04d}" for index in range(len(part)))
        tasks.append(Task(out, f"train/{number:05d}.tar", TRAIN, part, keys, options.resize, held_out))
    return tasks


def _evaluation_tasks(evaluation: Evaluation, records: list[Record], out: Path, options: Options) -> list[Task]:
    tasks = []
    for number, part in enumerate(_parts(records, options.samples_per_shard)):
        first = number * options.samples_per_shard
        keys = tuple(f"s{first + index:07d}" for index in range(len(part)))
        tar = f"eval/{evaluation.name}/test/{number}.tar"
        tasks.append(Task(out, tar, evaluation.name, part, keys, options.resize, HeldOut()))
    return tasks


def _parts(records: list[Record], size: int) -> list[tuple[Record, ...]]:
    return [tuple(records[begin : begin + size]) for begin in range(0, len(records), size)]


def _run(stage: str, tasks: list[Task], cores: executor.Processes, progress: Progress) -> list[Made]:
    total, done, results = sum(len(task.records) for task in tasks), 0, []
    for task, result in zip(tasks, cores.map(make, tasks), strict=True):
        results.append(result)
        done += len(task.records)
        progress(stage, done, total)
    return results


def _write_side_files(
    out: Path, by_set: Mapping[Evaluation, object], made: list[Made], dropped: list[Mapping[str, str]]
) -> list[str]:
    """The small files that other tools look for, and the list of what was dropped; their names are returned."""
    contents: dict[str, str] = {}
    sizes = {Path(result.shard.name).name: result.shard.samples for result in made if result.shard.split == TRAIN}
    if sizes:
        contents["train/sizes.json"] = json.dumps(sizes)
    for evaluation in by_set:
        folder = f"eval/{evaluation.name}"
        tars = sum(result.shard.split == evaluation.name for result in made)
        contents[f"{folder}/test/nshards.txt"] = f"{tars}\n"
        contents[f"{folder}/dataset_type.txt"] = f"{DATASET_TYPES[evaluation.kind]}\n"
        if evaluation.kind == "classification":
            contents[f"{folder}/classnames.txt"] = "".join(f"{name}\n" for name in evaluation.class_names)
            templates = "".join(f"{template}\n" for template in evaluation.templates)
            contents[f"{folder}/zeroshot_classification_templates.txt"] = templates
    contents["quarantine.jsonl"] = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in dropped)
    for name, text in contents.items():
        manifest.write_atomically(out / name, text.encode("utf-8", "replace"))
    return list(contents)


# What CLIP_benchmark calls the kinds; it knows the first two, and takes an absent file for classification.
DATASET_TYPES = {
    "classification": "classification",
    "retrieval": "retrieval",
    "selection": "image_caption_selection",
    "vqa": "vqa",
}


def _describe(by_set: Iterable[Evaluation], made: list[Made]) -> dict[str, Any]:
    """Totals of each split."""
    kinds = {evaluation.name: evaluation.kind for evaluation in by_set}
    described: dict[str, Any] = {}
    for result in made:
        shard = result.shard
        totals = described.setdefault(
            shard.split, {"kind": kinds.get(shard.split, TRAIN), "shards": 0, "samples": 0, "captions": 0, "bytes": 0}
        )
        totals["shards"] += 1
        totals["samples"] += shard.samples
        totals["captions"] += shard.captions
        totals["bytes"] += shard.bytes
    return described


def _counts(read: Mapping[str, int], made: list[Made], dropped: list[Mapping[str, str]]) -> dict[str, Any]:
    """What was read, kept, and dropped by reason. An image of two sources counts once, under both names."""
    kept: Counter[str] = Counter()
    for result in made:
        kept.update(result.kept)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for item in dropped:
        reasons[item["source"]][item["reason"]] += 1
    return {
        "read": dict(sorted(read.items())),
        "kept": dict(sorted(kept.items())),
        "dropped": {source: dict(sorted(counts.items())) for source, counts in sorted(reasons.items())},
    }


def _recorded(options: Options, table: sources.TableOptions) -> dict[str, Any]:
    recorded = dataclasses.asdict(options) | dataclasses.asdict(table)
    del recorded["workers"]  # the bytes do not depend on it
    return recorded

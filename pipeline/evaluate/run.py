"""Every evaluation set of a dataset, measured on one model: the files and the table that come of it."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from pipeline import checkpoint as checkpoints
from pipeline import exchange, ranks
from pipeline import trained as loading
from pipeline.evaluate import groups, memorisation, perturb
from pipeline.evaluate.embed import Embedder, KeptEmbeddings, distinct, rows
from pipeline.evaluate.measures import OpenSet, choose, open_set
from pipeline.evaluate.pixels import name_of, transformed
from pipeline.evaluate.result import Result, result_files, write_rows
from pipeline.evaluate.sets import EvaluationError
from pipeline.trained import LoadedModel, TrainedModel

CSV = "results.csv"
# Of a table that goes into a file: rich would take it for 80 columns, and break names.
LOG_WIDTH = 120
# What is measured, and how.
Scored = tuple[OpenSet, Callable[[], Result]]
# What else may be measured on a retrieval set, into a record of its own.
FURTHER = {"perturb": perturb.prepare, "memorisation": memorisation.prepare}


def evaluate(
    source: str,
    data: Path,
    *,
    names: Sequence[str] | None = None,
    class_names: str = "",
    templates: str = "",
    answers: Path | None = None,
    step: int | None = None,
    average: bool = False,
    transform: str = "exact",
    out: Path | None = None,
    cache: bool = True,
    by: Sequence[str] = (),
    further: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measure a model on evaluation sets, write OUT/SET.json and OUT/results.csv, and print a table.

    Args:
        source: a run folder, or any other model (see trained.load_any).
        data: a dataset, or one set of others' (see sources.find).
        names: the sets to measure; None for all that there is a measure for.
        class_names: instead of the one set's own (see measures.choose).
        templates: so too.
        answers: candidates for VQA sets (see measures.choose).
        step: a run's checkpoint; None for the newest.
        average: a run's moving average of the weights.
        transform: of pixels.TRANSFORMS, how images become the model's input.
        out: where results go; None for `results_folder`.
        cache: keep embeddings in OUT/embeddings, and take those that are there.
        by: fields of the samples' `json`, by whose values the same figures are given (see groups.by_field).
        further: of FURTHER, what else is measured on each retrieval set, into a record of its own.

    Returns:
        The records, on every rank.

    Raises:
        EvaluationError: a set that was asked for is not there, or cannot be measured, there is no place for results,
            or no retrieval set for what else is to be measured.

    Collective: every rank that a launcher started calls it.
    """
    with ranks.inference() as (rank, world, device):
        measured = exchange.from_main(
            lambda: choose(data, names, class_names=class_names, templates=templates, answers=answers)
        )
        if further and not any(one.kind == "retrieval" for one in measured):
            raise EvaluationError(
                f"--{' and --'.join(further)} need a retrieval set; chosen are "
                f"{', '.join(f'{one.name} ({one.kind})' for one in measured)}."
            )
        loaded: list[LoadedModel] = []
        # On all ranks or on none: a checkpoint may be removed meanwhile.
        exchange.together(lambda: loaded.append(loading.load_any(source, step, device, average=average)))
        model = replace(loaded[0], preprocess=transformed(transform, loaded[0].preprocess))
        folder = out or results_folder(model, average=average)
        embedder = embedder_of(model, folder if cache else None, rank, world)
        bar = Console(stderr=True)
        records: list[dict[str, Any]] = []
        for one in track(measured, "evaluate", console=bar, disable=rank > 0 or not bar.is_terminal):
            opened = exchange.from_main(partial(open_set, one))
            image_ND, find = embed(embedder, opened)
            scored: list[Scored] = [(opened, _scoring(opened, image_ND, find))]
            if one.kind == "retrieval":
                scored += [FURTHER[name](embedder, data, opened, image_ND, find) for name in further]
            records += exchange.from_main(partial(_measure, model, folder, by, scored))
        if rank == 0:
            write_csv(folder)
            screen().print(table(records))
            if by and (gaps := groups.table(records)).row_count:
                screen().print(gaps)
    return records


def screen() -> Console:
    """Where tables are printed."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def results_folder(model: LoadedModel, *, average: bool = False) -> Path:
    """RUN/eval/STEP of a run's checkpoint; RUN/eval/STEP-average of its average.

    Raises:
        EvaluationError: the model is no run's.
    """
    if not isinstance(model, TrainedModel):
        raise EvaluationError(f"{model.name} is no run, so where its results go must be said: --out FOLDER.")
    return model.run / "eval" / (checkpoints.folder_name(model.step) + "-average" * average)


def embedder_of(model: LoadedModel, folder: Path | None, rank: int = 0, world: int = 1) -> Embedder:
    """Of a model over all ranks, with embeddings kept in `folder`/embeddings."""
    cache = KeptEmbeddings(folder / "embeddings", model.identity) if folder else None
    return Embedder(model, model.batch_size, model.workers, rank, world, cache)


def embed(embedder: Embedder, opened: OpenSet) -> tuple[Any, Any]:
    """(N, D) of a set's images, and texts → (M, D) of its texts; where the set streams, of any distinct texts.

    Collective: every rank calls it, and so, where the set streams, what embeds texts.
    """
    if opened.streams:
        # What is not to be held is not to be kept either.
        return embedder.images(opened.items), replace(embedder, cache=None).texts
    unique = distinct(opened.texts)
    return embedder.images(opened.items), rows(unique, embedder.texts(unique))


def _scoring(opened: OpenSet, image_ND: Any, find: Any) -> Callable[[], Result]:
    """What scores a set, for the main rank; of one that streams, after all ranks have scored it.

    Collective: every rank calls it.
    """
    if not opened.streams:
        return partial(opened.figures, image_ND, find)
    result = opened.figures(image_ND, find)
    return lambda: result


def _measure(model: LoadedModel, folder: Path, by: Sequence[str], scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Score sets, and keep their records and rows."""
    found = []
    for field in by:
        groups.say_if_absent(scored[0][0].source.name, scored[0][0].items, field)
    for opened, figures in scored:
        name, result = opened.source.name, figures()
        one = record(model, name, opened.identity, result)
        if by:
            one["groups"] = {field: groups.by_field(result, opened.items, field) for field in by}
        found.append(write(folder, name, one, result))
    return found


def write(folder: Path, name: str, found: dict[str, Any], result: Result) -> dict[str, Any]:
    """Keep a record, `found`, and the rows of its result, as NAME.json and NAME.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{name}.parquet", result.sampled)
    checkpoints.write_atomically(folder / f"{name}.json", json.dumps(found, indent=1))
    return found


def record(model: LoadedModel, dataset: str, data: str, result: Result) -> dict[str, Any]:
    """CLIP_benchmark's record of a result, with intervals, chance, and `data`, the hash of what was measured on."""
    return {
        "dataset": dataset,
        "model": model.name,
        "pretrained": model.source,
        "transform": name_of(model.preprocess),
        "task": result.task,
        "metrics": result.metrics,
        "intervals": result.intervals,
        "chance": dict(result.chance),
        "images": result.images,
        "data": data,
        "weights": model.identity,
        "language": "en",
        **result.describe(),
    }


def write_csv(folder: Path) -> None:
    """Write results.csv: the figures of all records in a folder, whichever command made them."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in result_files(folder)]
    checkpoints.write_atomically(folder / CSV, as_csv(records))


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """One row a figure; those of a group of images have FIELD=VALUE in the last column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ("model", "pretrained", "task", "dataset")
    writer.writerow([*columns, "metric", "value", "low", "high", "chance", "images", "group"])
    for one in records:
        parts = {"": one}
        for field, found in one.get("groups", {}).items():
            parts |= {f"{field}={value}": group for value, group in found["values"].items()}
        for group, part in parts.items():
            for name, value in part["metrics"].items():
                low, high = part["intervals"].get(name, ("", ""))
                chance = one["chance"].get(name, "")
                writer.writerow([*(one[key] for key in columns), name, value, low, high, chance, part["images"], group])
    return out.getvalue()


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row a metric: value, interval, chance."""
    found = Table(Column("set", overflow="fold"), Column("metric", overflow="fold"), box=None)
    for name in ("value", "95 % interval", "chance"):
        found.add_column(name, no_wrap=True)
    for one in records:
        for number, (name, value) in enumerate(one["metrics"].items()):
            interval = one["intervals"].get(name)
            spread = f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else ""
            chance = one["chance"].get(name)
            label = one["dataset"] if number == 0 else ""
            found.add_row(label, name, f"{value:.3f}", spread, "" if chance is None else f"{chance:.3f}")
    return found

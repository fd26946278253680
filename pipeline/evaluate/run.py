"""Every evaluation set of a dataset, measured on one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep.manifest import EvaluationSet
from pipeline import checkpoint as checkpoints
from pipeline import trained as loading
from pipeline.evaluate import sets
from pipeline.evaluate.embed import embed_images, embed_texts
from pipeline.evaluate.measures import choose, open_set
from pipeline.evaluate.result import Result
from pipeline.trained import TrainedModel


def evaluate(
    run: Path, data: Path, *, names: Sequence[str] | None = None, step: int | None = None
) -> list[dict[str, Any]]:
    """Measure a run's checkpoint on a dataset's evaluation sets; writes RUN/eval/STEP/SET.json and prints a table.

    Args:
        run: the run folder.
        data: the dataset.
        names: the sets to measure; None for all that there is a measure for.
        step: the checkpoint's; None for the newest.

    Raises:
        EvaluationError: a set that was asked for is not there, or cannot be measured.
    """
    measured = choose(data, names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = loading.load(run, step, device)
    folder = run / "eval" / checkpoints.folder_name(trained.step)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for source in track(
        measured, "evaluate", console=Console(stderr=True), disable=not Console(stderr=True).is_terminal
    ):
        result = measure(trained, source)
        record: dict[str, Any] = {
            "dataset": source.name,
            "model": trained.recipe.model.name or run.resolve().name,
            "pretrained": str(run / "checkpoints" / checkpoints.folder_name(trained.step)),
            "task": result.task,
            "metrics": result.metrics,
            "intervals": result.intervals,
            "chance": result.chance,
            "images": source.samples,
            "language": "en",
        }
        if result.classes:
            record["classes"] = [
                {"name": name, "images": found.images, "accuracy": found.accuracy}
                for name, found in zip(sets.class_names(source), result.classes, strict=True)
            ]
        checkpoints.write_atomically(folder / f"{source.name}.json", json.dumps(record, indent=1))
        results.append(record)
    Console().print(table(results))
    return results


def measure(trained: TrainedModel, source: EvaluationSet) -> Result:
    """One set, measured as its kind asks."""
    opened = open_set(source)
    settings = trained.recipe.evaluate
    image_ND = embed_images(trained, opened.items, batch_size=settings.batch_size, workers=settings.workers)
    return opened.figures(image_ND, partial(embed_texts, trained, batch_size=settings.batch_size))


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row a metric: value, interval, chance."""
    rows = Table("set", "metric", "value", "95 % interval", "chance", box=None)
    for record in results:
        for number, (name, value) in enumerate(record["metrics"].items()):
            interval = record["intervals"].get(name)
            spread = f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else ""
            chance = record["chance"].get(name)
            label = record["dataset"] if number == 0 else ""
            rows.add_row(label, name, f"{value:.3f}", spread, "" if chance is None else f"{chance:.3f}")
    return rows

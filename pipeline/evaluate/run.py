"""Every evaluation set of a dataset, measured on one checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep import manifest
from data_prep.manifest import EvaluationSet
from pipeline import checkpoint as checkpoints
from pipeline import trained as loading
from pipeline.evaluate import classification, retrieval, selection, sets
from pipeline.evaluate.embed import embed_images, embed_texts
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.trained import TrainedModel

log = logging.getLogger(__name__)

EmbedTexts = Callable[[Sequence[str]], torch.Tensor]


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
    dataset = manifest.read(data)
    available = {source.name: source for source in dataset.evaluation_sets}
    if unknown := sorted(set(names or ()) - set(available)):
        raise EvaluationError(f"{data}: has no evaluation set {unknown[0]}. It has {', '.join(available) or 'none'}.")
    chosen = [available[name] for name in names] if names else list(available.values())
    for source in chosen:
        if source.kind not in MEASURES:
            log.info("%s: there is no measure for %s sets yet; left out.", source.name, source.kind)
    measured = [source for source in chosen if source.kind in MEASURES]
    if not measured:
        raise EvaluationError(
            f"{data}: has no evaluation set that can be measured, of {len(chosen)}. Known kinds: {', '.join(MEASURES)}."
        )
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
    items = sets.read(source)
    settings = trained.recipe.evaluate
    image_ND = embed_images(trained, items, batch_size=settings.batch_size, workers=settings.workers)

    def embed(texts: Sequence[str]) -> torch.Tensor:
        return embed_texts(trained, texts, batch_size=settings.batch_size)

    return MEASURES[source.kind](source, items, image_ND, embed)


def _classification(source: EvaluationSet, items: list[Item], image_ND: torch.Tensor, embed: EmbedTexts) -> Result:
    names = sets.class_names(source)
    labels = [item.label for item in items]
    if not 0 <= min(labels) <= max(labels) < len(names):
        raise EvaluationError(
            f"{source.path}: labels run from {min(labels)} to {max(labels)}, but classnames.txt has {len(names)} "
            f"names, for 0 to {len(names) - 1}. Build the dataset again."
        )
    class_KD = classification.class_embeddings(names, sets.templates(source), embed)
    return classification.measure(image_ND, class_KD, labels)


def _retrieval(source: EvaluationSet, items: list[Item], image_ND: torch.Tensor, embed: EmbedTexts) -> Result:
    owners = [index for index, item in enumerate(items) for _ in item.captions]
    _require_captions(source, items)
    return retrieval.measure(image_ND, embed([text for item in items for text in item.captions]), owners)


def _selection(source: EvaluationSet, items: list[Item], image_ND: torch.Tensor, embed: EmbedTexts) -> Result:
    _require_captions(source, items)
    texts = embed([text for item in items for text in item.captions])
    return selection.measure(image_ND, texts, [len(item.captions) for item in items])


def _require_captions(source: EvaluationSet, items: list[Item]) -> None:
    if without := [item.key for item in items if not item.captions]:
        raise EvaluationError(f"{source.path}: {len(without)} images have no caption, {without[0]} among them.")


MEASURES: dict[str, Callable[[EvaluationSet, list[Item], torch.Tensor, EmbedTexts], Result]] = {
    "classification": _classification,
    "retrieval": _retrieval,
    "selection": _selection,
}


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

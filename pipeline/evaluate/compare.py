"""Two models on the same sets: which differences are real, by a paired bootstrap (Efron and Tibshirani 1993)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from pipeline.evaluate.result import newest_results, read_rows, result_files
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.statistics import Interval, percentiles, resampled


class Difference(NamedTuple):
    """One figure of two models.

    Attributes:
        dataset: the set.
        metric: the figure.
        values: of the first model, and of the second.
        difference: second - first.
        interval: its 95 % interval: both models are measured on the same resamples of the images.
    """

    dataset: str
    metric: str
    values: tuple[float, float]
    difference: float
    interval: Interval

    @property
    def real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval[0] > 0 or self.interval[1] < 0


def compare(first: Path, second: Path) -> list[Difference]:
    """Every figure that both have been measured for, on the same images and texts.

    Args:
        first: a run, whose newest results are taken, or a folder with results, such as RUN/eval/STEP.
        second: another.

    Raises:
        EvaluationError: a folder without results, sets that differ, or none in common.
    """
    folders = [_results(path) for path in (first, second)]
    records = [
        {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in result_files(one)} for one in folders
    ]
    common = [name for name in records[0] if name in records[1]]
    if not common:
        raise EvaluationError(
            f"{folders[0]} and {folders[1]} have no set in common: {', '.join(records[0])}; {', '.join(records[1])}. "
            "Evaluate both on the same dataset."
        )
    found = []
    for name in common:
        ours, theirs = records[0][name], records[1][name]
        if ours["data"] != theirs["data"]:
            raise EvaluationError(
                f"{name} is not the same set in {folders[0]} and {folders[1]}: other images or texts. Evaluate both on "
                "the same dataset."
            )
        sampled = [read_rows(folder / f"{name}.parquet") for folder in folders]
        drawn = [resampled(one, ours["images"]) for one in sampled]
        for metric in (metric for metric in sampled[0] if metric in sampled[1]):
            values = (float(ours["metrics"][metric]), float(theirs["metrics"][metric]))
            interval = percentiles(drawn[1][metric] - drawn[0][metric])
            found.append(Difference(name, metric, values, values[1] - values[0], interval))
    return found


def _results(path: Path) -> Path:
    """The folder itself where it has results; else a run's newest."""
    found = path if result_files(path) else newest_results(path)
    if found is None:
        raise EvaluationError(f"{path}: no results are here. `python -m pipeline evaluate {path} --data …` makes them.")
    return found


def table(differences: list[Difference], names: tuple[str, str]) -> Table:
    """One row a figure; `real` where the interval of the difference leaves 0 out."""
    found = Table(box=None)
    for name in ("set", "metric", *names, "difference", "95 % interval", ""):
        found.add_column(name, overflow="fold", no_wrap=name not in ("set", *names))
    former = None
    for one in differences:
        low, high = one.interval
        label, former = ("" if one.dataset == former else one.dataset), one.dataset
        spread = f"{low:+.3f} – {high:+.3f}"
        values = [f"{value:.3f}" for value in one.values]
        found.add_row(label, one.metric, *values, f"{one.difference:+.3f}", spread, "real" if one.real else "")
    return found

"""What an evaluator finds on one set: figures with intervals and chance levels, and the rows that they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluate.statistics import Interval, Sampled, intervals


@dataclass(frozen=True)
class Result:
    """The figures of one set, by CLIP_benchmark's names where it has them.

    Attributes:
        task: as CLIP_benchmark calls it.
        images: how many the set has.
        sampled: each figure as rows of images.
        chance: what a model whose embeddings are all equal scores.
        describe: gives what else a record says, such as each class's figures, as plain JSON.
    """

    task: str
    images: int
    sampled: Mapping[str, Sampled]
    chance: Mapping[str, float] = field(default_factory=dict)
    describe: Callable[[], dict[str, Any]] = dict

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """Shares from 0 to 1, but for ranks, which count from 1, and distances (see gap.py)."""
        return {name: sampled.figure() for name, sampled in self.sampled.items()}

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % bootstrap interval of each figure; found when asked for, since it takes longer than the figures."""
        return intervals(self.sampled, self.images)


def result_files(folder: Path) -> list[Path]:
    """The records in a folder: every NAME.json with its rows beside it."""
    return sorted(path for path in folder.glob("*.json") if path.with_suffix(".parquet").is_file())


def newest_results(run: Path) -> Path | None:
    """RUN/eval/STEP of the latest step that has results, as the weights and the transform are by themselves."""
    steps = [folder for folder in (run / "eval").glob("step-*") if folder.name.removeprefix("step-").isdigit()]
    return next((folder for folder in sorted(steps, reverse=True) if result_files(folder)), None)


def write_rows(path: Path, sampled: Mapping[str, Sampled]) -> None:
    """Keep the rows of a set's figures, so that models can be compared image by image."""
    parts = [
        pa.table(
            {
                "metric": pa.array([name] * len(one.values)).dictionary_encode(),
                "statistic": pa.array([one.statistic] * len(one.values)).dictionary_encode(),
                "image": one.images,
                "value": one.values,
                "weight": one.weights,
                "group": one.groups,
            }
        )
        for name, one in sampled.items()
    ]
    partial = path.with_name(f".{path.name}")
    pq.write_table(pa.concat_tables(parts), partial)
    partial.replace(path)


def read_rows(path: Path) -> dict[str, Sampled]:
    """What `write_rows` kept."""
    table = pq.read_table(path)
    found = {}
    for name in table.column("metric").unique().to_pylist():
        rows = table.filter(pa.compute.equal(table.column("metric"), name))
        columns = {key: rows.column(key).to_numpy() for key in ("image", "value", "weight", "group")}
        found[name] = Sampled(
            columns["value"],
            columns["image"],
            columns["weight"],
            columns["group"],
            rows.column("statistic")[0].as_py(),
        )
    return found

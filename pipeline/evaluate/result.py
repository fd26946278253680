"""What an evaluator finds on one set: metrics with intervals and chance levels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ClassAccuracy:
    """The images of one class; accuracy is None where there are none."""

    images: int
    accuracy: float | None


@dataclass(frozen=True)
class Result:
    """The figures of one set, by CLIP_benchmark's names.

    Attributes:
        task: as CLIP_benchmark calls it.
        metrics: fractions, 0 to 1.
        resampled: how the interval of each metric is found.
        chance: what a model whose embeddings are all equal scores.
        classes: top-1 accuracy by label, in classification.
    """

    task: str
    metrics: dict[str, float]
    resampled: Mapping[str, Callable[[], tuple[float, float]]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    classes: tuple[ClassAccuracy, ...] = ()

    @functools.cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each metric; found when asked for, since it takes longer than the metrics."""
        return {name: resample() for name, resample in self.resampled.items()}

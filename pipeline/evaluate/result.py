"""What an evaluator finds on one set: metrics with intervals and chance levels."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """The figures of one set, by CLIP_benchmark's names.

    Attributes:
        task: as CLIP_benchmark calls it.
        metrics: fractions, 0 to 1.
        intervals: 95 % bootstrap interval of a metric.
        chance: what a model that knows nothing scores on average.
    """

    task: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)

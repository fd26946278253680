"""Error bars: bootstrap over images (Efron and Tibshirani 1993, ch. 13), 95 % percentile intervals, paired differences.

Shapes: N images, M rows, G groups, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Sampled:
    """A figure as a statistic of rows; each belongs to an image, and images are what a resample draws.

    Several captions of one image are rows of that image: they are not independent.

    Attributes:
        values: (M,) such as whether a caption found its image.
        images: (M,) which image a row is of, from 0 to N - 1; by default row i is of image i.
        weights: (M,) 1 each by default.
        groups: (M,) from 0 to G - 1, such as the image's class; all 0 by default.
        statistic: `mean`: Σ values / Σ weights of each group, and of those the mean over the groups that a resample
            holds. `median`: of the values.
    """

    values: Floats
    images: Ints
    weights: Floats
    groups: Ints
    statistic: Literal["mean", "median"] = "mean"
    _order: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", np.argsort(self.values, kind="stable"))

    @staticmethod
    def of(
        values: ArrayLike,
        *,
        images: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        statistic: Literal["mean", "median"] = "mean",
    ) -> Sampled:
        """Rows from anything that numpy takes."""
        value_M = np.asarray(values, dtype=np.float64)
        rows = len(value_M)
        return Sampled(
            value_M,
            np.arange(rows) if images is None else np.asarray(images, dtype=np.int64),
            np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64),
            np.zeros(rows, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64),
            statistic,
        )

    def figure(self) -> float:
        """The figure of the images as they are; NaN where there is no row."""
        count = int(self.images.max()) + 1 if len(self.images) else 0
        return self.estimator(count)(np.ones(count))

    def where(self, chosen_N: NDArray[np.bool_]) -> Sampled:
        """The rows of some of the images."""
        kept = chosen_N[self.images]
        return Sampled(self.values[kept], self.images[kept], self.weights[kept], self.groups[kept], self.statistic)

    def estimator(self, images: int) -> Callable[[Floats], float]:
        """How often each of N images was drawn (N,) → the figure; NaN where no row was."""
        if self.statistic == "median":
            return self._median
        totals = self.group_totals(images)

        def mean_of_means(count_N: Floats) -> float:
            value_G, weight_G = totals(count_N)
            present_G = weight_G > 0
            return float((value_G[present_G] / weight_G[present_G]).mean()) if present_G.any() else np.nan

        return mean_of_means

    def group_totals(self, images: int) -> Callable[[Floats], tuple[Floats, Floats]]:
        """How often each image was drawn (N,) → (G,) Σ values and (G,) Σ weights of each group."""
        count = int(self.groups.max()) + 1 if len(self.groups) else 1
        if count == 1:
            value_N = np.bincount(self.images, self.values, images)
            weight_N = np.bincount(self.images, self.weights, images)
            return lambda count_N: (np.array([count_N @ value_N]), np.array([count_N @ weight_N]))

        def totals(count_N: Floats) -> tuple[Floats, Floats]:
            drawn_M = count_N[self.images]
            return (
                np.bincount(self.groups, drawn_M * self.values, count).astype(np.float64),
                np.bincount(self.groups, drawn_M * self.weights, count).astype(np.float64),
            )

        return totals

    def _median(self, count_N: Floats) -> float:
        until_M = np.cumsum(count_N[self.images[self._order]])
        if not len(until_M) or not until_M[-1]:
            return float("nan")
        middle = np.searchsorted(until_M, [(until_M[-1] + 1) // 2, until_M[-1] // 2 + 1])
        return float(self.values[self._order[middle]].mean())


def tie_ranges(figures: Mapping[str, Sampled]) -> dict[str, Interval]:
    """Figure → (low, high): what it would be were every tie lost, and won; of figures that ties decide in part.

    A program that breaks ties by the order of the answers, as CLIP_benchmark does, gives some value between them.

    Args:
        figures: means of hits: 1, 0, or the share that ties leave (see ties.py).
    """
    found = {}
    for name, figure in figures.items():
        low, high = (replace(figure, values=bound(figure.values)).figure() for bound in (np.floor, np.ceil))
        if low < high:
            found[name] = (low, high)
    return found


def resampled(figures: Mapping[str, Sampled], images: int, *, seed: int = 0) -> dict[str, Floats]:
    """Each figure (R,) of the same R resamples of N images; of another model's, with the same seed, so too."""
    estimators = {name: figure.estimator(images) for name, figure in figures.items()}
    found = {name: np.empty(RESAMPLES) for name in figures}
    for number, count_N in enumerate(_draws(images, seed)):
        for name, estimate in estimators.items():
            found[name][number] = estimate(count_N)
    return found


def intervals(figures: Mapping[str, Sampled], images: int, *, seed: int = 0) -> dict[str, Interval]:
    """Figure → (low, high) of its 95 % percentile interval."""
    return {name: percentiles(found_R) for name, found_R in resampled(figures, images, seed=seed).items()}


def group_intervals(figure: Sampled, images: int, *, seed: int = 0) -> list[Interval]:
    """(low, high) of each group's Σ values / Σ weights; NaN where a group is in no resample."""
    totals = figure.group_totals(images)
    with np.errstate(invalid="ignore", divide="ignore"):
        found_RG = np.stack([np.divide(*totals(count_N)) for count_N in _draws(images, seed)])
    return [percentiles(found_R) for found_R in found_RG.T]


def percentiles(found_R: Floats) -> Interval:
    """The middle 95 % of what resamples gave; those that hold no row (NaN) are left out."""
    known_R = found_R[~np.isnan(found_R)]
    low, high = np.percentile(known_R, [2.5, 97.5]) if len(known_R) else (np.nan, np.nan)
    return float(low), float(high)


def _draws(images: int, seed: int) -> Iterator[Floats]:
    random = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(random.integers(images, size=images), minlength=images).astype(np.float64)

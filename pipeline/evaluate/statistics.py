"""Error bars: 95 % percentile bootstrap intervals over images (Efron and Tibshirani 1993, ch. 13)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000


def interval(values: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0) -> tuple[float, float]:
    """(low, high) of Σ values / Σ weights.

    Args:
        values: one an image, such as the number of its captions that were found.
        weights: one an image, such as the number of its captions; 1 each by default. Captions of one image are not
            independent, so images are what is drawn.
        seed: of the resampling.
    """
    value_N = np.asarray(values, dtype=np.float64)
    weight_N = np.ones_like(value_N) if weights is None else np.asarray(weights, dtype=np.float64)
    return _percentiles(lambda drawn: value_N[drawn].sum() / weight_N[drawn].sum(), len(value_N), seed)


def interval_over_groups(values: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the mean of the groups' means, over the groups that a resample holds.

    Args:
        values: one an image.
        groups: an image's group, an integer from 0.
        seed: of the resampling.
    """
    value_N, group_N = np.asarray(values, dtype=np.float64), np.asarray(groups, dtype=np.int64)

    def mean_of_means(drawn: NDArray[np.int64]) -> float:
        count_G = np.bincount(group_N[drawn])
        sum_G = np.bincount(group_N[drawn], weights=value_N[drawn])
        return float((sum_G[count_G > 0] / count_G[count_G > 0]).mean())

    return _percentiles(mean_of_means, len(value_N), seed)


def _percentiles(statistic: Callable[[NDArray[np.int64]], float], images: int, seed: int) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    found = [statistic(random.integers(images, size=images)) for _ in range(RESAMPLES)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)

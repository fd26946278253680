"""Error bars: 95 % percentile bootstrap intervals over images (Efron and Tibshirani 1993, ch. 13).

Shapes: N images, R resamples, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
DRAWN_AT_ONCE = 1 << 20  # images, over all resamples in memory


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
    return _percentiles(lambda drawn_RN: value_N[drawn_RN].sum(1) / weight_N[drawn_RN].sum(1), len(value_N), seed)


def interval_over_groups(values: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the mean of the groups' means, over the groups that a resample holds.

    Args:
        values: one an image.
        groups: an image's group, an integer from 0.
        seed: of the resampling.
    """
    value_N, group_N = np.asarray(values, dtype=np.float64), np.asarray(groups, dtype=np.int64)
    count = int(group_N.max()) + 1

    def mean_of_means(drawn_RN: NDArray[np.int64]) -> NDArray[np.float64]:
        resamples = len(drawn_RN)
        cell_RN = group_N[drawn_RN] + count * np.arange(resamples)[:, None]
        cells = resamples * count
        count_RG = np.bincount(cell_RN.ravel(), minlength=cells).reshape(resamples, count)
        sum_RG = np.bincount(cell_RN.ravel(), value_N[drawn_RN].ravel(), cells).reshape(resamples, count)
        return np.asarray((sum_RG / np.maximum(count_RG, 1)).sum(1) / (count_RG > 0).sum(1))

    return _percentiles(mean_of_means, len(value_N), seed)


def _percentiles(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], images: int, seed: int
) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // images)
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    found_R = np.concatenate([statistic(random.integers(images, size=(size, images))) for size in sizes])
    low, high = np.percentile(found_R, [2.5, 97.5])
    return float(low), float(high)

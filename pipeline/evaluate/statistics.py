"""Error bars: bootstrap intervals of a mean over images."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


def interval(values: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of Σ values / Σ weights (Efron and Tibshirani 1993, ch. 13).

    Args:
        values: one an image, such as the number of its captions that were found.
        weights: one an image, such as the number of its captions; 1 each by default. Captions of one image are not
            independent, so images are what is drawn.
        seed: of the resampling.

    Returns:
        (low, high).
    """
    value_N = np.asarray(values, dtype=np.float64)
    weight_N = np.ones_like(value_N) if weights is None else np.asarray(weights, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(value_N), size=len(value_N))
        means.append(value_N[drawn].sum() / weight_N[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

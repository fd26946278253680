"""A linear probe: logistic regression on frozen features (Radford et al. 2021, section 3.2 and appendix A.3).

Shapes: M train images, N test images, B of them at a time, K classes, D = features.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluate.sets import EvaluationError

ITERATIONS = 1000
# 10 ** -6 to 10 ** 6, eight steps a decade: 96 steps.
STRENGTHS = 10 ** np.linspace(-6, 6, 97)
# Between the first strengths that are tried: two decades.
STRIDE = 16
HELD_OUT = 5
BLOCK = 1024


class Probe(NamedTuple):
    """A fitted probe.

    Attributes:
        weight_KD, bias_K: of each class; -inf is the bias of one that has no train image.
        strength: C, the inverse of the weight of the L2 penalty.
        converged: whether L-BFGS was done within ITERATIONS.
    """

    weight_KD: Tensor
    bias_K: Tensor
    strength: float
    converged: bool

    def scores(self, image_ND: Tensor) -> Iterator[Tensor]:
        """(B, K) float64 logits of a few images at a time."""
        for image_BD in image_ND.split(BLOCK):
            yield image_BD.cpu().double() @ self.weight_KD.T + self.bias_K


def check_installed() -> None:
    """See that scikit-learn is there.

    Raises:
        EvaluationError: it is not.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise EvaluationError(
            "scikit-learn fits linear probes and is not installed. `pip install '.[probe]'` brings it."
        )


def fit(train_MD: Tensor, label_M: Tensor, classes: int, *, seed: int = 0) -> Probe:
    """Fit a probe on all train features, with the strength that is best on a fifth which others were fitted without.

    Args:
        train_MD: of images.
        label_M: from 0 to K - 1.
        classes: K.
        seed: of the lot that holds out the fifth.

    Raises:
        EvaluationError: there are fewer than two classes, or too few images to hold some out.
    """
    feature_MD, label = train_MD.cpu().double().numpy(), label_M.cpu().numpy()
    held_M = held_out(label, seed)
    if not held_M.any() or len(np.unique(label[~held_M])) < 2:
        raise EvaluationError(
            f"a linear probe needs images of two classes and a fifth of them to tune on, and there are {len(label)} "
            f"train images of {len(np.unique(label))} classes. Take a larger train set."
        )

    def value(number: int) -> tuple[float, float]:
        probe = _regression(feature_MD[~held_M], label[~held_M], classes, float(STRENGTHS[number]))
        return _accuracy_and_likelihood(probe, train_MD[torch.from_numpy(held_M)], torch.from_numpy(label[held_M]))

    return _regression(feature_MD, label, classes, float(STRENGTHS[peak(value, len(STRENGTHS), STRIDE)]))


def _accuracy_and_likelihood(probe: Probe, image_ND: Tensor, label_N: Tensor) -> tuple[float, float]:
    """The share of right answers, and Σ log p of the right classes, which tells those apart that are equal in it."""
    right, likelihood = 0, 0.0
    for logit_BK, label_B in zip(probe.scores(image_ND), label_N.split(BLOCK), strict=True):
        right += int((logit_BK.argmax(dim=1) == label_B).sum())
        own_B = logit_BK.log_softmax(dim=1).gather(1, label_B[:, None])
        likelihood += float(own_B[probe.bias_K[label_B].isfinite()].sum())
    return right / len(label_N), likelihood


def held_out(label_M: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """(M,) every fifth image by label, and within a label by lot."""
    order = np.lexsort((np.random.default_rng(seed).random(len(label_M)), label_M))
    held_M = np.zeros(len(label_M), dtype=bool)
    held_M[order[HELD_OUT - 1 :: HELD_OUT]] = True
    return held_M


def peak(value: Callable[[int], Any], count: int, stride: int) -> int:
    """The number from 0 to count - 1 with the highest value, by halving the stride around the best one so far.

    It finds the best of those whose neighbours it tries; of values with one peak, that peak. Of equals the lowest.
    """
    known = {number: value(number) for number in range(0, count, stride)}
    while True:
        best = max(sorted(known), key=known.__getitem__)
        stride //= 2
        if not stride:
            return best
        near = [number for number in (best - stride, best + stride) if 0 <= number < count]
        known |= {number: value(number) for number in near if number not in known}


def _regression(feature_MD: NDArray[np.float64], label_M: NDArray[np.int64], classes: int, strength: float) -> Probe:
    """What scikit-learn's LogisticRegression fits, with all K classes."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the probe says so
        model = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(feature_MD, label_M)
    weight_KD, bias_K = np.zeros((classes, feature_MD.shape[1])), np.full(classes, -np.inf)
    # Of two classes, scikit-learn gives the second one's only.
    shares = [1] if len(model.classes_) > 2 else [-0.5, 0.5]
    weight_KD[model.classes_] = np.concatenate([share * model.coef_ for share in shares])
    bias_K[model.classes_] = np.concatenate([share * model.intercept_ for share in shares])
    converged = bool(model.n_iter_.max() < ITERATIONS)
    return Probe(torch.from_numpy(weight_KD), torch.from_numpy(bias_K), strength, converged)

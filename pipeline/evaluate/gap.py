"""How the embeddings of a set lie: the gap between the modalities, the alignment of pairs, the uniformity of each.

Shapes: N images, M captions, B of either at a time, D = embedding width. A caption's owner is the index of its image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluate.statistics import Floats, Ints, Sampled
from pipeline.evaluate.ties import pair_scores

BLOCK = 1024
# Of Wang and Isola's Gaussian kernel, exp(-t · squared distance).
T = 2.0
# Figures of how all embeddings lie together; their rows say little of a part of the images.
OF_ALL = ("modality_gap", "image_uniformity", "text_uniformity")


def measure(image_ND: Tensor, text_MD: Tensor, owners: Sequence[int]) -> dict[str, Sampled]:
    """modality_gap, alignment, and image_uniformity and text_uniformity where there are two images.

    - modality_gap: the distance between the mean image and the mean text (Liang et al. 2022, section 2), 0 to 2.
    - alignment: the mean squared distance of a caption from its image (Wang and Isola 2020, α = 2), 0 to 4.
    - uniformity: log of the mean of exp(-2 · squared distance) over pairs of images, or of images' first captions
      (ibid., t = 2), -8 to 0; the lower, the more evenly they are spread.

    Gap and uniformity are no means over images. Their rows hold each image's part in the first-order expansion about
    the value, whose mean is the value itself: intervals are those of that expansion (the delta method: Efron and
    Tibshirani 1993, section 21), and do not move with the bias that a bootstrap of a distance has.

    Args:
        image_ND: unit-norm.
        text_MD: unit-norm.
        owners: (M,) index of each caption's image, ascending; every image has at least one.
    """
    owner_M = np.asarray(owners)
    apart_M = 2 - 2 * pair_scores(image_ND, torch.as_tensor(owner_M), text_MD)
    found = {"modality_gap": _gap(image_ND, text_MD, owner_M), "alignment": Sampled.of(apart_M, images=owner_M)}
    if len(image_ND) > 1:
        _, first_N = np.unique(owner_M, return_index=True)
        found["image_uniformity"] = _uniformity(image_ND)
        found["text_uniformity"] = _uniformity(text_MD[torch.as_tensor(first_N, device=text_MD.device)])
    return found


def _gap(image_ND: Tensor, text_MD: Tensor, owner_M: Ints) -> Sampled:
    """The means' difference along the direction in which they differ, as twice the mean of two groups."""
    gap_D = image_ND.mean(dim=0, dtype=torch.float64) - text_MD.mean(dim=0, dtype=torch.float64)
    length = gap_D.norm()
    direction_D = (gap_D / length if length > 0 else gap_D).to(image_ND.dtype)
    along_N, along_M = (_array(rows @ direction_D) for rows in (image_ND, text_MD))
    return Sampled.of(
        np.concatenate([2 * along_N, -2 * along_M]),
        images=np.concatenate([np.arange(len(along_N)), owner_M]),
        groups=np.repeat([0, 1], [len(along_N), len(along_M)]),
    )


def _uniformity(row_ND: Tensor) -> Sampled:
    """log of the mean kernel over pairs: each row's mean with the others, and what it adds to the logarithm."""
    sums = []
    for row_BD in row_ND.split(BLOCK):
        kernel_BN = (2 * T * (row_BD @ row_ND.T - 1)).exp_()
        sums.append(kernel_BN.sum(dim=1, dtype=torch.float64))
    # Less its kernel with itself, as rounded as it was summed.
    own_N = (2 * T * ((row_ND * row_ND).sum(dim=1) - 1)).exp().double()
    mean_N = _array((torch.cat(sums) - own_N) / (len(row_ND) - 1))
    mean = mean_N.mean()
    return Sampled.of(math.log(mean) + 2 * (mean_N - mean) / mean)


def _array(tensor: Tensor) -> Floats:
    return tensor.cpu().numpy().astype(np.float64)

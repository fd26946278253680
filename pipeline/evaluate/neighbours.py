"""Weighted k nearest neighbours on frozen features (Wu et al. 2018, section 3.4): train images vote for their class.

Shapes: N images, B of them at a time, M train images, K classes, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.evaluate.ties import scores

NEIGHBOURS = 20
TEMPERATURE = 0.07
# Similarities at a time, unless an image has more of them.
ELEMENTS = 1 << 24


def votes(image_ND: Tensor, train_MD: Tensor, label_M: Tensor, classes: int, k: int = NEIGHBOURS) -> Iterator[Tensor]:
    """(B, K) votes for the classes of a few images at a time, in O((N + M) · D) memory.

    Each of the k nearest train images has exp(similarity / TEMPERATURE) votes. Those that are equally far, and more
    than the places that are left, share these: the order of the train set decides nothing.

    Args:
        image_ND: unit-norm.
        train_MD: unit-norm.
        label_M: from 0 to K - 1.
        classes: K.
        k: neighbours; all where there are fewer.
    """
    key_MD, label_M = train_MD.double(), label_M.to(train_MD.device)
    for image_BD in image_ND.split(max(1, ELEMENTS // len(key_MD))):
        score_BM = scores(image_BD, key_MD)
        border_B1 = score_BM.topk(min(k, len(key_MD))).values[:, -1:]
        above_B, tied_B = (score_BM > border_B1).sum(dim=1), (score_BM == border_B1).sum(dim=1)
        share_B = (min(k, len(key_MD)) - above_B) / tied_B.double()
        row, near = (score_BM >= border_B1).nonzero(as_tuple=True)
        score = score_BM[row, near]
        # Less 1, the highest there is, so that sums keep their digits.
        vote = ((score.double() - 1) / TEMPERATURE).exp()
        vote = torch.where(score > border_B1[row, 0], vote, vote * share_B[row])
        vote_BK = torch.zeros(len(image_BD), classes, dtype=torch.float64, device=image_BD.device)
        # In float32, what the order of addition leaves is gone.
        yield vote_BK.index_put_((row, label_M[near]), vote, accumulate=True).float()

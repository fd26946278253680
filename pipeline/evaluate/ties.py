"""What ties earn: places are shared evenly among all that score the same, so nothing is won by the order of a tensor.

A model whose embeddings are all equal then scores chance, neither 1 (its answer happens to come first) nor 0.
Shapes: Q queries, K keys, M pairs, B of them at a time, D = embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024


def scores(query_QD: Tensor, key_KD: Tensor) -> Tensor:
    """(Q, K) float32 cosine similarities of unit-norm rows; equal rows get equal scores.

    A matrix product may add the same numbers in another order at the edge of a tile, so the products are taken in
    float64 and rounded: that removes what the order of addition leaves.
    """
    return (query_QD.double() @ key_KD.double().T).float()


def pair_scores(row_ND: Tensor, index_M: Tensor, other_MD: Tensor) -> Tensor:
    """(M,) float64 on the CPU: cosine similarity of other_MD's unit-norm rows with the rows index_M of row_ND.

    Equal rows get equal scores: each is summed by itself.
    """
    pairs = zip(index_M.to(row_ND.device).split(BLOCK), other_MD.split(BLOCK), strict=True)
    score_M = [(row_ND[index_B] * other_BD).sum(dim=1, dtype=torch.float64) for index_B, other_BD in pairs]
    return torch.cat(score_M).cpu()


def hit_share(above_Q: Tensor, tied_right_Q: Tensor, tied_wrong_Q: Tensor, k: int) -> Tensor:
    """(Q,) float64: the chance that a right answer is among the first k, were ties broken by lot.

    Args:
        above_Q: wrong answers that score higher than the best right one.
        tied_right_Q: right answers that score what the best one does, itself included: at least 1.
        tied_wrong_Q: wrong answers that score the same.
        k: places.
    """
    right_Q, wrong_Q = tied_right_Q.double(), tied_wrong_Q.double()
    places_Q = k - above_Q
    missed_Q = torch.ones_like(right_Q)
    for place in range(k):
        left_Q = (wrong_Q - place).clamp(min=0)
        missed_Q = torch.where(place < places_Q, missed_Q * left_Q / (left_Q + right_Q), missed_Q)
    return 1 - missed_Q

"""Image ↔ text retrieval with any number of captions an image; no N × M matrix is ever whole.

Shapes: N images, M captions, B of either at a time, D = embedding width. A caption's owner is the index of its image.

CLIP_benchmark's definitions: image_retrieval_recall@K takes a caption and looks for its image; text_retrieval_recall@K
takes an image, and any of its captions among the first K is a hit. A median rank, which it has not, counts from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import Sampled, tie_ranges
from pipeline.evaluate.ties import hit_share, scores

TASK = "zeroshot_retrieval"
CUTOFFS = (1, 5, 10)
# Scores at a time, unless a query has more keys.
SCORES = 1 << 24


def measure(image_ND: Tensor, text_MD: Tensor, owners: Sequence[int], *, folds: int = 1) -> Result:
    """Recall at 1, 5 and 10 and the median rank, both ways; ties are shared (see ties.py), and described.

    Args:
        image_ND: unit-norm.
        text_MD: unit-norm.
        owners: (M,) index of each caption's image, ascending; every image has at least one.
        folds: consecutive images are cut into so many equal galleries, each searched by itself (as in COCO's "1K"
            protocol, five of them); recalls are the mean over the galleries, ranks are taken together.
    """
    owner_M, size = torch.as_tensor(owners), len(image_ND) // folds
    parts = []
    for fold in range(folds):
        of_fold = slice(*torch.searchsorted(owner_M, torch.tensor([fold * size, (fold + 1) * size])).tolist())
        parts.append(_search(image_ND[fold * size :][:size], text_MD[of_fold], owner_M[of_fold] - fold * size))
    sampled, chance = {}, {}
    for way in parts[0]:
        found = [part[way] for part in parts]
        images = np.concatenate([one.images + fold * size for fold, one in enumerate(found)])
        galleries = np.repeat(np.arange(folds), [len(one.images) for one in found])
        for k in CUTOFFS:
            hit_M = torch.cat([one.hits(k) for one in found])
            sampled[f"{way}_recall@{k}"] = Sampled.of(hit_M, images=images, groups=galleries)
            chance[f"{way}_recall@{k}"] = float(torch.stack([one.chance(k) for one in found]).mean())
        name, rank_M = f"{way}_median_rank", torch.cat([one.ranks() for one in found])
        sampled[name] = Sampled.of(rank_M, images=images, statistic="median")
    chance["image_retrieval_median_rank"] = (size + 1) / 2
    recalls = {name: figure for name, figure in sampled.items() if figure.statistic == "mean"}
    return Result(TASK, size * folds, sampled, chance, lambda: {"ties": tie_ranges(recalls)})


class Standing(NamedTuple):
    """How Q queries found the best of their right answers, among K keys.

    Attributes:
        above_Q: wrong keys that score higher.
        right_Q: right keys that score the same, itself included.
        wrong_Q: wrong keys that score the same.
        rights_Q: right keys there are.
        keys: K.
        images: (Q,) the image that a query is, or is of.
    """

    above_Q: Tensor
    right_Q: Tensor
    wrong_Q: Tensor
    rights_Q: Tensor
    keys: int
    images: NDArray[np.int64]

    def hits(self, k: int) -> Tensor:
        """(Q,) whether a right key is among the first k: 1, 0, or the share that ties leave."""
        return hit_share(self.above_Q, self.right_Q, self.wrong_Q, k)

    def ranks(self) -> Tensor:
        """(Q,) the place of the first right key, the expected one where it ties with wrong ones."""
        return self.above_Q + (self.wrong_Q + self.right_Q + 1) / (self.right_Q + 1).double()

    def chance(self, k: int) -> Tensor:
        """() the mean of `hits` were all scores equal."""
        return hit_share(torch.zeros_like(self.rights_Q), self.rights_Q, self.keys - self.rights_Q, k).mean()


def _search(image_ND: Tensor, text_MD: Tensor, owner_M: Tensor) -> dict[str, Standing]:
    """Both ways, within one gallery."""
    image_N = torch.arange(len(image_ND))
    captions_N = torch.bincount(owner_M, minlength=len(image_ND))
    to_images = standing(text_MD, image_ND, owner_M, image_N)
    to_texts = standing(image_ND, text_MD, image_N, owner_M)
    return {
        "image_retrieval": Standing(*to_images, torch.ones_like(owner_M), len(image_ND), owner_M.numpy()),
        "text_retrieval": Standing(*to_texts, captions_N, len(text_MD), image_N.numpy()),
    }


def standing(
    query_QD: Tensor, key_KD: Tensor, query_owner_Q: Tensor, key_owner_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each query's best right answer stands; a key is right whose owner is the query's.

    Returns:
        (Q,) wrong keys above it, (Q,) right keys that score the same, itself included, (Q,) wrong keys that do.
        All on the CPU; O(Q + SCORES) memory where the features are, or O(Q + K).
    """
    query_owner_Q, key_owner_K = query_owner_Q.to(query_QD.device), key_owner_K.to(query_QD.device)
    blocks = []
    key_KD, block = key_KD.double(), max(1, SCORES // len(key_KD))
    for query_BD, owner_B in zip(query_QD.split(block), query_owner_Q.split(block), strict=True):
        score_BK = scores(query_BD, key_KD)
        right_BK = owner_B[:, None] == key_owner_K[None, :]
        best_B1 = score_BK.masked_fill(~right_BK, -torch.inf).amax(dim=1, keepdim=True)
        tied_BK = score_BK == best_B1
        above_B = (score_BK > best_B1).sum(dim=1)
        blocks.append((above_B, (tied_BK & right_BK).sum(dim=1), (tied_BK & ~right_BK).sum(dim=1)))
    above, right, wrong = zip(*blocks, strict=True)
    return torch.cat(above).cpu(), torch.cat(right).cpu(), torch.cat(wrong).cpu()

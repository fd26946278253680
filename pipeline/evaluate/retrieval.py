"""Image ↔ text retrieval with any number of captions an image; no N × M matrix is ever whole.

Shapes: N images, M captions, D = embedding width. A caption's owner is the index of its image.

CLIP_benchmark's definitions: image_retrieval_recall@K takes a caption and looks for its image; text_retrieval_recall@K
takes an image, and any of its captions among the first K is a hit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import interval

TASK = "zeroshot_retrieval"
CUTOFFS = (1, 5, 10)
BLOCK = 1024


def measure(image_ND: Tensor, text_MD: Tensor, owners: Sequence[int]) -> Result:
    """Recall at 1, 5 and 10, both ways.

    What ties with the right answer counts as ranked before it: equal embeddings earn nothing.
    """
    owner_M = torch.as_tensor(owners)
    image_rank_M, text_rank_N = ranks(image_ND, text_MD, owner_M)
    captions_N = torch.bincount(owner_M, minlength=len(image_ND))
    metrics, intervals, chance = {}, {}, {}
    for k in CUTOFFS:
        found_M = (image_rank_M < k).double()
        name = f"image_retrieval_recall@{k}"
        found_N = torch.zeros(len(image_ND), dtype=torch.float64).index_add(0, owner_M, found_M)
        metrics[name], intervals[name] = float(found_M.mean()), interval(found_N, captions_N)
        chance[name] = min(1.0, k / len(image_ND))
        found_N = (text_rank_N < k).double()
        name = f"text_retrieval_recall@{k}"
        metrics[name], intervals[name] = float(found_N.mean()), interval(found_N)
        chance[name] = float(_chance_of_any(captions_N, len(text_MD), k).mean())
    return Result(TASK, metrics, intervals, chance)


def ranks(image_ND: Tensor, text_MD: Tensor, owner_M: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks from 0: (M,) of each caption's image among images, (N,) of each image's best caption among captions.

    An image's other captions do not count as competitors of its best one. O(block · (N + M)) memory.
    """
    image_rank_M = torch.empty(len(text_MD), dtype=torch.long)
    # float64, so that products of the same vectors are equal whatever the block's shape
    image_ND, text_MD = image_ND.double(), text_MD.double()
    for begin in range(0, len(text_MD), BLOCK):
        score_BN = text_MD[begin : begin + BLOCK] @ image_ND.T
        own_B1 = score_BN.gather(1, owner_M[begin : begin + BLOCK, None])
        image_rank_M[begin : begin + BLOCK] = (score_BN >= own_B1).sum(dim=1) - 1
    text_rank_N = torch.empty(len(image_ND), dtype=torch.long)
    for begin in range(0, len(image_ND), BLOCK):
        score_BM = image_ND[begin : begin + BLOCK] @ text_MD.T
        own_BM = owner_M[None, :] == torch.arange(begin, begin + len(score_BM))[:, None]
        best_B1 = score_BM.masked_fill(~own_BM, -torch.inf).amax(dim=1, keepdim=True)
        text_rank_N[begin : begin + BLOCK] = ((score_BM >= best_B1) & ~own_BM).sum(dim=1)
    return image_rank_M, text_rank_N


def _chance_of_any(captions_N: Tensor, total: int, k: int) -> Tensor:
    """(N,) the chance that k captions drawn from all hold at least one of the image's."""
    miss_N = torch.ones(len(captions_N), dtype=torch.float64)
    for drawn in range(min(k, total)):
        miss_N *= (total - drawn - captions_N).clamp(min=0) / (total - drawn)
    return 1 - miss_N

"""Image ↔ text retrieval with any number of captions an image; no N × M matrix is ever whole.

Shapes: N images, M captions, B of either at a time, D = embedding width. A caption's owner is the index of its image.

CLIP_benchmark's definitions: image_retrieval_recall@K takes a caption and looks for its image; text_retrieval_recall@K
takes an image, and any of its captions among the first K is a hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import interval
from pipeline.evaluate.ties import hit_share, scores

TASK = "zeroshot_retrieval"
CUTOFFS = (1, 5, 10)
BLOCK = 1024


def measure(image_ND: Tensor, text_MD: Tensor, owners: Sequence[int]) -> Result:
    """Recall at 1, 5 and 10, both ways; ties are shared (see ties.py).

    Args:
        image_ND: unit-norm.
        text_MD: unit-norm.
        owners: (M,) index of each caption's image; every image has at least one.
    """
    owner_M = torch.as_tensor(owners)
    image_N = torch.arange(len(image_ND))
    captions_N = torch.bincount(owner_M, minlength=len(image_ND))
    to_images = standing(text_MD, image_ND, owner_M, image_N)
    to_texts = standing(image_ND, text_MD, image_N, owner_M)
    none_N = torch.zeros_like(captions_N)
    metrics, resampled, chance = {}, {}, {}
    for k in CUTOFFS:
        name = f"image_retrieval_recall@{k}"
        found_M = hit_share(*to_images, k)
        found_N = torch.zeros(len(image_ND), dtype=torch.float64).index_add(0, owner_M, found_M)
        metrics[name], resampled[name] = float(found_M.mean()), partial(interval, found_N, captions_N)
        chance[name] = min(1.0, k / len(image_ND))
    for k in CUTOFFS:
        name = f"text_retrieval_recall@{k}"
        found_N = hit_share(*to_texts, k)
        metrics[name], resampled[name] = float(found_N.mean()), partial(interval, found_N)
        chance[name] = float(hit_share(none_N, captions_N, len(text_MD) - captions_N, k).mean())
    return Result(TASK, metrics, resampled, chance)


def standing(
    query_QD: Tensor, key_KD: Tensor, query_owner_Q: Tensor, key_owner_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each query's best right answer stands; a key is right whose owner is the query's.

    Returns:
        (Q,) wrong keys above it, (Q,) right keys that score the same, itself included, (Q,) wrong keys that do.
        All on the CPU; O(Q + B · K) memory where the features are.
    """
    query_owner_Q, key_owner_K = query_owner_Q.to(query_QD.device), key_owner_K.to(query_QD.device)
    blocks = []
    for query_BD, owner_B in zip(query_QD.split(BLOCK), query_owner_Q.split(BLOCK), strict=True):
        score_BK = scores(query_BD, key_KD)
        right_BK = owner_B[:, None] == key_owner_K[None, :]
        best_B1 = score_BK.masked_fill(~right_BK, -torch.inf).amax(dim=1, keepdim=True)
        tied_BK = score_BK == best_B1
        above_B = (score_BK > best_B1).sum(dim=1)
        blocks.append((above_B, (tied_BK & right_BK).sum(dim=1), (tied_BK & ~right_BK).sum(dim=1)))
    above, right, wrong = zip(*blocks, strict=True)
    return torch.cat(above).cpu(), torch.cat(right).cpu(), torch.cat(wrong).cpu()

"""Zero-shot classification: an image belongs to the class whose prompts are nearest.

Shapes: N images, B of them at a time, K classes, T templates, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.evaluate.result import ClassAccuracy, Result
from pipeline.evaluate.statistics import interval, interval_over_groups
from pipeline.evaluate.ties import hit_share, scores

TASK = "zeroshot_classification"
CUTOFFS = (1, 5)
BLOCK = 1024


def class_embeddings(
    names: Sequence[str], templates: Sequence[str], embed: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """(K, D) unit-norm: the mean of a class's unit-norm prompt embeddings (Radford et al. 2021, section 3.1.4)."""
    prompt_KTD = embed(prompts(names, templates)).view(len(names), len(templates), -1)
    return F.normalize(prompt_KTD.mean(dim=1), dim=1)


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """(K · T) texts, those of a class in a row."""
    return [template.replace("{c}", name) for name in names for template in templates]


def measure(image_ND: Tensor, class_KD: Tensor, labels: Sequence[int]) -> Result:
    """acc1, acc5, and mean_per_class_recall over the classes that have images; ties are shared (see ties.py).

    Args:
        image_ND: unit-norm.
        class_KD: unit-norm.
        labels: (N,) from 0 to K - 1. A class without images counts in chance and as a wrong answer, not in the recall.
    """
    label_N, classes = torch.as_tensor(labels), len(class_KD)
    hits = hit_shares(image_ND, class_KD, label_N)
    images_K = torch.bincount(label_N, minlength=classes)
    recall_K = torch.zeros(classes, dtype=torch.float64).index_add(0, label_N, hits[1]) / images_K
    metrics = {f"acc{k}": float(hit_N.mean()) for k, hit_N in hits.items()}
    resampled = {f"acc{k}": partial(interval, hit_N) for k, hit_N in hits.items()}
    chance = {f"acc{k}": min(1.0, k / classes) for k in hits}
    name = "mean_per_class_recall"
    metrics[name], chance[name] = float(recall_K[images_K > 0].mean()), 1 / classes
    resampled[name] = partial(interval_over_groups, hits[1], label_N)
    pairs = zip(images_K.tolist(), recall_K.tolist(), strict=True)
    accuracies = tuple(ClassAccuracy(images, recall if images else None) for images, recall in pairs)
    return Result(TASK, metrics, resampled, chance, accuracies)


def hit_shares(image_ND: Tensor, class_KD: Tensor, label_N: Tensor) -> dict[int, Tensor]:
    """k → (N,) on the CPU, whether the right class is among the k best: 1, 0, or the share that a tie leaves."""
    above, tied = [], []
    for image_BD, label_B in zip(image_ND.split(BLOCK), label_N.split(BLOCK), strict=True):
        score_BK = scores(image_BD, class_KD)
        own_B1 = score_BK.gather(1, label_B[:, None].to(score_BK.device))
        above.append((score_BK > own_B1).sum(dim=1))
        tied.append((score_BK == own_B1).sum(dim=1) - 1)
    above_N, tied_N = torch.cat(above).cpu(), torch.cat(tied).cpu()
    return {k: hit_share(above_N, torch.ones_like(tied_N), tied_N, k) for k in CUTOFFS}

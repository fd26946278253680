"""Zero-shot classification: an image belongs to the class whose prompts are nearest.

Shapes: N images, K classes, T templates, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import interval

TASK = "zeroshot_classification"


def class_embeddings(
    names: Sequence[str], templates: Sequence[str], embed: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """(K, D) unit-norm: the mean of a class's unit-norm prompt embeddings (Radford et al. 2021, section 3.1.4)."""
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    prompt_KTD = embed(prompts).view(len(names), len(templates), -1)
    return F.normalize(prompt_KTD.mean(dim=1), dim=1)


def measure(image_ND: Tensor, class_KD: Tensor, labels: Sequence[int]) -> Result:
    """acc1, acc5 and mean_per_class_recall, the latter over the classes that have images.

    Classes that score the same share a place evenly: an image whose class ties with three others for the first place
    counts a quarter, so that a collapsed model scores chance and not 1.
    """
    label_N = torch.as_tensor(labels)
    classes = len(class_KD)
    score_NK = image_ND.double() @ class_KD.double().T
    hits = {k: hit_share(score_NK, label_N, k) for k in (1, 5)}
    recalls = [float(hits[1][label_N == label].mean()) for label in label_N.unique()]
    metrics = {
        "acc1": float(hits[1].mean()),
        "acc5": float(hits[5].mean()),
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }
    intervals = {f"acc{k}": interval(hit) for k, hit in hits.items()}
    chance = {"acc1": 1 / classes, "acc5": min(1.0, 5 / classes), "mean_per_class_recall": 1 / classes}
    return Result(TASK, metrics, intervals, chance)


def hit_share(score_NK: Tensor, label_N: Tensor, k: int) -> Tensor:
    """(N,) the chance that the right class is among the k best, ties broken at random."""
    own_N1 = score_NK.gather(1, label_N[:, None])
    above_N = (score_NK > own_N1).sum(dim=1)
    tied_N = (score_NK == own_N1).sum(dim=1)
    return ((k - above_N) / tied_N).clamp(0, 1).double()

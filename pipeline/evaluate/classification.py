"""Zero-shot classification: an image belongs to the class whose prompts are nearest.

Shapes: N images, B of them at a time, K classes, T templates, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import Sampled, group_intervals, tie_ranges
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


class Answers(NamedTuple):
    """How the classes of N images were answered, on the CPU.

    Attributes:
        hits: k → (N,) whether the right class is among the k best: 1, 0, or the share that a tie leaves.
        first_N: the best class; of a tie the first.
    """

    hits: dict[int, Tensor]
    first_N: Tensor


def measure(image_ND: Tensor, class_KD: Tensor, labels: Sequence[int], names: Sequence[str]) -> Result:
    """acc1, acc5, and recall, precision and F1 as means over classes; ties are shared (see ties.py) in the first three.

    mean_per_class_recall is over the classes that have images, mean_per_class_precision over those that are answered,
    mean_per_class_f1 over those that are either. A class without images counts in chance and as a wrong answer.

    Args:
        image_ND: unit-norm.
        class_KD: unit-norm.
        labels: (N,) from 0 to K - 1.
        names: (K,) of the classes.
    """
    return of_scores((scores(image_BD, class_KD) for image_BD in image_ND.split(BLOCK)), labels, names)


def of_scores(block_BK: Iterable[Tensor], labels: Sequence[int], names: Sequence[str]) -> Result:
    """As `measure`, of scores that a classifier of any kind gave, in O(N + B · K) memory.

    Args:
        block_BK: the scores of a few images at a time, in order; the highest is the answer.
        labels: (N,) from 0 to K - 1.
        names: (K,) of the classes.
    """
    label_N, images, classes = torch.as_tensor(labels), len(labels), len(names)
    answers = answer(block_BK, label_N)
    right_N, row_N = (answers.first_N == label_N).double(), torch.arange(images)
    by_class = {
        "recall": Sampled.of(answers.hits[1], groups=label_N),
        "precision": Sampled.of(right_N, groups=answers.first_N),
        # 2 · right / (images + answers): an image counts for its class, and for the one that is answered.
        "f1": Sampled.of(
            torch.cat([2 * right_N, torch.zeros(images)]),
            images=torch.cat([row_N, row_N]),
            groups=torch.cat([label_N, answers.first_N]),
        ),
    }
    sampled = {f"acc{k}": Sampled.of(hit_N) for k, hit_N in answers.hits.items()}
    sampled |= {f"mean_per_class_{name}": figure for name, figure in by_class.items()}
    chance = {f"acc{k}": min(1.0, k / classes) for k in CUTOFFS} | {"mean_per_class_recall": 1 / classes}

    def describe() -> dict[str, Any]:
        shared = {name: sampled[name] for name in ("acc1", "acc5", "mean_per_class_recall")}
        return {
            "ties": tie_ranges(shared),
            "classes": _each_class(by_class, names, label_N),
            "confusion": _confusion(label_N, answers.first_N),
        }

    return Result(TASK, images, sampled, chance, describe)


def answer(block_BK: Iterable[Tensor], label_N: Tensor) -> Answers:
    """Where the right class stands among the scores of each image; see `of_scores`."""
    above, tied, first = [], [], []
    begin = 0
    for score_BK in block_BK:
        label_B, begin = label_N[begin : begin + len(score_BK)], begin + len(score_BK)
        own_B1 = score_BK.gather(1, label_B[:, None].to(score_BK.device))
        above.append((score_BK > own_B1).sum(dim=1))
        tied.append((score_BK == own_B1).sum(dim=1) - 1)
        first.append(score_BK.argmax(dim=1))
    above_N, tied_N = torch.cat(above).cpu(), torch.cat(tied).cpu()
    hits = {k: hit_share(above_N, torch.ones_like(tied_N), tied_N, k) for k in CUTOFFS}
    return Answers(hits, torch.cat(first).cpu())


def _each_class(by_class: dict[str, Sampled], names: Sequence[str], label_N: Tensor) -> list[dict[str, Any]]:
    """Of each class its name, images, and figures with intervals; None for what has neither image nor answer."""
    images_K = torch.bincount(label_N, minlength=len(names)).tolist()
    found: list[dict[str, Any]] = [
        {"name": name, "images": count, **dict.fromkeys(by_class), "intervals": dict.fromkeys(by_class)}
        for name, count in zip(names, images_K, strict=True)
    ]
    for metric, figure in by_class.items():
        value_G, weight_G = figure.group_totals(len(label_N))(np.ones(len(label_N)))
        for number, interval in enumerate(group_intervals(figure, len(label_N))):
            if weight_G[number]:
                found[number][metric] = value_G[number] / weight_G[number]
                found[number]["intervals"][metric] = interval
    return found


def _confusion(label_N: Tensor, first_N: Tensor) -> list[tuple[int, int, int]]:
    """(class, answered class, images), for what occurs."""
    pairs, counts = torch.stack([label_N, first_N], dim=1).unique(dim=0, return_counts=True)
    return [(label, answered, count) for (label, answered), count in zip(pairs.tolist(), counts.tolist(), strict=True)]

"""Caption selection: does the right caption of an image beat the wrong ones that were written for it?

Sets of this kind ask for one thing at a time (which thing has which colour, which lies left), where retrieval can be
won by the words alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import interval

TASK = "image_caption_selection"


def measure(image_ND: Tensor, text_MD: Tensor, captions_N: Sequence[int]) -> Result:
    """The share of images whose right caption, the first of each image's, scores above all its wrong ones.

    Args:
        image_ND: unit-norm.
        text_MD: unit-norm; each image's captions in a row, the right one first.
        captions_N: captions of each image.
    """
    hits = []
    for image_D, text_CD in zip(image_ND.double(), text_MD.double().split(list(captions_N)), strict=True):
        score_C = text_CD @ image_D
        tied, above = int((score_C == score_C[0]).sum()), int((score_C > score_C[0]).sum())
        hits.append(1 / tied if above == 0 else 0.0)
    chance = float((1 / torch.as_tensor(captions_N, dtype=torch.float64)).mean())
    return Result(TASK, {"acc": sum(hits) / len(hits)}, {"acc": interval(hits)}, {"acc": chance})

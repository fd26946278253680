"""Caption selection: does the right caption of an image beat the wrong ones that were written for it?

Sets of this kind ask for one thing at a time (which thing has which colour, which lies left), where retrieval can be
won by the words alone. Shapes: N images, M captions, C captions of one image, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import Sampled
from pipeline.evaluate.ties import hit_share, scores

TASK = "image_caption_selection"


def measure(image_ND: Tensor, text_MD: Tensor, captions_N: Sequence[int]) -> Result:
    """The share of images whose right caption, the first of each image's, scores above all its wrong ones.

    Ties are shared (see ties.py): a right caption that ties with one wrong caption for the first place counts a half.

    Args:
        image_ND: unit-norm.
        text_MD: unit-norm; each image's captions in a row, the right one first.
        captions_N: captions of each image.
    """
    image_ND, text_MD = image_ND.cpu(), text_MD.cpu()  # a few numbers an image: the moving would take longer
    count_N = torch.as_tensor(captions_N)
    above, tied = [], []
    for image_D, text_CD in zip(image_ND, text_MD.split(list(captions_N)), strict=True):
        score_C = scores(text_CD, image_D[None]).flatten()
        above.append(int((score_C > score_C[0]).sum()))
        tied.append(int((score_C == score_C[0]).sum()) - 1)
    hit_N = hit_share(torch.tensor(above), torch.ones_like(count_N), torch.tensor(tied), 1)
    chance = float((1 / count_N.double()).mean())
    return Result(TASK, len(image_ND), {"acc": Sampled.of(hit_N)}, {"acc": chance})

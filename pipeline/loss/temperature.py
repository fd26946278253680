"""The temperature: the model learns logit_scale = ln(1 / temperature), held within bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def clamp_scale(logit_scale: Tensor, low: float, high: float) -> Tensor:
    """Hold exp(logit_scale) in [low, high], as the original CLIP does after each step (with 1 and 100).

    Returns:
        () bool on its device: whether it had reached either bound.
    """
    lowest, highest = math.log(low), math.log(high)
    at_bound = (logit_scale <= lowest) | (logit_scale >= highest)
    logit_scale.clamp_(lowest, highest)
    return at_bound

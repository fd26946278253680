"""The sigmoid loss over all ranks' pairs, exact, without the N × N matrix of logits.

Shapes: B = pairs on this rank, N = pairs on all ranks, D = embedding width, K = kinds of keys.

With logits s_ij = scale · image_i · text_j + bias, the loss is (Σ_i softplus(-s_ii) + Σ_ij softplus(s_ij)) / N, the
second sum over negatives. A tile's part of it and of its gradients needs no other tile, so the forward pass forms both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.loss.tiles import apply, multiply, pairs, world_size


def sigmoid(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    key_BK: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    tile: int | None = None,
) -> Tensor:
    """SigLIP's loss in O(N · D + tile²) memory (Zhai et al. 2023, "Sigmoid loss for language image pre-training").

    Args:
        image_BD: unit-norm; row i pairs with row i of text_BD.
        text_BD: unit-norm.
        scale: () exp(logit_scale), already clamped.
        bias: () added to each logit.
        key_BK: int64; pairs that agree in any of the K columns are not each other's negatives.
        sizes: B of every rank; None where all are alike.
        tile: rows and columns of logits in memory at a time; None for this device's default.

    Returns:
        () this rank's rows summed over N; precision and gradients over ranks are as info_nce's.

    Collective: every rank calls it; B may differ by rank.
    """
    return apply(_Sigmoid, (image_BD, text_BD, scale, bias), key_BK, sizes, tile)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        scale: Tensor,
        bias: Tensor,
        low: bool,
        key_BK: Tensor | None,
        sizes: Sequence[int] | None,
        tile: int | None,
    ) -> Tensor:
        every = pairs(image_BD, text_BD, low, key_BK, sizes, tile)
        pair_B = scale * (image_BD * text_BD).sum(dim=1) + bias
        loss = torch.logaddexp(-pair_B, torch.zeros_like(pair_B)).sum()
        slope_B = (-pair_B).sigmoid()
        pull_image_BD, pull_text_BD = torch.zeros_like(image_BD), torch.zeros_like(text_BD)
        bias_grad = -slope_B.sum()
        one_rank = world_size() == 1
        for rows, columns, logit_RC in every.tiles(scale):
            logit_RC += bias
            loss += torch.logaddexp(logit_RC, logit_RC.new_zeros(())).sum()
            weight_RC = logit_RC.sigmoid_()
            bias_grad += weight_RC.sum()
            pull_image_BD[rows] += multiply(weight_RC, every.text_ND[columns])
            if one_rank:
                pull_text_BD[columns] += multiply(weight_RC.T, every.image_ND[rows])
        if not one_rank:
            for rows, columns, logit_RC in every.tiles(scale, of_texts=True):
                weight_RC = logit_RC.add_(bias).sigmoid_()
                pull_text_BD[rows] += multiply(weight_RC, every.image_ND[columns])
        pull_image_BD -= slope_B[:, None] * text_BD
        pull_text_BD -= slope_B[:, None] * image_BD
        count = len(every.text_ND)
        scale_grad = (image_BD * pull_image_BD).sum() / count
        grads = pull_image_BD * (scale / count), pull_text_BD * (scale / count), scale_grad, bias_grad / count
        ctx.save_for_backward(*grads)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * saved for saved in ctx.saved_tensors), None, None, None, None

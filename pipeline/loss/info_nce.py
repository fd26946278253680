"""InfoNCE over all ranks' pairs, exact, without the N × N matrix of logits.

Shapes: B = pairs on this rank, N = pairs on all ranks, D = embedding width, T = columns of a tile.

With logits s_ij = scale · image_i · text_j, row and column log-sum-exps r_i and c_j, the loss is
Σ_i (r_i + c_i - 2 s_ii) / 2N, and its gradient by s_ij is (exp(s_ij - r_i) + exp(s_ij - c_j) - 2 δ_ij) / 2N. So the
forward pass keeps the 2N log-sum-exps only, and the backward pass makes each tile of logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def info_nce(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, *, sizes: Sequence[int] | None = None, tile: int = 1024
) -> Tensor:
    """Symmetric InfoNCE over all ranks' pairs, in O(N · D + B · tile) memory (Radford et al. 2021, fig. 3).

    B = pairs on this rank, N = the sum of B over ranks, D = embedding width.

    Args:
        image_BD: unit-norm; row i pairs with row i of text_BD.
        text_BD: unit-norm.
        scale: () exp(logit_scale), already clamped.
        sizes: B of every rank; None where all are alike.
        tile: columns of logits in memory at a time.

    Returns:
        () this rank's rows and columns summed over 2N, float32 or wider; the ranks' sum is log N where all rows are
        equal. Its gradient by this rank's features is the whole loss's, so that gradients of parameters (scale's
        too) must be summed over ranks, not averaged.

    Collective: every rank calls it, forward and backward; B may differ by rank.
    """
    wide = torch.promote_types(torch.promote_types(image_BD.dtype, scale.dtype), torch.float32)
    with torch.autocast(image_BD.device.type, enabled=False):
        return _InfoNCE.apply(image_BD.to(wide), text_BD.to(wide), scale.to(wide), sizes, tile)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, sizes: Sequence[int] | None, tile: int
    ) -> Tensor:
        image_ND, text_ND = _gather(image_BD, sizes), _gather(text_BD, sizes)
        row_B = _log_sum_exp(image_BD, text_ND, scale, tile)
        column_B = _log_sum_exp(text_BD, image_ND, scale, tile)
        pair_B = scale * (image_BD * text_BD).sum(dim=1)
        ctx.save_for_backward(image_BD, text_BD, scale, image_ND, text_ND, row_B, column_B)
        ctx.sizes, ctx.tile = sizes, tile
        return (row_B + column_B - 2 * pair_B).sum() / (2 * len(image_ND))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_BD, scale, image_ND, text_ND, row_B, column_B = ctx.saved_tensors
        row_N, column_N = _gather(row_B, ctx.sizes), _gather(column_B, ctx.sizes)
        weight = grad / (2 * len(image_ND))
        image_grad_BD, cosine = _attract(image_BD, text_ND, scale, row_B, column_N, ctx.tile)
        text_grad_BD, _ = _attract(text_BD, image_ND, scale, column_B, row_N, ctx.tile)
        image_grad_BD = weight * scale * (image_grad_BD - 2 * text_BD)
        text_grad_BD = weight * scale * (text_grad_BD - 2 * image_BD)
        scale_grad = weight * (cosine - 2 * (image_BD * text_BD).sum())
        return image_grad_BD, text_grad_BD, scale_grad, None, None


def _log_sum_exp(query_BD: Tensor, key_ND: Tensor, scale: Tensor, tile: int) -> Tensor:
    """(B,) log Σ_j exp(scale · query_i · key_j), a tile of keys at a time."""
    total_B = query_BD.new_full((len(query_BD),), -torch.inf)
    for key_TD in key_ND.split(tile):
        total_B = torch.logaddexp(total_B, (scale * (query_BD @ key_TD.T)).logsumexp(dim=1))
    return total_B


def _attract(
    query_BD: Tensor, key_ND: Tensor, scale: Tensor, own_B: Tensor, other_N: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """Σ_j w_ij key_j and Σ_ij w_ij query_i · key_j, with w_ij = exp(s_ij - own_i) + exp(s_ij - other_j)."""
    pull_BD, cosine = torch.zeros_like(query_BD), query_BD.new_zeros(())
    for key_TD, other_T in zip(key_ND.split(tile), other_N.split(tile), strict=True):
        cosine_BT = query_BD @ key_TD.T
        logit_BT = scale * cosine_BT
        weight_BT = (logit_BT - own_B[:, None]).exp() + (logit_BT - other_T).exp()
        pull_BD += weight_BT @ key_TD
        cosine += (weight_BT * cosine_BT).sum()
    return pull_BD, cosine


def _gather(own: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """All ranks' rows, in rank order; ranks with fewer rows are padded on the way, as collectives want equal shapes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    sizes = sizes or [len(own)] * dist.get_world_size()
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

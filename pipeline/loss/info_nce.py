"""InfoNCE over all ranks' pairs, exact, without the N × N matrix of logits.

Shapes: B = pairs on this rank, N = pairs on all ranks, D = embedding width, K = kinds of keys.

With logits s_ij = scale · image_i · text_j, let n_i and m_j be the log-sum-exps of row i and column j over negatives
alone. The pair's loss is softplus(n_i - s_ii) + softplus(m_i - s_ii), which loses no digits where the pair outweighs
its negatives, and its gradients are

    by s_ii   -σ(n_i - s_ii) - σ(m_i - s_ii)
    by s_ij   exp(s_ij - r_i) + exp(s_ij - c_j),   r_i = n_i + softplus(s_ii - n_i) and c_j likewise,

all over 2N. So the forward pass keeps 2N numbers, and the backward pass makes each tile of logits again. On one rank
that is four products of matrices (autograd takes six). On several, each rank makes its rows' tiles for its images and
its columns' again for its texts: five, and only features travel, once. To sum partial gradients of all texts by a
reduce-scatter would spare the fifth product and send twice as much with gloo (a half more on a ring): measured on two
ranks of one machine, that is a fifth faster, its wire being memory; between machines, the wire is what is short.
(`python -m tests.benchmarks.loss` measures both.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.loss.tiles import Pairs, apply, gather, multiply, pairs, world_size


def info_nce(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    *,
    key_BK: Tensor | None = None,
    decoupled: bool = False,
    sizes: Sequence[int] | None = None,
    tile: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE over all ranks' pairs, in O(N · D + tile²) memory (Radford et al. 2021, fig. 3).

    B = pairs on this rank, N = the sum of B over ranks, D = embedding width.

    Args:
        image_BD: unit-norm; row i pairs with row i of text_BD.
        text_BD: unit-norm.
        scale: () exp(logit_scale), already clamped.
        key_BK: int64; pairs that agree in any of the K columns (the same photo, the same text) are left out of each
            other's denominators, since they are no negatives.
        decoupled: leave the pair itself out of its denominators too (Yeh et al. 2022, "Decoupled contrastive
            learning", eq. 6); a pair without a negative then counts nothing.
        sizes: B of every rank; None where all are alike.
        tile: rows and columns of logits in memory at a time; None for this device's default.

    Returns:
        () this rank's pairs summed over 2N, float32 or wider; the ranks' sum is log N where all rows are equal. Its
        gradient by this rank's features is the whole loss's, so that gradients of parameters (scale's too) must be
        summed over ranks, not averaged.

    Under autocast to bfloat16, products are made of bfloat16 numbers and summed in float32; all else is float32.

    Collective: every rank calls it, forward and backward; B may differ by rank.
    """
    return apply(_InfoNCE, (image_BD, text_BD, scale), key_BK, decoupled, sizes, tile)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        scale: Tensor,
        low: bool,
        key_BK: Tensor | None,
        decoupled: bool,
        sizes: Sequence[int] | None,
        tile: int | None,
    ) -> Tensor:
        every = pairs(image_BD, text_BD, low, key_BK, sizes, tile)
        own = slice(every.first, every.first + len(image_BD))
        negative_B, negative_N = _log_sum_exps(every, scale)
        pair_B = scale * (image_BD * text_BD).sum(dim=1)
        row_loss_B, row_slope_B, row_B = _terms(negative_B, pair_B, decoupled)
        column_loss_B, column_slope_B, column_B = _terms(negative_N[own], pair_B, decoupled)
        slope_B = row_slope_B + column_slope_B
        ctx.save_for_backward(image_BD, text_BD, scale, slope_B, row_B, column_B, *every.tensors)
        ctx.place, ctx.sizes = (every.first, every.tile), sizes
        return (row_loss_B + column_loss_B).sum() / (2 * len(every.text_ND))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_BD, scale, slope_B, row_B, column_B, *tensors = ctx.saved_tensors
        every = Pairs(*tensors, *ctx.place)
        row_N, column_N = gather(row_B, ctx.sizes), gather(column_B, ctx.sizes)
        weight = grad / (2 * len(row_N))
        pull_image_BD, pull_text_BD = torch.zeros_like(image_BD), torch.zeros_like(text_BD)
        one_rank = world_size() == 1
        for rows, columns, logit_RC in every.tiles(scale):
            weight_RC = _weights(logit_RC, row_B[rows], column_N[columns])
            pull_image_BD[rows] += multiply(weight_RC, every.text_ND[columns])
            if one_rank:
                pull_text_BD[columns] += multiply(weight_RC.T, every.image_ND[rows])
        if not one_rank:
            for rows, columns, logit_RC in every.tiles(scale, of_texts=True):
                weight_RC = _weights(logit_RC, column_B[rows], row_N[columns])
                pull_text_BD[rows] += multiply(weight_RC, every.image_ND[columns])
        pull_image_BD -= slope_B[:, None] * text_BD
        pull_text_BD -= slope_B[:, None] * image_BD
        scale_grad = weight * (image_BD * pull_image_BD).sum()
        return (weight * scale) * pull_image_BD, (weight * scale) * pull_text_BD, scale_grad, *[None] * 5


def _log_sum_exps(every: Pairs, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) of this rank's rows and (N,) of all columns: log Σ exp over negatives, the lowest number where none is."""
    row_B = every.image_BD.new_full((len(every.image_BD),), -torch.inf, dtype=scale.dtype)
    column_N = row_B.new_full((len(every.text_ND),), -torch.inf)
    for rows, columns, logit_RC in every.tiles(scale):
        row_B[rows] = torch.logaddexp(row_B[rows], logit_RC.logsumexp(dim=1))
        column_N[columns] = torch.logaddexp(column_N[columns], logit_RC.logsumexp(dim=0))
    lowest = torch.finfo(scale.dtype).min
    row_B, column_N = row_B.clamp_(min=lowest), column_N.clamp_(min=lowest)  # -∞ minus -∞ would be NaN
    if world_size() > 1:
        own_N, highest_N = column_N, column_N.clone()
        dist.all_reduce(highest_N, dist.ReduceOp.MAX)
        total_N = (own_N - highest_N).exp()
        dist.all_reduce(total_N)
        column_N = highest_N + total_N.log()
    return row_B, column_N


def _terms(negative_B: Tensor, pair_B: Tensor, decoupled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, their slopes by the negatives' log-sum-exp, logarithms of the denominators) of rows, or of columns."""
    margin_B = negative_B - pair_B
    if decoupled:
        some_B = negative_B > torch.finfo(negative_B.dtype).min
        return torch.where(some_B, margin_B, 0), some_B.to(margin_B.dtype), negative_B
    return (
        torch.logaddexp(margin_B, torch.zeros_like(margin_B)),
        margin_B.sigmoid(),
        torch.logaddexp(negative_B, pair_B),
    )


def _weights(logit_RC: Tensor, own_R: Tensor, other_C: Tensor) -> Tensor:
    """exp(s - own) + exp(s - other): a tile's logits become the loss's gradient by them, but for the pairs' own."""
    weight_RC = (logit_RC - own_R[:, None]).exp_()
    return weight_RC.add_(logit_RC.sub_(other_C).exp_())

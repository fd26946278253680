"""Logits of images and texts a tile at a time, over all ranks: what the losses share.

Shapes: B = pairs on this rank, N = pairs on all ranks, D = embedding width, K = kinds of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.exchange import ALL_GATHER

# Rows and columns of a tile: a gigabyte of float32 logits, or what a CPU's cache holds some of (the fastest of
# 1,024, 2,048 and 4,096 at 8,192 pairs).
TILE, CPU_TILE = 16384, 1024


class Pairs(NamedTuple):
    """This rank's pairs and everyone's, as the tiles need them.

    Attributes:
        image_BD: this rank's, in the type that products are made of.
        text_BD: likewise.
        image_ND: all ranks', in rank order.
        text_ND: likewise.
        key_BK: int64, or None; pairs that agree in any of the K columns are not each other's negatives.
        key_NK: all ranks'.
        first: this rank's first row among all.
        tile: rows and columns of a tile.
    """

    image_BD: Tensor
    text_BD: Tensor
    image_ND: Tensor
    text_ND: Tensor
    key_BK: Tensor | None
    key_NK: Tensor | None
    first: int
    tile: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that are tensors, first in order, as a backward pass wants them saved."""
        return self[:-2]

    def tiles(self, scale: Tensor, *, of_texts: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows, columns, logits) of this rank's images against all texts, or of its texts against all images.

        A logit is scale · image · text in float32 or wider, and -∞ where the two are not each other's negatives.
        """
        own_BD, all_ND = (self.text_BD, self.image_ND) if of_texts else (self.image_BD, self.text_ND)
        for row in range(0, len(own_BD), self.tile):
            rows = slice(row, min(row + self.tile, len(own_BD)))
            for column in range(0, len(all_ND), self.tile):
                columns = slice(column, min(column + self.tile, len(all_ND)))
                logit_RC = multiply(own_BD[rows], all_ND[columns].T).mul_(scale)
                logit_RC.diagonal(self.first + row - column).fill_(-torch.inf)
                if self.key_BK is not None and self.key_NK is not None:
                    for own_R, all_C in zip(self.key_BK[rows].T, self.key_NK[columns].T, strict=True):
                        logit_RC.masked_fill_(own_R[:, None] == all_C, -torch.inf)
                yield rows, columns, logit_RC


def pairs(
    image_BD: Tensor,
    text_BD: Tensor,
    low: bool,
    key_BK: Tensor | None,
    sizes: Sequence[int] | None,
    tile: int | None,
) -> Pairs:
    """Bring all ranks' pairs together.

    Args:
        image_BD: float32 or wider.
        text_BD: likewise.
        low: make products of bfloat16 numbers, summed in float32.
        key_BK: int64, or None.
        sizes: B of every rank; None where all are alike.
        tile: None for this device's default.

    Collective: every rank calls it.
    """
    if low:
        image_BD, text_BD = image_BD.bfloat16(), text_BD.bfloat16()
    return Pairs(
        image_BD=image_BD,
        text_BD=text_BD,
        image_ND=gather(image_BD, sizes),
        text_ND=gather(text_BD, sizes),
        key_BK=key_BK,
        key_NK=None if key_BK is None else gather(key_BK, sizes),
        first=sum(sizes[: _rank()]) if sizes else _rank() * len(image_BD),
        tile=tile or (CPU_TILE if image_BD.device.type == "cpu" else TILE),
    )


def apply(function: type[torch.autograd.Function], tensors: Sequence[Tensor], *options: Any) -> Tensor:
    """function.apply(*tensors, low, *options) outside autocast, the tensors in float32 or wider.

    `low` is whether autocast to bfloat16 was on. (To float16 it changes nothing: small probabilities would be lost.)
    """
    wide = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    device = tensors[0].device.type
    low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    with torch.autocast(device, enabled=False):
        return function.apply(*(tensor.to(wide) for tensor in tensors), low, *options)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices with sums in float32 or wider; `left` is rounded to the type of `right`."""
    if right.dtype != torch.bfloat16:
        return left @ right
    if right.is_cuda:
        return torch.mm(left.bfloat16(), right, out_dtype=torch.float32)
    return left.bfloat16().float() @ right.float()  # the same: products of two bfloat16 are exact in float32


def text_key(token_BL: Tensor) -> Tensor:
    """(B,) int64 that is equal for equal rows of tokens: a polynomial with an odd base, modulo 2⁶⁴."""
    key_B = torch.zeros_like(token_BL[:, 0])
    for token_B in token_BL.unbind(dim=1):
        key_B = key_B * 6364136223846793005 + token_B + 1
    return key_B


def gather(own: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """All ranks' rows, in rank order; ranks with fewer rows are padded on the way, as collectives want equal shapes."""
    if world_size() == 1:
        return own
    sizes = sizes or [len(own)] * world_size()
    padded = own
    if len(own) < max(sizes):
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
    gathered = own.new_empty(len(sizes) * max(sizes), *own.shape[1:])
    ALL_GATHER(gathered, padded.contiguous())
    if min(sizes) == max(sizes):
        return gathered
    return torch.cat([rows[:size] for rows, size in zip(gathered.split(max(sizes)), sizes, strict=True)])


def world_size() -> int:
    """Ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

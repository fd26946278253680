"""Weights cut over all ranks (FSDP2): each block is brought together only while it computes.

Every parameter is cut but the temperature, which is a single number: it stays whole on each rank, and its gradient is
averaged here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pipeline.model import Towers


def shard(towers: Towers) -> None:
    """Cut the towers' weights over all ranks, in place; before the optimizer is made.

    Collective: every rank calls it.
    """
    single = {parameter for parameter in towers.parameters() if parameter.ndim == 0}
    for block in blocks(towers):
        fully_shard(block)
    fully_shard(towers, ignored_params=single)
    for name in ("encode_image", "encode_text"):  # evaluation calls these, not forward
        register_fsdp_forward_method(towers, name)


def blocks(towers: Towers) -> list[nn.Module]:
    """What is cut by itself: the elements of the towers' lists of layers, such as a transformer's blocks."""
    lists = [module for module in towers.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    inner = {id(part) for one in lists for element in one for part in element.modules() if part is not element}
    return [element for one in lists for element in one if id(element) not in inner and [*element.parameters()]]


def apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups, with what is cut and what is whole in groups of their own, as fused kernels want it."""
    return [
        {**group, "params": params}
        for group in groups
        for cut in (True, False)
        if (params := [one for one in group["params"] if isinstance(one, DTensor) is cut])
    ]


def finish_gradients(towers: Towers, clip_norm: float) -> Tensor:
    """Average the gradients of what is whole over ranks, and clip all together.

    Returns:
        () the norm of all gradients before that.

    Collective: every rank calls it.
    """
    trained = [one for one in towers.parameters() if one.grad is not None]
    parts = []
    for cut in (True, False):
        part = [one for one in trained if isinstance(one, DTensor) is cut]
        if not part:
            continue  # its norm would lie on the CPU
        if not cut:
            for one in part:
                dist.all_reduce(one.grad)
                one.grad /= dist.get_world_size()
        norm = nn.utils.get_total_norm([one.grad for one in part])
        parts.append((part, norm.full_tensor() if isinstance(norm, DTensor) else norm))
    total = torch.stack([norm for _, norm in parts]).norm()
    for part, _ in parts:
        nn.utils.clip_grads_with_norm_(part, clip_norm, total)
    return total

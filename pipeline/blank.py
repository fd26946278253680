"""Copies of towers that need not the numbers in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def blank_copy(towers: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A copy in training mode, with make(tensor) in place of each parameter and buffer, trained where those are."""
    memo: dict[int, Any] = {}
    for tensor in (*towers.parameters(), *towers.buffers()):
        blank = make(tensor)
        # deepcopy takes a tensor that it finds in its memo instead of copying one.
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return copy.deepcopy(towers, memo).train()

"""Gradients of weights that are cut over ranks, and of what is whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline import sharding


@pytest.mark.parametrize("clip_norm", [0.5, float("inf")])
def test_where_all_is_whole_or_all_is_cut_no_other_device_comes_in(monkeypatch, clip_norm):
    """With a temperature that does not learn, nothing is whole: that must not make a norm on the CPU."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    towers = nn.Linear(2, 3, device="meta")
    for parameter in towers.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert sharding.finish_gradients(towers, clip_norm).device.type == "meta"

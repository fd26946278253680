"""The two towers as modules of one input and one output, which is what exporters trace.

B = batch, S = pixels of a side, L = context length, D = embedding width.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.trained import TrainedModel


class ImageTower(nn.Module):
    """(B, 3, S, S) float32 pixels, normalised → (B, D) unit-norm."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        self.visual = towers.visual

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.visual(pixels), dim=-1)


class TextTower(nn.Module):
    """(B, L) int64 tokens → (B, D) unit-norm."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        # The same parameters, but for the image tower's: exporters write all that a module holds.
        self.towers = copy.copy(towers)
        self.towers._modules = {name: module for name, module in towers._modules.items() if name != "visual"}

    def forward(self, tokens: Tensor) -> Tensor:
        return self.towers.encode_text(tokens, normalize=True)


class Traceable(NamedTuple):
    """A tower, the name of its input, and an example of it: a batch of two, since one would be taken for a constant."""

    module: nn.Module
    input: str
    example: Tensor


def traceable(trained: TrainedModel) -> dict[str, Traceable]:
    """`image` and `text`, in evaluation mode."""
    pixel_BCSS = torch.stack([trained.preprocess(Image.new("RGB", (8, 8), color)) for color in ("red", "blue")])
    return {
        "image": Traceable(ImageTower(trained.towers).eval(), "pixels", pixel_BCSS),
        "text": Traceable(TextTower(trained.towers).eval(), "tokens", trained.tokenize(["one text", "another"])),
    }

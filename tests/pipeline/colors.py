"""A model that knows colours, and datasets in which some captions name a wrong one."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor, nn

from pipeline.trained import LoadedModel

COLORS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}


class Towers(nn.Module):
    """An image is its mean colour, a text the colour that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Parameter(torch.eye(3))

    def encode_image(self, image_BCSS: Tensor, normalize: bool = True) -> Tensor:
        return F.normalize(image_BCSS.mean(dim=(2, 3)) @ self.mixed, dim=1)

    def encode_text(self, token_BL: Tensor, normalize: bool = True) -> Tensor:
        return F.normalize(token_BL.float() @ self.mixed, dim=1)


def tokenize(texts: Sequence[str]) -> Tensor:
    return torch.tensor([COLORS[next(color for color in COLORS if color in text)] for text in texts])


def preprocess(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)


def model(batch_size: int = 4) -> LoadedModel:
    towers = Towers().eval()
    return LoadedModel("colors", "test", "colors", towers, tokenize, preprocess, batch_size, workers=0, model_cfg={})


def picture(color: str, number: int) -> bytes:
    """A PNG of a colour, with noise of its own for each number."""
    noise = np.random.default_rng(number).integers(-20, 21, (20, 24, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(COLORS[color]) + noise).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(folder: Path, rows: Sequence[tuple[str, Sequence[str]]]) -> Path:
    """A table of pictures: (colour, captions) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "other"])
        for number, (color, captions) in enumerate(rows):
            (folder / f"{number}.png").write_bytes(picture(color, number))
            writer.writerow([f"{number}.png", *captions])
    return folder / "pairs.csv"


COLUMNS = ("--image-column", "image", "--caption-column", "caption", "--caption-column", "other")

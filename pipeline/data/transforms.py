"""One sample's bytes → a uint8 crop and a text, both a function of the sample's random numbers alone.

Shapes: C = 3 channels, H and W = the image's height and width, S = the model's image size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import rgb_to_grayscale

CROP_TRIES = 10
# Random numbers that a sample may use: field, text, grayscale, then four a crop try.
UNIFORMS = 3 + 4 * CROP_TRIES


class BadSample(ValueError):  # noqa: N818 (it describes a sample, not a failure of ours)
    """A sample that cannot be used; the message is the reason."""


def decode(data: bytes) -> Tensor:
    """Encoded image → (C, H, W) uint8 RGB."""
    if not data:
        raise BadSample("no image")
    try:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise BadSample(f"undecodable image: {str(error).splitlines()[0]}") from None


def random_crop(
    image_CHW: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    interpolation: str,
    uniforms: NDArray[np.float64],
) -> Tensor:
    """A random resized crop (Szegedy et al. 2015), with torchvision's rule for area and aspect ratio.

    Args:
        image_CHW: uint8.
        size: (height, width) of the result.
        scale: range of the crop's share of the image's area.
        interpolation: `bicubic` or `bilinear`, with antialiasing.
        uniforms: (4 × CROP_TRIES,) numbers in [0, 1).

    Returns:
        (C, *size) uint8.
    """
    height, width = image_CHW.shape[-2:]
    top, left, crop_height, crop_width = crop_box(height, width, scale, uniforms)
    crop_CHW = image_CHW[:, top : top + crop_height, left : left + crop_width]
    return interpolate(crop_CHW[None], size=size, mode=interpolation, antialias=True)[0]


def maybe_grayscale(image_CSS: Tensor, share: float, uniform: float) -> Tensor:
    """The image, or where `uniform` is below `share` its luma in all three channels (ITU-R BT.601)."""
    return rgb_to_grayscale(image_CSS, num_output_channels=3) if uniform < share else image_CSS


def crop_box(
    height: int, width: int, scale: tuple[float, float], uniforms: NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop; the central one of an allowed ratio if no try fits."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area_u, ratio_u, top_u, left_u in uniforms.reshape(CROP_TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
        ratio = math.exp(low + (high - low) * ratio_u)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(top_u * (height - crop_height + 1)), int(left_u * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, round(height * 4 / 3))
    crop_height = min(height, round(width * 4 / 3))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def choose_text(parts: Mapping[str, bytes], fields: Mapping[str, float], uniforms: NDArray[np.float64]) -> str:
    """One text of a sample: a field by weight among those it has, then one of the field's texts evenly.

    A sample without `json` (another tool's tar) gives its `txt`.
    """
    try:
        record: dict[str, Any] = json.loads(parts["json"]) if "json" in parts else {}
        plain = parts.get("txt", b"").decode("utf-8")
    except (ValueError, UnicodeDecodeError) as error:
        raise BadSample(f"unreadable text: {error}") from None
    present = [(name, weight) for name, weight in fields.items() if weight > 0 and record.get(name)]
    if not present:
        if not plain.strip():
            raise BadSample("no text")
        return plain
    names, weights = zip(*present, strict=True)
    edges = np.cumsum(weights) / sum(weights)
    texts: Sequence[str] = record[names[int(np.searchsorted(edges, uniforms[0], side="right"))]]
    return texts[int(uniforms[1] * len(texts))]


def normalizer(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 (B, C, S, S) → float32 on `device`, as ToTensor and Normalize give."""
    mean_C11 = torch.tensor(mean, device=device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=device).view(-1, 1, 1)

    def normalize(image_BCSS: Tensor) -> Tensor:
        return (image_BCSS.to(device, non_blocking=True).float().div(255) - mean_C11) / std_C11

    return normalize

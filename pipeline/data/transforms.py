"""One sample's bytes → a uint8 crop and a text, both a function of the sample's random numbers alone.

Shapes: C = 3 channels, H and W = the image's height and width, S = the model's image size.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2.functional import rgb_to_grayscale

CROP_TRIES = 10
# Random numbers that a sample may use: field, text, grayscale, then four a crop try.
UNIFORMS = 3 + 4 * CROP_TRIES
# Aspect ratios that a crop may have.
RATIOS = 3 / 4, 4 / 3


# Bytes that may be read in place.
Buffer = bytes | bytearray | memoryview


class BadSample(ValueError):  # noqa: N818 (it describes a sample, not a failure of ours)
    """A sample that cannot be used; the message is the reason."""


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_fast(data: Buffer, shapes: Sequence[float], interpolation: str, out_1CSS: Tensor) -> None:
    """Decode by libjpeg-turbo, crop, and resize with antialiasing, all in uint8, straight into place.

    Decoded pixels equal Pillow's; resized ones differ by rounding: over 642 photos at 224 by .008 of 255 on average,
    by more than 1 in 27 of a million values, by 8 at the most.
    """
    image_CHW = decode(data)
    channels, full_height, full_width = image_CHW.shape
    top, left, height, width = crop_box(full_height, full_width, shapes)
    by_channel, by_row, by_column = image_CHW.stride()
    crop_1CHW = image_CHW.as_strided(
        (1, channels, height, width), (0, by_channel, by_row, by_column), top * by_row + left * by_column
    )
    RESIZE[interpolation].out(crop_1CHW, out_1CSS.shape[2:], False, None, None, out=out_1CSS)


def crop_exact(data: Buffer, shapes: Sequence[float], interpolation: str, out_1CSS: Tensor) -> None:
    """Decode, crop and resize by Pillow: the very pixels of open_clip's transform, more slowly."""
    image = _with_pillow(data)
    top, left, height, width = crop_box(image.height, image.width, shapes)
    crop = image.crop((left, top, left + width, top + height))
    resized = crop.resize((out_1CSS.shape[3], out_1CSS.shape[2]), Image.Resampling[interpolation.upper()])
    out_1CSS[0] = torch.from_numpy(np.array(resized)).permute(2, 0, 1)


# Encoded image, its `crop_shapes`, resize filter, (1, C, S, S) uint8 to write into.
CROPS: dict[str, Callable[[Buffer, Sequence[float], str, Tensor], None]] = {"fast": crop_fast, "exact": crop_exact}
# What torch.nn.functional.interpolate calls for antialias=True; called directly, it writes into memory of ours.
RESIZE: dict[str, Any] = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
}


# What torchvision.io.decode_jpeg calls, without counting its uses.
DECODE = torch.ops.image.decode_jpeg
JPEG = b"\xff\xd8\xff"
# Start-of-frame markers of a JPEG, which tell its height and width.
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# More pixels are no photo, but memory that is not there: Pillow's own limit.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)


def decode(data: Buffer) -> Tensor:
    """Encoded image → (C, H, W) uint8 RGB: JPEG by libjpeg-turbo; all else, and what it does not take, by Pillow.

    (torchvision 0.29's PNG decoder ends the process where a PNG is damaged.)
    """
    if data[:3] == JPEG:
        height, width = _jpeg_size(data)
        if height * width > MOST_PIXELS:
            raise BadSample(f"undecodable image: {height} × {width} pixels")
        try:
            return DECODE(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB.value, False)
        except RuntimeError:
            pass  # Pillow may know better; contextlib.suppress would cost each photo more
    return torch.from_numpy(np.array(_with_pillow(data))).permute(2, 0, 1)


def _jpeg_size(data: Buffer) -> tuple[int, int]:
    """(height, width) by a JPEG's headers; (0, 0) where they do not tell."""
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in FRAMES:
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return 0, 0


def _with_pillow(data: Buffer) -> Image.Image:
    if not data:
        raise BadSample("no image")
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # noqa: BLE001 (each of Pillow's formats has its own)
        raise BadSample(f"undecodable image: {str(error).partition(chr(10))[0] or type(error).__name__}") from None


def maybe_grayscale(image_1CSS: Tensor, share: float, uniform: float) -> None:
    """Where `uniform` is below `share`, put an image's luma (ITU-R BT.601) into all three channels, in place."""
    if uniform < share:
        image_1CSS.copy_(rgb_to_grayscale(image_1CSS, num_output_channels=3))


def crop_shapes(uniforms: NDArray[np.float64], scale: tuple[float, float]) -> NDArray[np.float64]:
    """Random crops (Szegedy et al. 2015) by torchvision's rule, for images of any size; several tries for each.

    Args:
        uniforms: (…, 4 × CROP_TRIES) numbers in [0, 1).
        scale: range of the crop's share of the image's area.

    Returns:
        (…, 4 × CROP_TRIES): for each try height and width, in parts of the square root of the image's area, and
        where the crop lies in what is left above and beside it.
    """
    shapes = uniforms.copy()
    low, high = map(math.log, RATIOS)
    area, ratio = (
        scale[0] + (scale[1] - scale[0]) * uniforms[..., 0::4],
        np.exp(low + (high - low) * uniforms[..., 1::4]),
    )
    shapes[..., 0::4], shapes[..., 1::4] = np.sqrt(area / ratio), np.sqrt(area * ratio)
    return shapes


def crop_box(height: int, width: int, shapes: Sequence[float]) -> Box:
    """The first of a sample's `crop_shapes` that fits an image; if none does, the central crop of an allowed ratio."""
    root = math.sqrt(height * width)
    highest, widest = (height + 0.5) / root, (width + 0.5) / root
    numbers = iter(shapes)
    for high, wide, above, beside in zip(numbers, numbers, numbers, numbers, strict=True):
        if high < highest and wide < widest:
            crop_height, crop_width = max(1, round(root * high)), max(1, round(root * wide))
            top, left = above * (height - crop_height + 1), beside * (width - crop_width + 1)
            return Box(int(top), int(left), crop_height, crop_width)
    crop_width = min(width, round(height * RATIOS[1]))
    crop_height = min(height, round(width / RATIOS[0]))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


class Texts:
    """The text members of a sample, empty where there is none, read once: which text, and of which image.

    A sample without `json`, or with one that has no such fields (another tool's tar), gives its `txt`.

    Raises:
        BadSample: a member cannot be read.
    """

    def __init__(self, txt: Buffer, record: Buffer) -> None:
        self._txt = txt
        try:
            found = json.loads(str(record, "utf-8")) if record else {}
        except ValueError as error:
            raise BadSample(f"unreadable text: {error}") from None
        self._record: dict[str, Any] = found if isinstance(found, dict) else {}

    def choose(self, fields: Mapping[str, float], field_u: float, text_u: float) -> str:
        """One text: a field by weight among those that the sample has, then one of the field's texts evenly."""
        present = [(texts, weight) for name, weight in fields.items() if weight > 0 and (texts := self._texts(name))]
        if not present:
            return self._plain()
        left, chosen = field_u * sum(weight for _, weight in present), -1
        while left >= 0:
            chosen += 1
            left -= present[chosen][1]
        texts = present[chosen][0]
        return str(texts[int(text_u * len(texts))])

    def image_number(self, image: Buffer) -> int:
        """64 bits that tell the photo from others: of its id, or where the record has none, of its bytes."""
        known = self._record.get("image_id") or self._record.get("sha256")
        digest = hashlib.blake2b(str(known).encode() if known else image, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def _texts(self, field: str) -> list[Any]:
        texts = self._record.get(field)
        return texts if isinstance(texts, list) else []

    def _plain(self) -> str:
        try:
            text = str(self._txt, "utf-8")
        except ValueError as error:
            raise BadSample(f"unreadable text: {error}") from None
        if not text.strip():
            raise BadSample("no text")
        return text


def normalizer(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 (B, C, S, S) → float32 on `device`, as ToTensor and Normalize give."""
    mean_C11 = torch.tensor(mean, device=device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=device).view(-1, 1, 1)

    def normalize(image_BCSS: Tensor) -> Tensor:
        return image_BCSS.to(device, non_blocking=True).float().div_(255).sub_(mean_C11).div_(std_C11)

    return normalize

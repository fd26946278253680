"""How an encoded image becomes a tower's input: a uint8 crop in a loader process, floats for a batch on the device.

`exact` has the very pixels of open_clip's transform, by Pillow. `fast` decodes JPEG by libjpeg-turbo and resizes in
uint8, as training does; its pixels differ from the exact ones by rounding.
Shapes: B images, C = 3 channels, H and W = an image's height and width, S = the tower's image size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.transform import MaybeToTensor
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from pipeline.data.transforms import RESIZE, BadSample, decode, normalizer
from pipeline.evaluate.sets import EvaluationError, Item

# A PIL image → (C, S, S) float32.
Preprocess = Callable[[Image.Image], Tensor]
# Pixels beyond a crop's edge that a resize filter reads: bicubic's two, and one for rounding.
REACH = 3


class Pixels(NamedTuple):
    """The two halves of a transform.

    Attributes:
        crop: an item → (C, S, S), uint8 where the transform ends as open_clip's do, else float32.
        finish: (B, C, S, S) of those, anywhere → float32 on the device.
    """

    crop: Callable[[Item], Tensor]
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fast:
    """Resize the shorter side to S and crop the centre; normalise.

    Attributes:
        size: S.
        interpolation: of RESIZE.
        mean: of each channel, of values from 0 to 1.
        std: so too.
    """

    size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture that is decoded already → (C, S, S) float32."""
        image_CHW = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return normalizer(self.mean, self.std, torch.device("cpu"))(self.resized(image_CHW))

    def of_item(self, item: Item) -> Tensor:
        """(C, S, S) uint8.

        Raises:
            EvaluationError: it does not decode.
        """
        try:
            return self.resized(decode(bytearray(item.read())))
        except BadSample:
            item.open()  # says what is wrong
            raise

    def resized(self, image_CHW: Tensor) -> Tensor:
        """(C, S, S) uint8, of sides and a crop that are rounded as torchvision's Resize and CenterCrop round them."""
        sides = image_CHW.shape[1:]
        long = [self.size * side // min(sides) for side in sides]
        first = [round((side - self.size) / 2) for side in long]
        scales = [side / new for side, new in zip(sides, long, strict=True)]
        # What lies below the crop, or right of it, is not computed; above and left it would shift the grid.
        ends = [begin + self.size for begin in first]
        read = [math.ceil(end * scale + REACH * max(scale, 1)) for end, scale in zip(ends, scales, strict=True)]
        part_1CHW = image_CHW[None, :, : read[0], : read[1]]
        done = RESIZE[self.interpolation](part_1CHW, ends, False, *(1 / scale for scale in scales))
        resized_CSS: Tensor = done[0, :, first[0] :, first[1] :]
        return resized_CSS


@dataclass(frozen=True)
class Exact:
    """A transform's own steps until a picture becomes numbers; a class, so that loader processes can be sent it."""

    steps: Preprocess

    def of_item(self, item: Item) -> Tensor:
        return self.steps(item.open())

    def as_uint8(self, item: Item) -> Tensor:
        return torch.from_numpy(np.array(self.steps(item.open()))).permute(2, 0, 1)


def pixels(preprocess: Preprocess, device: torch.device) -> Pixels:
    """The halves of a transform, which together give, bit for bit, what it gives."""
    if isinstance(preprocess, Fast):
        return Pixels(preprocess.of_item, normalizer(preprocess.mean, preprocess.std, device))
    steps = preprocess.transforms if isinstance(preprocess, Compose) else []
    if len(steps) > 1 and isinstance(steps[-2], MaybeToTensor | ToTensor) and isinstance(steps[-1], Normalize):
        # In loader processes this would take a third of the time, and four times the bytes to send.
        return Pixels(Exact(Compose(steps[:-2])).as_uint8, normalizer(steps[-1].mean, steps[-1].std, device))
    return Pixels(Exact(preprocess).of_item, lambda image_BCSS: image_BCSS.to(device))


def faster(preprocess: Preprocess) -> Fast:
    """The fast form of a transform.

    Raises:
        EvaluationError: it is of another kind.
    """
    steps: list[Any] = list(preprocess.transforms) if isinstance(preprocess, Compose) else [preprocess]
    kinds = [type(step) for step in steps]
    if kinds[:2] == [Resize, CenterCrop] and kinds[-1] is Normalize and isinstance(size := steps[0].size, int):
        names = {InterpolationMode.BICUBIC: "bicubic", InterpolationMode.BILINEAR: "bilinear"}
        interpolation = names.get(steps[0].interpolation)
        if interpolation and tuple(steps[1].size) == (size, size):
            return Fast(size, interpolation, tuple(steps[-1].mean), tuple(steps[-1].std))
    raise EvaluationError(
        "--transform fast resizes the shorter side and crops a square from the centre, bicubically or bilinearly. This "
        f"model takes its images otherwise: {', '.join(map(str, steps))}. Use --transform exact."
    )


# What --transform and evaluate.transform name.
TRANSFORMS: dict[str, Callable[[Preprocess], Preprocess]] = {"exact": lambda preprocess: preprocess, "fast": faster}


def transformed(name: str, preprocess: Preprocess) -> Preprocess:
    """A model's own transform in the form of this name.

    Raises:
        EvaluationError: there is no such form, or none of this transform.
    """
    if name not in TRANSFORMS:
        raise EvaluationError(f"--transform {name} is not known. Choose {' or '.join(TRANSFORMS)}.")
    return TRANSFORMS[name](preprocess)


def name_of(preprocess: Preprocess) -> str:
    """Which of TRANSFORMS made it."""
    return "fast" if isinstance(preprocess, Fast) else "exact"

"""Where transformers treats images and texts otherwise than open_clip does, so that it is measured and told.

Shapes: B images, S side of the square that the model takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from open_clip.tokenizer import get_clean_fn


def unchanged(texts: Sequence[str]) -> NDArray[np.bool_]:
    """Which texts open_clip's cleaning (ftfy, HTML's entities) leaves as they are, but for blanks: (B,)."""
    clean = get_clean_fn("whitespace")
    return np.array([clean(text) == " ".join(text.split()) for text in texts], dtype=bool)


def measure_pixels(
    ours_BCSS: NDArray[Any], theirs_BCSS: NDArray[Any], sizes: Sequence[tuple[int, int]]
) -> dict[str, float | int]:
    """How far apart normalised pixels are.

    Args:
        ours_BCSS: open_clip's.
        theirs_BCSS: CLIPImageProcessor's, of Pillow.
        sizes: (width, height) of the images that both are of.

    Returns:
        max_abs_pixels over those images whose crop falls alike; images_cropped_apart, how many do not.
    """
    side = ours_BCSS.shape[-1]
    alike_B = np.array([_crops_alike(size, side) for size in sizes], dtype=bool)
    if ours_BCSS.shape != theirs_BCSS.shape:
        return {"max_abs_pixels": np.inf, "images_cropped_apart": 0}
    apart_B = np.abs(ours_BCSS - theirs_BCSS).max(axis=(1, 2, 3), initial=0.0)
    return {
        "max_abs_pixels": float(apart_B[alike_B].max(initial=0.0)),
        "images_cropped_apart": int((~alike_B).sum()),
    }


def _crops_alike(size: tuple[int, int], side: int) -> bool:
    """torchvision rounds half a pixel to even, transformers down: one remainder of four tells them apart."""
    return (int(side * max(size) / min(size)) - side) % 4 != 3

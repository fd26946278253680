"""Prepares what lies in another folder by an export's preprocess.json and tokenizer: python FILE FOLDER INPUTS.

Run as a script in a process of its own, with Pillow, numpy and the tokenizer's library only; see parity.compare. It
does what the model card shows.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def main(folder: Path, inputs: Path) -> None:
    """Make pixels of the images and tokens of texts.json."""
    known = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
    images = [Image.open(path) for path in sorted(inputs.glob("*.png"))]
    texts = json.loads((inputs / "texts.json").read_text(encoding="utf-8"))
    found: dict[str, NDArray[Any]] = {
        "pixels": np.stack([pixels_of(image, **known["image"]) for image in images]),
        "tokens": tokens_of([" ".join(text.split()) for text in texts], folder, **known["text"]),
        "logits": np.array([math.log(known["logits"]["scale"]), known["logits"]["bias"]]),
    }
    np.savez(inputs / "found.npz", allow_pickle=False, **found)


def pixels_of(
    image: Image.Image,
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    resize_mode: str,
) -> NDArray[Any]:
    """(3, height, width): resized to cover the size, the centre cut out, normalised."""
    assert resize_mode == "shortest"
    height, width = size
    if height == width:
        sides = [int(height * side / min(image.size)) for side in image.size]
    else:
        ratio = min(image.width / width, image.height / height)
        sides = [round(side / ratio) for side in image.size]
    image = image.resize((sides[0], sides[1]), Image.Resampling[interpolation.upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / np.float32(255)
    return ((pixels - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)


def tokens_of(
    texts: Sequence[str],
    folder: Path,
    tokenizer: str,
    context_length: int,
    pad_id: int,
    end_id: int,
    start_id: int | None = None,
) -> NDArray[np.int64]:
    """(B, context length) ids: start, pieces, end, padding."""
    if tokenizer == "sentencepiece.model":
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / tokenizer)).encode(texts)
        rows = [[start_id, *ids[: context_length - 2], end_id] for ids in pieces]
    else:
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / tokenizer))
        fast.enable_truncation(context_length)
        rows = [fast.encode(text).ids for text in texts]
    return np.array([ids + [pad_id] * (context_length - len(ids)) for ids in rows], np.int64)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

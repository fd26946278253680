"""Pictures that are made up, with captions that tell them apart, as tars that can be trained on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SHARD = 512
COLOURS = {"red": (200, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 200), "yellow": (220, 200, 50)}
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


def write_pictures(folder: Path, count: int, pixels: int) -> None:
    """`count` noisy pictures of a coloured square in a corner on another colour, in tars of SHARD.

    Args:
        folder: gets 00000.tar …, and sizes.json as open_clip has it.
        count: of pictures.
        pixels: of a side.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    kinds = [(front, back, place) for front in COLOURS for back in COLOURS if front != back for place in PLACES]
    sizes: dict[str, int] = {}
    for first in range(0, count, SHARD):
        name = f"{first // SHARD:05d}.tar"
        numbers = range(first, min(first + SHARD, count))
        sizes[name] = len(numbers)
        with tarfile.open(folder / name, "w") as tar:
            for number in numbers:
                front, back, place = kinds[number % len(kinds)]
                row, column = (part * pixels // 2 for part in PLACES[place])
                image_SSC = np.full((pixels, pixels, 3), COLOURS[back], np.int16)
                image_SSC[row : row + pixels // 2, column : column + pixels // 2] = COLOURS[front]
                image_SSC += random.integers(-20, 20, image_SSC.shape, dtype=np.int16)
                encoded = io.BytesIO()
                Image.fromarray(image_SSC.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
                text = f"a {front} square, {place}, on {back}"
                members = {
                    "jpg": encoded.getvalue(),
                    "txt": text.encode(),
                    "json": json.dumps({"captions": [text]}).encode(),
                }
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")

"""Small tars with real JPEGs in them, as data_prep and img2dataset lay them out."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.manifest import Shard, Shards
from pipeline.data.tars import TarSet


def picture(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A JPEG of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """A sample: its picture, its first caption, and all of them."""
    captions = [f"picture {number}", f"number {number} seen again"]
    return {
        f"{number:09d}.jpg": picture(number),
        f"{number:09d}.txt": captions[0].encode(),
        f"{number:09d}.json": json.dumps({"captions": captions, "image_id": f"test:{number}"}).encode(),
    }


def write_tar(path: Path, content: Mapping[str, bytes]) -> Path:
    """A tar with these members, whose bytes depend on nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Tars of so many samples each, numbered through."""
    starts = np.cumsum([0, *sizes])
    return [
        write_tar(
            folder / f"{shard:05d}.tar",
            {name: data for number in range(start, start + size) for name, data in members(number).items()},
        )
        for shard, (start, size) in enumerate(zip(starts.tolist(), sizes, strict=False))
    ]


def sealed(folder: Path, sizes: Sequence[int], address: str | None = None) -> TarSet:
    """Tars with hashes, as a manifest would list them; reached by `address` if it is given."""
    shards = []
    for path, size in zip(write_tars(folder, sizes), sizes, strict=True):
        data = path.read_bytes()
        shards.append(Shard("train", path.name, len(data), hashlib.sha256(data).hexdigest(), size, size))
    table = Shards.of(shards)
    return TarSet(address or str(folder), table, (), table.fingerprint())

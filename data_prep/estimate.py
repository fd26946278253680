"""What a build will take, said before it begins: from a few of its images, made once for the measure."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from data_prep.images import BadImage, prepare
from data_prep.locations import is_local, read_bytes
from data_prep.record import DataError, Record

MEASURED = 16
# A tar's header and padding, and the json and txt members with theirs, for an image.
OVERHEAD_BYTES = 4096


def estimate(records: Iterable[Record], images: int, out: Path, resize: int | None, workers: int) -> str:
    """How much disk and time `images` like the first of `records` will take, as a sentence; what an earlier build, or
    parts of this one, left in `out` takes neither again.

    Raises:
        DataError: the disk of `out` has less room than that.
    """
    sizes, began = [], time.perf_counter()
    for record in itertools.islice(records, MEASURED):
        try:
            sizes.append(len(prepare(read_bytes(record.path, record.span), resize).data) + OVERHEAD_BYTES)
        except (BadImage, OSError, ValueError):
            sizes.append(0)
    seconds = (time.perf_counter() - began) / max(len(sizes), 1) * images / workers
    needed = sum(sizes) / max(len(sizes), 1) * images
    if not is_local(out):
        return f"{images:,} images: about {needed / 1e9:.2f} GB and {seconds / 60:.0f} minutes"
    made = sum(tar.stat().st_size for pattern in ("train/*.tar", "eval/*/*/*.tar") for tar in out.glob(pattern))
    missing = max(needed - made, 0)
    seconds *= missing / max(needed, 1)
    said = f"{images:,} images: about {needed / 1e9:.2f} GB{f', {made / 1e9:.2f} GB of it there,' if made else ''}"
    said += f" and {seconds / 60:.0f} minutes"
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if missing > free:
        raise DataError(
            f"{out}: {said}, but {free / 1e9:.2f} GB are free there. Choose another --out, or --resize 256."
        )
    return f"{said}; {free / 1e9:.0f} GB are free"

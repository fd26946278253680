"""Existing tars, WebDataset's or img2dataset's, on this machine or behind an address, to be sharded anew.

    PATH/*.tar or PATH/*/*.tar, or one tar
    KEY.jpg|jpeg|png|webp + KEY.txt + KEY.json

A sample's captions are its json's `captions`, its `caption`, or its txt. Ids of photos that `json` knows are kept.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_prep.locations import open_file
from data_prep.record import DataError, Record, sample_id

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")
# A longer text member is no caption and no record of an image.
MAX_TEXT_BYTES = 1_000_000
END_OF_ARCHIVE = bytes(1024)

# A member: (first byte, number of bytes) of an image, or a text's content.
Sample = dict[str, tuple[int, int] | bytes]


def read(root: Path, options: object = None) -> Iterator[Record]:
    """Yield one Record a sample that has an image, tar by tar, in the order of the tars.

    Raises:
        DataError: no tar, one that is cut off or damaged, or a sample whose json cannot be read.
    """
    tars = [root] if root.suffix == ".tar" else sorted([*root.glob("*.tar"), *root.glob("*/*.tar")])
    if not tars:
        raise DataError(f"{root}: looked for *.tar and */*.tar and found none.")
    for tar in tars:
        for key, sample in _samples(tar):
            span = next((sample[extension] for extension in IMAGES if extension in sample), None)
            if not isinstance(span, tuple):
                continue
            about = _about(tar, key, sample)
            yield Record(
                image_id=sample_id(tar, key, about),
                source="webdataset",
                path=tar,
                span=span,
                captions=_captions(about, sample),
                questions=tuple(about.get("questions") or ()),
                license=about.get("license"),
                undivided=True,
            )


def _about(tar: Path, key: str, sample: Sample) -> dict[str, Any]:
    try:
        found = json.loads(sample["json"]) if isinstance(sample.get("json"), bytes) else {}  # type: ignore[arg-type]
    except ValueError as error:
        raise DataError(f"{tar}: {key}.json is not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise DataError(f"{tar}: {key}.json is not a JSON object.")
    return found


def _captions(about: dict[str, Any], sample: Sample) -> tuple[str, ...]:
    if isinstance(about.get("captions"), list):
        return tuple(str(text) for text in about["captions"])
    if about.get("caption"):
        return (str(about["caption"]),)
    text = sample.get("txt")
    return (text.decode("utf-8", "replace"),) if isinstance(text, bytes) else ()


def _samples(path: Path) -> Iterator[tuple[str, Sample]]:
    """(key, members) of a tar, the members of a sample being neighbours as WebDataset wants them."""
    with open_file(path) as file:
        key, sample = "", Sample()
        for name, first, size in _members(path, file):
            stem, _, extension = name.rpartition("/")[2].partition(".")
            base = f"{name.rpartition('/')[0]}/{stem}".lstrip("/")
            if base != key:
                if sample:
                    yield key, sample
                key, sample = base, {}
            extension = extension.lower()
            if extension in sample:
                raise DataError(f"{path}: {name} is there twice.")
            if extension in IMAGES:
                sample[extension] = (first, size)
            elif extension in TEXTS and size <= MAX_TEXT_BYTES:
                here = file.tell()
                file.seek(first)
                sample[extension] = file.read(size)
                file.seek(here)
        if sample:
            yield key, sample


def _members(path: Path, file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, number of bytes) of each regular file; links and devices are passed over.

    tarfile takes a damaged header for the end, so the real end is looked for.
    """
    length = file.seek(0, 2)
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.size < 0 or end > length:
                    raise DataError(f"{path}: {member.name} ends behind the file's end. It was cut off or damaged.")
                if member.isreg():
                    yield member.name, member.offset_data, member.size
                end = max(end, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise DataError(f"{path}: not a readable tar ({error}).") from None
    file.seek(end)
    if file.read(len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
        raise DataError(f"{path}: no end of archive after byte {end}. It was cut off or damaged.")

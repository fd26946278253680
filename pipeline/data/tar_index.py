"""Where the samples of a tar lie, from its headers alone: 512 bytes a member, and none of what the members hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.record import DataError

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Members of a sample, by the row of its places.
IMAGE, TXT, JSON = range(3)
# Longest extended header (PAX or GNU) that is believed.
MAX_EXTENDED = 1 << 20

# (samples, 3, 2): first block of 512 bytes, and bytes, of the image, of `txt` and of `json`; all 0 where there is none.
Places = NDArray[np.uint32]


class ShardError(DataError):
    """A shard that is missing, damaged, or not the one that was listed."""


class TarIndex(NamedTuple):
    """The samples of a tar in order, and how many members were neither image nor text."""

    places: Places
    ignored: int


def read_index(read: Callable[[int, int], bytes], size: int, name: str) -> TarIndex:
    """Find the samples of a tar by webdataset's rule: a sample's key ends at the first dot of the file's name.

    A member whose extension is neither an image's nor a text's is skipped, whatever it holds.

    Args:
        read: (offset, bytes) → what is there; less at the end of the file.
        size: of the file, in bytes.
        name: for messages.

    Raises:
        ShardError: the headers are not those of a whole tar.
    """
    samples: dict[str, list[int]] = {}
    ignored, offset = 0, 0
    extended: dict[str, str] = {}
    while True:
        header = bytes(read(offset, BLOCK))
        if len(header) == BLOCK and not any(header):
            return TarIndex(np.array(list(samples.values()), np.uint32).reshape(-1, 3, 2), ignored)
        try:
            member, length = _member(header, extended)
        except (ValueError, UnicodeDecodeError) as error:
            raise ShardError(f"{name}: no tar header at byte {offset} ({error}). The shard is damaged.") from None
        kind, data = header[156:157], offset + BLOCK
        offset = data + -(-length // BLOCK) * BLOCK
        if offset > size:
            raise ShardError(f"{name}: {member} ends at byte {offset}, the file at {size}. The shard is cut off.")
        if kind in b"xL":
            if length > MAX_EXTENDED:
                raise ShardError(f"{name}: an extended header of {length} bytes at byte {data}. The shard is damaged.")
            extended |= _extended(bytes(read(data, length)), kind)
            continue
        extended = {}
        if kind not in (b"0", b"\0", b"7"):
            continue
        folder, _, file = member.rpartition("/")
        stem, _, extension = file.partition(".")
        row = _row(extension.lower())
        if row is None or length >> 32:
            ignored += 1
            continue
        places = samples.setdefault(f"{folder}/{stem}", [0] * 6)
        if not places[2 * row]:  # of two images the first
            places[2 * row : 2 * row + 2] = data // BLOCK, length


def key_at(header: bytes) -> str:
    """The key of the sample that a member belongs to, from the block before its data."""
    return header[:100].rstrip(b"\0").decode("utf-8", "replace").rpartition("/")[2].partition(".")[0]


def _row(extension: str) -> int | None:
    return IMAGE if extension in IMAGE_EXTENSIONS else {"txt": TXT, "json": JSON}.get(extension)


def _member(header: bytes, extended: dict[str, str]) -> tuple[str, int]:
    """(name, bytes) of the member that a header announces."""
    if len(header) < BLOCK:
        raise ValueError("the file ends")
    # The checksum counts its own field as blanks; historic tars summed signed bytes, which no image tool wrote.
    if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156]):
        raise ValueError("wrong checksum")
    name = extended.get("path") or header[:100].split(b"\0", 1)[0].decode("utf-8")
    prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8") if header[257:263] == b"ustar\0" else ""
    length = int(extended["size"]) if "size" in extended else _number(header[124:136])
    if length < 0:
        raise ValueError(f"{length} bytes")
    return f"{prefix}/{name}" if prefix and "path" not in extended else name, length


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for what they cannot hold."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _extended(data: bytes, kind: bytes) -> dict[str, str]:
    """`path` and `size` of the next member, from a PAX header (lines "LENGTH KEY=VALUE") or a GNU long name."""
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "replace")}
    found: dict[str, str] = {}
    while data and data[:1] != b"\0":
        length = data.split(b" ", 1)[0]
        if not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].decode("utf-8", "replace").partition("=")
        if key == "path" or (key == "size" and value.isdigit()):
            found[key] = value
        data = data[int(length) :]
    return found

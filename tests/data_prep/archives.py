"""Archives for tests of downloads, and what became of them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

from data_prep.download import Archive

WAIT_S = 60


def zipped(members: dict[str, bytes | str]) -> bytes:
    """A zip that compresses nothing; names that end in a slash are folders."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size)


def deflated(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
    return buffer.getvalue()


def archive(url: str, content: bytes, *, name: str = "a.zip", **changes: object) -> Archive:
    known = {"bytes": len(content), "digest": f"sha256:{hashlib.sha256(content).hexdigest()}"} | changes
    return Archive(url, name=name, **known)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PHOTOS = {"train/": b"", "train/1.jpg": noise(400_000), "train/2.jpg": noise(300_000, 1), "captions.json": b"[]"}
FILES = {name: content for name, content in PHOTOS.items() if content}
ZIP = zipped(PHOTOS)

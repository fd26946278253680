"""Evaluation sets in CLIP_benchmark's layout, read from their tars: SET/test/nshards.txt, SET/test/0.tar …"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data_prep.record import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SHARDS = "nshards.txt"
CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


class EvaluationError(DataError):
    """An evaluation set that cannot be measured."""


class Located(Protocol):
    """What lies in a folder."""

    @property
    def path(self) -> Path: ...


@dataclass(frozen=True)
class Item:
    """One image: where its bytes lie, and what is said of it.

    Attributes:
        file, offset, size: of the encoded image, within a tar or by itself.
        label: class index; -1 outside classification.
        captions: a line each of `txt`; empty in classification.
        record: the sample's `json`; empty where there is none.
    """

    key: str
    file: Path
    offset: int
    size: int
    label: int = -1
    captions: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Tells its pixels from others': the bytes' sha256 where it is known, else where and when they were written."""
        known = self.record.get("sha256")
        return f"{known or f'{self.file.resolve()} {self.offset} {self.file.stat().st_mtime_ns}'} {self.size}"

    def read(self) -> bytes:
        """The encoded image."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self) -> Image.Image:
        """The picture as RGB, read when asked for.

        Raises:
            EvaluationError: it does not decode.
        """
        encoded = self.read()
        try:
            return Image.open(io.BytesIO(encoded)).convert("RGB")
        except Exception as error:  # noqa: BLE001 (each of Pillow's formats has its own)
            raise EvaluationError(
                f"{self.file}: image {self.key} does not decode ({error}). Restore the file from a copy; of a dataset "
                "that we built, `python -m data_prep verify` says which files are not as they were written."
            ) from None


def read(source: Located, split: str = "test") -> list[Item]:
    """All items of a set's split, in order, without their pictures.

    Raises:
        EvaluationError: a tar is missing or broken, or the set is empty.
    """
    folder = source.path / split
    try:
        shards = int((folder / SHARDS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{folder / SHARDS}: looked for the number of tars here: {error}.") from None
    items = [item for number in range(shards) for item in read_tar(folder / f"{number}.tar")]
    if not items:
        raise EvaluationError(f"{folder}: holds no image. Build the dataset again.")
    return items


def read_tar(path: Path) -> list[Item]:
    """The items of one uncompressed tar, in order; an evaluation set's or a train shard.

    Raises:
        EvaluationError: it is missing or broken, a `cls` is no integer, or a `json` does not parse.
    """
    try:
        return [item for parts in _members(path) if (item := parts.item(path)) is not None]
    except (OSError, ValueError, tarfile.TarError) as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error}). Check it with `python -m data_prep verify`."
        ) from None


def class_names(source: Located) -> list[str]:
    """The names of a classification set, by label."""
    return lines(source.path / CLASS_NAMES)


def templates(source: Located) -> list[str]:
    """The prompts of a classification set, `{c}` standing for the class name."""
    return read_templates(source.path / TEMPLATES)


def read_templates(path: Path) -> list[str]:
    """The prompts in a file, one a line, `{c}` or `{}` standing for the class name; returned with `{c}`.

    Raises:
        EvaluationError: one has neither, or the file is missing or has an empty line.
    """
    found = [line if "{c}" in line else line.replace("{}", "{c}") for line in lines(path)]
    if wrong := [line for line in found if "{c}" not in line]:
        raise EvaluationError(f"{path}: the template {wrong[0]!r} lacks {{c}}, where the class name goes.")
    return found


def lines(path: Path) -> list[str]:
    """The entries of a file, one a line.

    Raises:
        EvaluationError: it is not there, or one is empty.
    """
    if not path.is_file():
        raise EvaluationError(
            f"{path}: looked for this file and found none. A set that we built lacks it only when damaged: build it "
            "again. For others, --classnames and --templates name them."
        )
    found = [line.strip() for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    if "" in found:
        raise EvaluationError(f"{path}: line {found.index('') + 1} is empty; each line stands for one entry, in order.")
    return found


@dataclass
class _Parts:
    """The members of a tar that share a key."""

    key: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)

    def item(self, tar: Path) -> Item | None:
        place = next((self.images[extension] for extension in IMAGE_EXTENSIONS if extension in self.images), None)
        if place is None:
            return None
        captions = self.texts.get("txt", b"").decode("utf-8").split("\n")
        label = int(self.texts.get("cls", b"-1"))
        record = json.loads(self.texts.get("json", b"{}"))
        lines = tuple(line for line in captions if line.strip())
        return Item(self.key, tar, *place, label, lines, record if isinstance(record, dict) else {})


def _members(path: Path) -> Iterator[_Parts]:
    by_key: dict[str, _Parts] = {}
    with tarfile.open(path, "r:") as tar:  # "r:": a compressed tar has no offsets to read from later
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            parts = by_key.setdefault(key, _Parts(key))
            if extension in IMAGE_EXTENSIONS:
                parts.images[extension] = (member.offset_data, member.size)
            elif extension in ("txt", "cls", "json") and (content := tar.extractfile(member)):
                parts.texts[extension] = content.read()
    return iter(by_key.values())

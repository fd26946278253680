"""Evaluation sets in CLIP_benchmark's layout, read from their tars: SET/test/nshards.txt, SET/test/0.tar …"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_prep.manifest import EvaluationSet
from data_prep.record import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class EvaluationError(DataError):
    """An evaluation set that cannot be measured."""


@dataclass(frozen=True)
class Item:
    """One image of a set: its bytes, and what the set says of it.

    Attributes:
        label: class index; -1 outside classification.
        captions: a line each of `txt`; empty in classification.
    """

    key: str
    image: bytes
    label: int
    captions: tuple[str, ...]

    def open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.image)).convert("RGB")


def read(source: EvaluationSet) -> list[Item]:
    """All items of a set, in order; the encoded images stay in memory, the pixels do not.

    Raises:
        EvaluationError: a tar is missing or broken, or the set is empty.
    """
    folder = source.path / "test"
    try:
        shards = int((folder / "nshards.txt").read_text(encoding="utf-8"))
        items = [item for number in range(shards) for item in _read_tar(folder / f"{number}.tar")]
    except (OSError, ValueError, tarfile.TarError) as error:
        raise EvaluationError(
            f"{folder}: cannot be read ({error}). Check it with `python -m data_prep verify`."
        ) from None
    if not items:
        raise EvaluationError(f"{folder}: holds no image.")
    return items


def class_names(source: EvaluationSet) -> list[str]:
    """The names of a classification set, by label."""
    return _lines(source.path / "classnames.txt")


def templates(source: EvaluationSet) -> list[str]:
    """The prompts of a classification set, `{c}` standing for the class name."""
    found = _lines(source.path / "zeroshot_classification_templates.txt")
    if wrong := [line for line in found if "{c}" not in line]:
        raise EvaluationError(f"{source.path}: the template {wrong[0]!r} lacks {{c}}, where the class name goes.")
    return found


def _read_tar(path: Path) -> Iterator[Item]:
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                key, _, extension = member.name.partition(".")
                parts.setdefault(key, {})[extension] = file.read()
    for key, members in parts.items():
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is not None:
            captions = members.get("txt", b"").decode("utf-8").split("\n")
            yield Item(key, image, int(members.get("cls", b"-1")), tuple(line for line in captions if line))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise EvaluationError(f"{path}: looked for this file and found none.")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line]

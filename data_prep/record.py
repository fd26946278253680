"""Record: one image, all its texts, where it came from. What every source yields and every later step takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TRAIN = "train"

Kind = Literal["classification", "retrieval", "vqa", "selection"]


class DataError(Exception):
    """Something about data, files or settings that the user must change: what, the value found, the fix."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set that a source declares; its records name it as their split.

    Attributes:
        name: such as `flickr30k_test`.
        kind: what is measured on it. In `selection`, an image's first caption is right and the others are wrong.
        class_names: of a classification set, by label.
        templates: prompts of a classification set, `{c}` standing for the class name.
    """

    name: str
    kind: Kind
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One image with all its texts, as the dataset gives them.

    Attributes:
        image_id: the photo, whichever dataset shows it: `coco:391895`, `flickr:1000092795`, or `SOURCE:NAME`.
        source: the reader's name.
        path: the file of the image.
        span: (first byte, number of bytes) of the image in that file, where it lies in a larger one.
        evaluation: the held-out set that it belongs to; None for training.
        captions: uncleaned.
        questions: each with question_id, question, question_type, answers, answer_type, multiple_choice_answer.
        license: the dataset's licence id of the image.
        label: class index, in a classification set.
        also_known_as: further ids of the same photo, such as a COCO photo's on Flickr.
        undivided: its dataset has no splits, so that a part of it may be held out by lot.
    """

    image_id: str
    source: str
    path: Path
    evaluation: Evaluation | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[Mapping[str, Any], ...] = ()
    license: int | str | None = None
    label: int | None = None
    also_known_as: tuple[str, ...] = ()
    span: tuple[int, int] | None = None
    undivided: bool = False

    @property
    def split(self) -> str:
        """`train`, or the evaluation set's name."""
        return self.evaluation.name if self.evaluation else TRAIN

    @property
    def ids(self) -> tuple[str, ...]:
        """Every id by which this photo may be known elsewhere."""
        return (self.image_id, *self.also_known_as)


def sample_id(tar: Path, key: str, about: Mapping[str, Any]) -> str:
    """The image id of a sample in another tool's tar: the one in its `json`, else one of where it lies."""
    return str(about.get("image_id") or f"webdataset:{tar.stem}/{key}")

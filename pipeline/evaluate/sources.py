"""Where evaluation sets are found: a dataset of ours, a folder in CLIP_benchmark's layout, or class folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep import manifest
from data_prep.locations import exists
from pipeline.evaluate import image_folder, sets
from pipeline.evaluate.sets import EvaluationError, Item


@dataclass(frozen=True)
class Source:
    """An evaluation set that has not been read yet.

    Attributes:
        name: what results call it.
        kind: what is measured on it.
        path: its folder.
        split: the folder below it that has its tars; empty where its images lie in class folders.
        classes: names instead of its own, by label; empty for its own.
        prompts: templates instead of its own; empty for its own.
        answers: candidates for a VQA set, instead of those of its dataset's train split; empty for those.
    """

    name: str
    kind: str
    path: Path
    split: str = "test"
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def items(self) -> list[Item]:
        """Its images, in order, without their pictures.

        Raises:
            EvaluationError: it is damaged or empty, or its class folders do not fit the classes' names.
        """
        return sets.read(self, self.split) if self.split else image_folder.read(self.path, self.class_names())

    def class_names(self) -> tuple[str, ...]:
        """The names of a classification set, by label.

        Raises:
            EvaluationError: it has none, or others were given and are not as many.
        """
        if not self.split:
            return self.classes or image_folder.class_names(self.path)
        own = () if self.classes and not (self.path / sets.CLASS_NAMES).is_file() else tuple(sets.class_names(self))
        if self.classes and own and len(self.classes) != len(own):
            raise EvaluationError(
                f"{self.path / sets.CLASS_NAMES}: has {len(own)} classes, and {len(self.classes)} names were given. "
                "There must be one for each, in the same order."
            )
        return self.classes or own

    def templates(self) -> tuple[str, ...]:
        """The prompts of a classification set, `{c}` standing for the class name.

        Raises:
            EvaluationError: it has none.
        """
        if self.prompts:
            return self.prompts
        return tuple(sets.templates(self)) if self.split else image_folder.templates(self.path)


def find(data: Path) -> list[Source]:
    """The sets that are there.

    Args:
        data: a dataset of ours; or a set in CLIP_benchmark's layout (DATA/test/nshards.txt), whose kind is said by
            DATA/dataset_type.txt, else classification; or a folder of class folders (DATA/CLASS/*.jpg).

    Raises:
        DataError: none of them, or a dataset that is unfinished or damaged.
    """
    if any(exists(data / name) for name in (manifest.MANIFEST, manifest.SEAL, manifest.SHARDS, manifest.REMOVAL)):
        return [Source(one.name, one.kind, one.path) for one in manifest.read(data).evaluation_sets]
    name = data.resolve().name
    if (data / "test" / sets.SHARDS).is_file():
        kind = data / "dataset_type.txt"
        said = kind.read_text(encoding="utf-8").strip().lower() if kind.is_file() else "classification"
        return [Source(name, said, data)]
    if image_folder.is_one(data):
        return [Source(name, "classification", data, split="")]
    raise EvaluationError(
        f"{data}: looked for a dataset ({manifest.MANIFEST}), one set in CLIP_benchmark's layout (test/{sets.SHARDS}), "
        "or class folders with images (CLASS/*.jpg, .png or .webp), and found none of them. A build that was cut off "
        "goes on when the same `python -m data_prep build` is run again."
    )

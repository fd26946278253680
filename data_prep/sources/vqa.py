"""VQA v2 and v1 in the official layout: one Record an image, with all its questions.

    ROOT/v2_OpenEnded_mscoco_{train,val}2014_questions.json    (v1 without `v2_`)
    ROOT/v2_mscoco_{train,val}2014_annotations.json
    ROOT/{train,val}2014/COCO_{train,val}2014_%012d.jpg        or below ROOT/images

Train questions train; val is the evaluation set vqa_v2_val, its questions and answers untouched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.record import DataError, Evaluation, Record
from data_prep.sources.annotations import entries_of, image_folder, load_json
from data_prep.sources.coco import photo_id

VERSIONS = {"v2": "v2_", "v1": ""}
KEPT = ("question_type", "multiple_choice_answer", "answers", "answer_type")


def read(root: Path, options: object = None) -> Iterator[Record]:
    """Yield one Record an image, split by split, in ascending image id.

    Raises:
        DataError: no question file, one without its annotations or images, or questions that have no answers.
    """
    found = False
    for version, prefix in VERSIONS.items():
        for split in ("train2014", "val2014"):
            questions = root / f"{prefix}OpenEnded_mscoco_{split}_questions.json"
            if questions.is_file():
                found = True
                answers = root / f"{prefix}mscoco_{split}_annotations.json"
                evaluation = Evaluation(f"vqa_{version}_val", "vqa") if split.startswith("val") else None
                yield from _read_split(root, split, questions, answers, evaluation)
    if not found:
        raise DataError(
            f"{root}: looked for v2_OpenEnded_mscoco_{{train,val}}2014_questions.json and found none. "
            "VQA's question and annotation archives unpack to that folder."
        )


def _read_split(
    root: Path, split: str, questions: Path, answers: Path, evaluation: Evaluation | None
) -> Iterator[Record]:
    with entries_of(answers):
        annotations = {int(item["question_id"]): item for item in load_json(answers, "annotations")["annotations"]}
    folder = image_folder([root / split, root / "images" / split, root / "images"], questions)
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    with entries_of(questions):
        for asked in load_json(questions, "questions")["questions"]:
            number = int(asked["question_id"])
            if number not in annotations:
                raise DataError(
                    f"{questions}: question {number} has no answers in {answers.name}. Do the two belong together?"
                )
            kept = {key: annotations[number][key] for key in KEPT if key in annotations[number]}
            by_image[int(asked["image_id"])].append({"question_id": number, "question": asked["question"], **kept})
    for image in sorted(by_image):
        yield Record(
            image_id=photo_id(image),
            source="vqa",
            path=folder / f"COCO_{split}_{image:012d}.jpg",
            evaluation=evaluation,
            questions=tuple(sorted(by_image[image], key=lambda question: question["question_id"])),
        )

"""Tiny datasets in the official layouts, written by the tests that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(path: Path, seed: int, size: tuple[int, int] = (32, 24), quality: int = 90) -> Path:
    """A smooth random picture, the same for the same seed; smooth as photos are, so that re-encoding keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(path, quality=quality)
    return path


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def coco(root: Path, splits: dict[str, list[int]], flickr: dict[int, int] | None = None) -> Path:
    """splits: {"train2017": [ids]}; annotations lie in no order; flickr: COCO id → Flickr photo id."""
    for split, ids in splits.items():
        year = f"COCO_{split}_" if split.endswith("2014") else ""
        names = {number: f"{year}{number:012d}.jpg" for number in ids}
        photos = {number: (flickr or {}).get(number, 10**6 + number) for number in ids}
        images = [
            {
                "id": number,
                "file_name": names[number],
                "license": 4,
                "flickr_url": f"http://farm8.staticflickr.com/7187/{photos[number]}_5f_z.jpg",
            }
            for number in reversed(ids)
        ]
        annotations = [
            {"id": 10 * number + index, "image_id": number, "caption": f" Picture {number},\ntext {index}. "}
            for index in (1, 0)
            for number in ids
        ]
        dump(root / f"annotations/captions_{split}.json", {"images": images, "annotations": annotations})
        for number, name in names.items():
            picture(root / split / name, number)
    return root


def karpathy(root: Path, splits: dict[str, list[int]]) -> Path:
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "cocoid": number,
            "split": split,
            "sentences": [{"raw": f"Picture {number}."}],
        }
        for split, ids in splits.items()
        for number in ids
    ]
    dump(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for image in images:
        picture(root / "val2014" / image["filename"], image["cocoid"])
    return root


def question(image: int, index: int, text: str, answer: str, agree: int = 10, kind: str = "other") -> dict[str, Any]:
    given = [answer] * agree + [f"else {n}" for n in range(10 - agree)]
    return {
        "image_id": image,
        "question_id": image * 1000 + index,
        "question": text,
        "multiple_choice_answer": answer,
        "answers": [{"answer": one, "answer_confidence": "yes", "answer_id": n + 1} for n, one in enumerate(given)],
        "answer_type": kind,
        "question_type": "what",
    }


def vqa(root: Path, splits: dict[str, list[dict[str, Any]]], images: str = "") -> Path:
    """splits: {"train2014": [question(…)]}; the pictures go to root/images/split where `images` says so."""
    for split, asked in splits.items():
        questions = [{key: one[key] for key in ("image_id", "question", "question_id")} for one in asked]
        answers = [{key: value for key, value in one.items() if key != "question"} for one in asked]
        dump(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        dump(root / f"v2_mscoco_{split}_annotations.json", {"annotations": answers[::-1]})
        for number in {one["image_id"] for one in asked}:
            picture(root / images / split / f"COCO_{split}_{number:012d}.jpg", number)
    return root


def flickr30k(root: Path, splits: dict[str, list[int]], folder: str = "flickr30k-images") -> Path:
    images = [
        {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": f"Photo {number}, {n}."} for n in range(5)]}
        for split, ids in splits.items()
        for number in ids
    ]
    dump(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for image in images:
        picture(root / folder / image["filename"], int(image["filename"][:-4]))
    return root


def table(path: Path, rows: int, first: int = 0) -> Path:
    """A CSV table of small pictures with one caption each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["image,caption"]
    for number in range(first, first + rows):
        picture(path.parent / f"pictures/{number}.jpg", number)
        lines.append(f'pictures/{number}.jpg,"number {number}, a picture"')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

"""COCO with Karpathy's splits: train and restval train, val and test are evaluation sets.

ROOT/dataset_coco.json
ROOT/{train,val}2014/*.jpg
ROOT/annotations/captions_{train,val}2014.json    optional, for licences and Flickr ids
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.record import DataError, Evaluation, Record
from data_prep.sources.annotations import load_json
from data_prep.sources.coco import flickr_ids, photo_id

SPLITS: dict[str, Evaluation | None] = {
    "train": None,
    "restval": None,
    "val": Evaluation("coco_karpathy_val", "retrieval"),
    "test": Evaluation("coco_karpathy_test", "retrieval"),
}


def read(root: Path, options: object = None) -> Iterator[Record]:
    """Yield one Record an image, in ascending image id."""
    content = load_json(root / "dataset_coco.json", "images")
    official = _official_images(root)
    for image in sorted(content["images"], key=lambda image: int(image["cocoid"])):
        if image["split"] not in SPLITS:
            raise DataError(f"{root / 'dataset_coco.json'}: image {image['cocoid']} has split {image['split']!r}.")
        known = official.get(int(image["cocoid"]), {})
        yield Record(
            image_id=photo_id(image["cocoid"]),
            source="coco_karpathy",
            path=root / image["filepath"] / image["filename"],
            evaluation=SPLITS[image["split"]],
            captions=tuple(sentence["raw"] for sentence in image["sentences"]),
            license=known.get("license"),
            also_known_as=flickr_ids(known),
        )


def _official_images(root: Path) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for split in ("train2014", "val2014"):
        path = root / "annotations" / f"captions_{split}.json"
        if path.is_file():
            images |= {int(image["id"]): image for image in load_json(path, "images")["images"]}
    return images

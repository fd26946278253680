"""COCO with Karpathy's splits: train and (unless told otherwise) restval train, val and test are evaluation sets.

ROOT/dataset_coco.json
ROOT/{train,val}2014/*.jpg
ROOT/annotations/captions_{train,val}2014.json    optional, for licences and Flickr ids
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.record import DataError, Evaluation, Record
from data_prep.sources import ReadOptions
from data_prep.sources.annotations import entries_of, image_folder, load_json
from data_prep.sources.coco import flickr_ids, photo_id

SPLITS: dict[str, Evaluation | None] = {
    "train": None,
    "restval": None,
    "val": Evaluation("coco_karpathy_val", "retrieval"),
    "test": Evaluation("coco_karpathy_test", "retrieval"),
}


def read(root: Path, options: ReadOptions) -> Iterator[Record]:
    """Yield one Record an image, in ascending image id.

    Raises:
        DataError: no dataset_coco.json, a malformed one, or image folders that are not there.
    """
    path = root / "dataset_coco.json"
    content = load_json(path, "images")
    official = _official_images(root)
    with entries_of(path):
        folders = {
            name: image_folder([root / name], path) for name in {image["filepath"] for image in content["images"]}
        }
        for image in sorted(content["images"], key=lambda image: int(image["cocoid"])):
            if image["split"] not in SPLITS:
                raise DataError(f"{path}: image {image['cocoid']} has split {image['split']!r}, not of {list(SPLITS)}.")
            if image["split"] == "restval" and not options.restval:
                continue
            known = official.get(int(image["cocoid"]), {})
            yield Record(
                image_id=photo_id(image["cocoid"]),
                source="coco_karpathy",
                path=folders[image["filepath"]] / image["filename"],
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

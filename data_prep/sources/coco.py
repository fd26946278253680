"""COCO captions, 2014 and 2017, in the official layout.

    ROOT/annotations/captions_{train,val}{2014,2017}.json
    ROOT/{train,val}{2014,2017}/*.jpg

Train splits train; val splits are the evaluation sets coco_2014_val and coco_2017_val.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.record import DataError, Evaluation, Record
from data_prep.sources.annotations import entries_of, image_folder, load_json

SPLITS: dict[str, Evaluation | None] = {
    "train2014": None,
    "train2017": None,
    "val2014": Evaluation("coco_2014_val", "retrieval"),
    "val2017": Evaluation("coco_2017_val", "retrieval"),
}


def read(root: Path, options: object = None) -> Iterator[Record]:
    """Yield one Record an image, split by split, in ascending image id.

    Raises:
        DataError: no caption file at all, a malformed one, or one whose image folder is not there.
    """
    files = {split: root / "annotations" / f"captions_{split}.json" for split in SPLITS}
    present = {split: path for split, path in files.items() if path.is_file()}
    if not present:
        raise DataError(
            f"{root}: looked for annotations/captions_{{train,val}}{{2014,2017}}.json and found none. "
            "COCO's annotations_trainval2017.zip unpacks to that folder."
        )
    for split, path in present.items():
        folder = image_folder([root / split], path)
        content = load_json(path, "images", "annotations")
        with entries_of(path):
            captions: dict[int, list[tuple[int, str]]] = defaultdict(list)
            for annotation in content["annotations"]:
                captions[int(annotation["image_id"])].append((int(annotation["id"]), annotation["caption"]))
            for image in sorted(content["images"], key=lambda image: int(image["id"])):
                yield Record(
                    image_id=photo_id(image["id"]),
                    source="coco",
                    path=folder / image["file_name"],
                    evaluation=SPLITS[split],
                    captions=tuple(caption for _, caption in sorted(captions[int(image["id"])])),
                    license=image.get("license"),
                    also_known_as=flickr_ids(image),
                )


def photo_id(number: int | str) -> str:
    """COCO's integer id, which 2014, 2017, Karpathy and VQA share."""
    return f"coco:{int(number)}"


def flickr_ids(image: dict[str, Any]) -> tuple[str, ...]:
    """The photo's id on Flickr, read from `http://farm8.staticflickr.com/7187/6967031859_5f08387bde_z.jpg`."""
    stem = str(image.get("flickr_url", "")).rpartition("/")[2].partition("_")[0]
    return (f"flickr:{stem}",) if stem.isdigit() else ()

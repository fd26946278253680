"""Flickr30K in the layouts in use.

    ROOT/dataset_flickr30k.json       Karpathy's splits: train trains, val and test are evaluation sets
    ROOT/flickr_annotations_30k.csv   Hugging Face's, with the same splits
    ROOT/results_20130124.token       the original: no splits, everything trains
    ROOT/results.csv                  Kaggle's: no splits, everything trains
    ROOT/**/NUMBER.jpg                images, in ROOT or nested up to three folders deep

Where several annotation files are there, the first of this list is read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.locations import open_file
from data_prep.record import DataError, Evaluation, Record
from data_prep.sources.annotations import entries_of, load_json, load_lines

JSON, HF_CSV = "dataset_flickr30k.json", "flickr_annotations_30k.csv"
TOKEN, CSV = "results_20130124.token", "results.csv"

SPLITS: dict[str, Evaluation | None] = {
    "train": None,
    "val": Evaluation("flickr30k_val", "retrieval"),
    "test": Evaluation("flickr30k_test", "retrieval"),
}

# `2199200615.jpg| 4   A dog runs across the grass .`: row 19999 of the published file lacks its second delimiter.
_CSV_ROW = re.compile(r"(?P<name>[^|]+?)\s*\|\s*(?P<number>\d+)\s*(?:\||\s)\s*(?P<caption>.*)")


def read(root: Path, options: object = None) -> Iterator[Record]:
    """Yield one Record an image, in ascending photo id.

    Raises:
        DataError: no annotation file, no image folder, or a row that cannot be read.
    """
    rows = _rows(root)
    divided = (root / JSON).is_file() or (root / HF_CSV).is_file()
    if not rows:
        raise DataError(f"{root}: the annotation file there has no images in it.")
    folder = _image_folder(root, list(rows))
    for name in sorted(rows, key=lambda name: (len(name), name)):
        evaluation, captions = rows[name]
        yield Record(
            image_id=f"flickr:{Path(name).stem}",
            source="flickr30k",
            path=folder / name,
            evaluation=evaluation,
            captions=captions,
            undivided=not divided,
        )


def _rows(root: Path) -> dict[str, tuple[Evaluation | None, tuple[str, ...]]]:
    """File name → (evaluation set, captions)."""
    if (root / JSON).is_file():
        with entries_of(root / JSON):
            return {
                image["filename"]: (SPLITS[image["split"]], tuple(sentence["raw"] for sentence in image["sentences"]))
                for image in load_json(root / JSON, "images")["images"]
            }
    if (root / HF_CSV).is_file():
        with (
            entries_of(root / HF_CSV),
            io.TextIOWrapper(open_file(root / HF_CSV), "utf-8-sig", newline="") as file,
        ):
            return {
                row["filename"]: (SPLITS[row["split"]], tuple(json.loads(row["raw"]))) for row in csv.DictReader(file)
            }
    for name, parse in ((TOKEN, _token_rows), (CSV, _csv_rows)):
        if (root / name).is_file():
            captions: dict[str, list[tuple[int, str]]] = defaultdict(list)
            for image, number, caption in parse(load_lines(root / name), root / name):
                captions[image].append((number, caption))
            return {image: (None, tuple(text for _, text in sorted(texts))) for image, texts in captions.items()}
    raise DataError(
        f"{root}: looked for {JSON}, {HF_CSV}, {TOKEN} and {CSV} and found none. Flickr30K is given out by "
        "request form; unpack it there."
    )


def _token_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, int, str]]:
    """`1000092795.jpg#0<TAB>caption`; a caption may hold `#` and quotes."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        head, tab, caption = line.partition("\t")
        image, mark, index = head.rpartition("#")
        if not tab or not mark or not index.isdigit():
            raise DataError(f"{path}:{number}: expected `NAME.jpg#INDEX<TAB>caption`, found {line[:80]!r}.")
        yield image, int(index), caption


def _csv_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, int, str]]:
    """`1000092795.jpg| 0| caption`, after a header."""
    for number, line in enumerate(lines, start=1):
        if number == 1 or not line.strip():
            continue
        match = _CSV_ROW.fullmatch(line)
        if not match:
            raise DataError(f"{path}:{number}: expected `NAME.jpg| INDEX| caption`, found {line[:80]!r}.")
        yield match["name"], int(match["number"]), match["caption"]


def _image_folder(root: Path, names: list[str]) -> Path:
    """The folder of the images: ROOT or one up to three levels below it.

    A few names are looked for, as single photos may be missing; these are counted later.
    """
    for name in names[:10]:
        for pattern in ("", "*/", "*/*/", "*/*/*/"):
            found = next(root.glob(pattern + name), None)
            if found:
                return found.parent
    raise DataError(f"{root}: looked for {names[0]} there and up to three folders below, and found none.")

"""One reader a dataset: official layout → Records, by the names that the command line takes."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.locations import exists, path_of
from data_prep.record import DataError, Record

# Name → module with `read(root, options)`; imported when asked for.
READERS = {
    "coco": "data_prep.sources.coco",
    "coco_karpathy": "data_prep.sources.coco_karpathy",
    "flickr30k": "data_prep.sources.flickr30k",
    "vqa": "data_prep.sources.vqa",
    "table": "data_prep.sources.table",
    "webdataset": "data_prep.sources.webdataset",
    "images": "data_prep.sources.images",
}

# `sample=DIR` stands for the readers of what `python -m data_prep sample DIR` wrote.
SAMPLE = {"coco": "mscoco", "vqa": "mscoco", "flickr30k": "flickr30k", "images": "images"}


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read.

    Attributes:
        image_column: of a table: paths, or the images' bytes.
        caption_columns: of a table.
        restval: whether Karpathy's restval images of COCO train.
        spill: where images go that come as bytes rather than as files.
    """

    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption",)
    restval: bool = True
    spill: Path = Path("spill")


def parse(words: list[str]) -> list[tuple[str, Path]]:
    """`name=path` words → (reader's name, path), `sample` expanded.

    Raises:
        DataError: a word of another form, an unknown name (the nearest right one is named), or no such path.
    """
    pairs: list[tuple[str, Path]] = []
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise DataError(f"{word!r}: sources are written name=path, such as coco=/data/coco.")
        if name not in (*READERS, "sample"):
            close = difflib.get_close_matches(name, [*READERS, "sample"], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise DataError(f"source {name!r} is not known.{hint} Known are {', '.join([*READERS, 'sample'])}.")
        path = path_of(text)
        if not exists(path):
            raise DataError(f"{word}: looked for {path.absolute()} and found nothing there.")
        pairs += [(reader, path / part) for reader, part in SAMPLE.items()] if name == "sample" else [(name, path)]
    return pairs


def read(name: str, root: Path, options: ReadOptions) -> Iterator[Record]:
    """The records of one source, in a fixed order."""
    records: Iterator[Record] = importlib.import_module(READERS[name]).read(root, options)
    return records

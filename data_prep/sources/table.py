"""A user's own pairs: a CSV, TSV, JSONL or Parquet table with a column of image paths and one or more of captions.

Relative paths count from the table's folder. A Parquet column may hold the images themselves, as bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.locations import open_file, path_of
from data_prep.record import DataError, Record
from data_prep.sources import ReadOptions


def read(path: Path, options: ReadOptions) -> Iterator[Record]:
    """Yield one Record a row, in the table's order; a caption cell may hold one text or a list of them.

    Raises:
        DataError: another file type, a column that is not there (those that are, are named), or a malformed table.
    """
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{path}: tables are {', '.join(FORMATS)}; found {path.suffix or 'no suffix'}.")
    wanted = (options.image_column, *options.caption_columns)
    spill = Spill(options.spill / f"{len(list(options.spill.glob('*')))}.bin")
    try:
        for number, row in enumerate(FORMATS[path.suffix.lower()](path, wanted), start=1):
            if missing := [name for name in wanted if name not in row]:
                raise DataError(
                    f"{path}: row {number} has no column {missing[0]!r}; it has {', '.join(map(str, row))}. "
                    "Name yours with --image-column and --caption-column."
                )
            image = row[options.image_column]
            if isinstance(image, dict):  # Hugging Face's form
                image = image.get("bytes") or image.get("path")
            if not isinstance(image, str | bytes) or not image:
                raise DataError(f"{path}: row {number} has {image!r} for its image; a path or bytes are expected.")
            if isinstance(image, str) and image.startswith(("http://", "https://")):
                raise DataError(
                    f"{path}: row {number} has an address for its image, {image[:80]}. Download first: `img2dataset "
                    f"--url_list {path} --url_col {options.image_column} --caption_col {options.caption_columns[0]} "
                    "--input_format parquet --output_format webdataset --output_folder TARS`, then webdataset=TARS."
                )
            captions: list[str] = []
            for name in options.caption_columns:
                cell = row[name]
                captions += [str(text) for text in cell] if isinstance(cell, list) else [str(cell)] if cell else []
            if isinstance(image, bytes):
                span = spill.add(image)
                yield Record(
                    f"table:{path.stem}/{number}", "table", spill.path, None, tuple(captions), span=span, undivided=True
                )
            else:
                location = path_of(image) if "://" in image else path.parent / image
                yield Record(f"table:{path.stem}/{image}", "table", location, captions=tuple(captions), undivided=True)
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: cannot be read as {path.suffix.lower()} ({error}).") from None


class Spill:
    """A file of images that came as bytes, one after the other: where they lie until they are sharded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0

    def add(self, image: bytes) -> tuple[int, int]:
        """(first byte, number of bytes) of the image in the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(image)
        self._end += len(image)
        return self._end - len(image), len(image)


def _csv_rows(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(open_file(path), "utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, dialect="excel-tab" if path.suffix.lower() == ".tsv" else "excel")


def _jsonl_rows(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(open_file(path), "utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}:{number}: not a JSON object ({error}).") from None


def _parquet_rows(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with open_file(path) as file:
        yield from _batches(pq.ParquetFile(file, pre_buffer=False), wanted)


def _batches(table: Any, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    # Other columns may hold much. Where a wanted one is missing, the first row says so.
    columns = list(wanted) if set(wanted) <= set(table.schema_arrow.names) else None
    for batch in table.iter_batches(batch_size=1_000, use_threads=False, columns=columns):
        yield from batch.to_pylist()


FORMATS: dict[str, Callable[[Path, Sequence[str]], Iterator[dict[str, Any]]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}

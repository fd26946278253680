"""Evaluation sets of a user's own, one folder each below ROOT, named as the set is.

ROOT/SET/CLASS/*.jpg         classification; names and order of classes by SET/classnames.txt where it is there
ROOT/SET/templates.txt       prompts, `{c}` standing for the class
ROOT/SET/metadata.jsonl      caption selection instead: {"file_name": …, "captions": [right, wrong, …]} a line
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.record import DataError, Evaluation, Record
from data_prep.sources.annotations import load_lines

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TEMPLATES = ("a photo of a {c}.",)


def read(root: Path, options: object = None) -> Iterator[Record]:
    """Yield the records of each set, in the order of names."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        raise DataError(f"{root}: looked for one folder an evaluation set and found none.")
    for folder in folders:
        yield from _selection(folder) if (folder / "metadata.jsonl").is_file() else _classification(folder)


def _classification(folder: Path) -> Iterator[Record]:
    present = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names = _lines(folder / "classnames.txt") or tuple(present)
    if unknown := sorted(set(present) - set(names)):
        raise DataError(f"{folder}: {unknown[:5]} are folders but not in classnames.txt.")
    if not present:
        raise DataError(f"{folder}: looked for one folder a class, or metadata.jsonl, and found neither.")
    templates = _lines(folder / "templates.txt") or TEMPLATES
    evaluation = Evaluation(folder.name, "classification", names, templates)
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield _record(folder, path, evaluation, label=label)


def _selection(folder: Path) -> Iterator[Record]:
    evaluation = Evaluation(folder.name, "selection")
    for number, line in enumerate(load_lines(folder / "metadata.jsonl"), start=1):
        try:
            row = json.loads(line)
            name, captions = str(row["file_name"]), tuple(map(str, row["captions"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / 'metadata.jsonl'}:{number}: expected file_name and captions ({error})."
            ) from None
        if len(captions) < 2:
            raise DataError(f"{folder / 'metadata.jsonl'}:{number}: {name} needs the right caption and a wrong one.")
        yield _record(folder, folder / name, evaluation, captions=captions)


def _record(
    folder: Path, path: Path, evaluation: Evaluation, label: int | None = None, captions: tuple[str, ...] = ()
) -> Record:
    name = path.relative_to(folder).as_posix()
    return Record(f"images:{folder.name}/{name}", "images", path, evaluation, captions, label=label)


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())

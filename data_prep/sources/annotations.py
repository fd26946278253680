"""What the readers share: annotation files that are there and well formed, or an error that says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.locations import read_bytes
from data_prep.record import DataError


def load_json(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys.

    Raises:
        DataError: the file is missing, is not JSON, or lacks a key.
    """
    try:
        content = json.loads(read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"{path}: looked for this annotation file and found none.") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Was the download cut off?") from None
    if not isinstance(content, dict) or (missing := [key for key in keys if key not in content]):
        found = sorted(content)[:10] if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: lacks {missing if isinstance(content, dict) else list(keys)}; it has {found}.")
    return content


def load_lines(path: Path) -> list[str]:
    r"""The lines of a text file; only \n ends one, since captions may hold rarer separators such as U+2028.

    Raises:
        DataError: the file is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}). Convert it.") from None


@contextmanager
def entries_of(path: Path) -> Iterator[None]:
    """Turns what a malformed entry raises into an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: an entry is malformed ({type(error).__name__}: {error}). Is it the official file?"
        ) from (error)


def image_folder(candidates: Iterable[Path], annotations: Path) -> Path:
    """The first of these folders that exists.

    Raises:
        DataError: none does, so that every image of an annotation file would be missing.
    """
    candidates = list(candidates)
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise DataError(
            f"{annotations.name} is there, but its images are not: looked for {' and '.join(map(str, candidates))}. "
            "Unpack them there, or move the annotation file away to leave this split out."
        )
    return found

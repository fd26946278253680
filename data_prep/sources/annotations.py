"""What the readers share: annotation files that are there and well formed, or an error that says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.record import DataError


def load_json(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys.

    Raises:
        DataError: the file is missing, is not JSON, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: looked for this annotation file and found none.") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Was the download cut off?") from None
    if not isinstance(content, dict) or (missing := [key for key in keys if key not in content]):
        found = sorted(content)[:10] if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: lacks {missing if isinstance(content, dict) else list(keys)}; it has {found}.")
    return content


def first_existing(candidates: Iterable[Path]) -> Path | None:
    """The first of these paths that exists."""
    return next((path for path in candidates if path.exists()), None)

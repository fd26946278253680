"""What a model's folder of foreign origin must not ask for: code to run, files that lie elsewhere.

Weights are read as weights only wherever they are read; this is about the JSON files beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.model import ModelError, first_line

# By which transformers loads a class from a Python file of the folder, or of a repository.
CODE = ("auto_map", "custom_pipelines", "trust_remote_code")


def check_folder(folder: Path) -> None:
    """See that no JSON file in a folder, or below it, asks for code, and that no index of weights leads out of it.

    Raises:
        ModelError: one does, or is not JSON.
    """
    for path in sorted(folder.rglob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path}: cannot be read as JSON ({first_line(error)}). Get the folder again.") from error
        if asked := next((name for name in _keys(found) if name in CODE), None):
            raise ModelError(
                f"{path}: has {asked}, which would run code of the folder or of a hub. Nothing was loaded. Where the "
                "weights do without, remove it; else convert them by the tool that they are from."
            )
        places = found.get("weight_map", {}) if isinstance(found, dict) else {}
        files = places.values() if isinstance(places, dict) else [places]
        if outside := next((file for file in files if Path(str(file)).name != file), None):
            raise ModelError(f"{path}: names {outside!r}, which is no file of this folder. Nothing was loaded.")


def _keys(value: Any) -> Iterator[str]:
    """The names of all tables in a JSON value, at any depth."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            yield from one
            pending += one.values()
        elif isinstance(one, list):
            pending += one

"""Names of classes and templates of prompts, for sets that bring none: built in by name, or from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import open_clip

from pipeline.evaluate import sets
from pipeline.evaluate.sets import EvaluationError

T = TypeVar("T")

# By label, which is the order of ImageNet's folders.
CLASS_NAMES = {"imagenet": open_clip.IMAGENET_CLASSNAMES}
TEMPLATES = {"openai_imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def class_names(said: str) -> tuple[str, ...]:
    """Those of a name in CLASS_NAMES, or of a file with one a line.

    Raises:
        EvaluationError: neither of them, or a line is empty.
    """
    return tuple(CLASS_NAMES[said] if said in CLASS_NAMES else _of_file(said, sets.lines, "--classnames", CLASS_NAMES))


def templates(said: str) -> tuple[str, ...]:
    """Those of a name in TEMPLATES, or of a file with one a line; `{c}` stands for the class name.

    Raises:
        EvaluationError: neither of them, a line is empty, or it has no place for the name.
    """
    if said in TEMPLATES:
        return tuple(template("{c}") for template in TEMPLATES[said])
    return tuple(_of_file(said, sets.read_templates, "--templates", TEMPLATES))


def _of_file(said: str, read: Callable[[Path], list[str]], option: str, known: dict[str, T]) -> list[str]:
    if not Path(said).is_file():
        raise EvaluationError(f"{option} {said}: is neither a file nor one of {', '.join(known)}.")
    return read(Path(said))

"""A folder of class folders, as ImageNet is laid out: FOLDER/CLASS/*.jpg, .jpeg, .png or .webp.

FOLDER/classnames.txt    names of the classes, if their folders are not called as they are
FOLDER/templates.txt     prompts, `{c}` standing for the class
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluate import sets
from pipeline.evaluate.sets import EvaluationError, Item

TEMPLATES = ("a photo of a {c}.",)


def is_one(path: Path) -> bool:
    """Whether an image lies in a folder in it."""
    return path.is_dir() and any(_images(path / name) for name in _folders(path))


def class_names(path: Path) -> tuple[str, ...]:
    """Those in classnames.txt; else the folders' names, with blanks for underscores."""
    if (path / sets.CLASS_NAMES).is_file():
        return tuple(sets.lines(path / sets.CLASS_NAMES))
    return tuple(name.replace("_", " ") for name in _folders(path))


def templates(path: Path) -> tuple[str, ...]:
    """Those in templates.txt; else one."""
    file = path / "templates.txt"
    return tuple(sets.read_templates(file)) if file.is_file() else TEMPLATES


def read(path: Path, names: Sequence[str]) -> list[Item]:
    """All items, class after class, in the order of file names.

    Args:
        path: the folder.
        names: (K,) of the classes, by label.

    Raises:
        EvaluationError: the folders do not fit the names, or there is no image.
    """
    folders = _folders(path)
    items = [
        Item(file.relative_to(path).as_posix(), file, 0, file.stat().st_size, label)
        for folder, label in zip(folders, labels(path, folders, names), strict=True)
        for file in _images(path / folder)
    ]
    if not items:
        raise EvaluationError(f"{path}: no class folder holds an image (.{', .'.join(sets.IMAGE_EXTENSIONS)}).")
    return items


def labels(path: Path, folders: Sequence[str], names: Sequence[str]) -> list[int]:
    """The label of each folder.

    Folders that are called as classes are have their labels; so have folders 0, 1, 2 … (ImageNet-V2), of which some
    may be missing. Others stand for the names in order, and must be as many.

    Raises:
        EvaluationError: they are not as many, or a folder is called as another class is.
    """
    by_name = {_plain(name): label for label, name in enumerate(names)}
    found = [by_name[_plain(folder)] for folder in folders if _plain(folder) in by_name]
    if len(set(found)) == len(folders):
        return found
    if _are_numbers(folders) and int(folders[0]) == 0 and int(folders[-1]) < len(names):
        return [int(folder) for folder in folders]
    if len(folders) != len(names):
        raise EvaluationError(
            f"{path}: has {len(folders)} class folders, {folders[0]} to {folders[-1]}, and there are {len(names)} "
            "names of classes. There must be one name for each folder, in order; more only where folders are called "
            "as classes are, or 0, 1, 2 …"
        )
    for folder, name in zip(folders, names, strict=True):
        if _plain(folder) in by_name and _plain(folder) != _plain(name):
            raise EvaluationError(
                f"{path}: the folder {folder} would be the class {name!r}, by its place, though another class is "
                "called as it is. Name all folders as the classes, or put the names into the folders' order."
            )
    return list(range(len(folders)))


def _folders(path: Path) -> list[str]:
    """The class folders, sorted: by number where all are numbers, since 10 comes after 9."""
    found = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(found, key=int) if _are_numbers(found) else found


def _are_numbers(folders: Sequence[str]) -> bool:
    return all(folder.isdecimal() for folder in folders) and len({*map(int, folders)}) == len(folders)


def _images(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower().removeprefix(".") in sets.IMAGE_EXTENSIONS and not file.name.startswith(".")
    )


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()

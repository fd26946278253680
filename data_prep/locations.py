"""Where files lie: on this machine, or behind an address such as s3://bucket/folder that fsspec opens."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from data_prep.record import DataError

SCHEMES = ("s3", "gs", "hf", "http", "https")


def path_of(text: str) -> Path:
    """A path on this machine, or an object that acts as one for an address.

    Raises:
        DataError: the address has a scheme that is not among SCHEMES; `pipe:` and the like would run commands.
    """
    scheme, mark, _ = text.partition("://")
    if not mark and not text.startswith("pipe:"):
        return Path(text)
    if scheme not in SCHEMES:
        raise DataError(f"{text}: only {', '.join(f'{name}://' for name in SCHEMES)} and plain paths are read.")
    from upath import UPath  # loads fsspec

    return cast(Path, UPath(text))


def is_local(path: Path) -> bool:
    """Whether a path is a file of this machine's."""
    return isinstance(path, os.PathLike)


def read_bytes(path: Path, span: tuple[int, int] | None = None) -> bytes:
    """A file's bytes, or those of a span: (first byte, number of bytes)."""
    if span is None:
        return path.read_bytes()
    with path.open("rb") as file:
        file.seek(span[0])
        return file.read(span[1])


def remove_tree(path: Path) -> None:
    """Remove a folder with all it holds, if it is there."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_dir():
        path.rmdir(recursive=True)  # type: ignore[call-arg]


@contextmanager
def appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which appears under its name once it is complete and on disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_local(path):
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)
        return
    # Whatever happens while an object is written, it must not appear: so it is written here first.
    with tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        path.fs.put_file(file.name, path.path)  # type: ignore[attr-defined]

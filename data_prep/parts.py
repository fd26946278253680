"""Several processes, on as many machines, that build one dataset on a file system that they share.

Each part reads all annotations, so that it knows every shard, and makes the train shards that are its share. Before
that, it must know what the evaluation sets hold, since no train image may be one of theirs: it makes those evaluation
shards that are its share, then whichever of the others are not there yet. So no part ever waits for another: they may
run at once, one after the other, or twice. What two of them make, they make alike, each in a folder of its own from
which it is put in place whole. A build without `--part` is the last step: it takes the shards that it finds, if they
are what it would make, makes the others, and seals the dataset.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_prep.locations import is_local
from data_prep.record import DataError
from data_prep.shards import BUILD

Task = TypeVar("Task")


@dataclass(frozen=True)
class Part:
    """One of `parts` processes, the first being 0."""

    index: int
    parts: int

    @staticmethod
    def parse(word: str) -> Part:
        """`1/4` → the second of four.

        Raises:
            DataError: it is written otherwise, or there is no such part.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", word)
        if not found or not int(found[1]) < int(found[2]):
            raise DataError(f"--part {word!r}: write I/N with I from 0 to N - 1, such as 0/4, 1/4, 2/4 and 3/4.")
        return Part(int(found[1]), int(found[2]))

    def share(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """This part's tasks."""
        return itertools.islice(tasks, self.index, None, self.parts)

    def in_turn(self, tasks: Iterable[Task]) -> list[Task]:
        """All tasks: this part's share, then the others' in an order of its own, so that two parts that come to them at
        the same time seldom make the same one."""

        def turn(numbered: tuple[int, Task]) -> tuple[bool, bytes]:
            number = numbered[0]
            return number % self.parts != self.index, hashlib.sha256(f"{self.index} {number}".encode()).digest()

        return [task for _, task in sorted(enumerate(tasks), key=turn)]


@contextmanager
def own_folder(out: Path, alone: bool) -> Iterator[Path]:
    """The path of a folder that is this process's only: on the file system of `out`, else (`out` being an address) on
    this machine. It goes at the end.

    Args:
        alone: no other process should be building `out`. The folders of those that were killed go, and with them what a
            process that lives on all the same would still put in place.

    Raises:
        DataError: the folder went while this process was at work.
    """
    folders = out / BUILD / "scratch"
    if not is_local(out):
        folders = Path(tempfile.gettempdir()) / f"data_prep-{hashlib.sha256(str(out).encode()).hexdigest()[:16]}"
    name = secrets.token_hex(8)
    if alone:
        going = folders.with_name(f"{folders.name}-{name}")
        with suppress(FileNotFoundError):
            folders.rename(going)  # all at once: a process that lives on must not miss some of its files only
        shutil.rmtree(going, ignore_errors=True)
    folder = folders / name
    try:
        yield folder
    except FileNotFoundError as error:
        if not str(error.filename).startswith(str(folder)):
            raise
        raise DataError(
            f"{out}: another build of it began or ended, and took {folder} away from this one. Let all parts end "
            "before you build without --part; what is there is kept."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""Maps a function over tasks on this machine's cores, results in the order of the tasks."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """Where tasks run: `workers` processes, or this one where there is no pool."""

    pool: ProcessPoolExecutor | None
    workers: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """function(task) for each task, in order; a few tasks are under way at a time."""
        if self.pool is None:
            yield from map(function, tasks)
            return
        remaining = iter(tasks)
        under_way: deque[Future[Result]] = deque(
            self.pool.submit(function, task) for task in itertools.islice(remaining, 2 * self.workers)
        )
        while under_way:
            yield under_way.popleft().result()
            under_way.extend(self.pool.submit(function, task) for task in itertools.islice(remaining, 1))


@contextmanager
def processes(workers: int) -> Iterator[Processes]:
    """Processes that several maps share, since each loads its libraries once."""
    if workers <= 1:
        yield Processes(None, 1)
        return
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        yield Processes(pool, workers)


def run(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """[function(task) for task in tasks], by `workers` processes."""
    with processes(workers) as cores:
        yield from cores.map(function, tasks)


def _end_with_parent() -> None:
    """A killed build takes its processes along: else they would go on writing beneath the one that follows it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

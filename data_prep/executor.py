"""Maps a function over tasks on this machine's cores, results in the order of the tasks."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """[function(task) for task in tasks], by `workers` processes; a few tasks are under way at a time."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    remaining = iter(tasks)
    with ProcessPoolExecutor(workers) as pool:
        under_way: deque[Future[Result]] = deque(
            pool.submit(function, task) for task in itertools.islice(remaining, 2 * workers)
        )
        while under_way:
            yield under_way.popleft().result()
            under_way.extend(pool.submit(function, task) for task in itertools.islice(remaining, 1))

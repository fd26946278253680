"""Maps a function over tasks on this machine's cores or a Ray cluster's, results in the order of the tasks."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

from data_prep.record import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """Where tasks run."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """function(task) for each task, in order; a few tasks are under way at a time."""


@dataclass(frozen=True)
class Here:
    """This process."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        return map(function, tasks)


@dataclass(frozen=True)
class Processes:
    """Processes on this machine."""

    pool: ProcessPoolExecutor
    workers: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        return _in_order(lambda task: self.pool.submit(function, task), Future.result, tasks, 2 * self.workers)


@dataclass(frozen=True)
class Ray:
    """A Ray cluster's cores."""

    cores: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        import ray

        remote = ray.remote(function)
        return _in_order(remote.remote, ray.get, tasks, 2 * self.cores)


def _in_order(
    submit: Callable[[Task], Any], result: Callable[[Any], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[Result]:
    remaining = iter(tasks)
    under_way = deque(submit(task) for task in itertools.islice(remaining, ahead))
    while under_way:
        yield result(under_way.popleft())
        under_way.extend(submit(task) for task in itertools.islice(remaining, 1))


def with_tasks(
    executor: Executor, function: Callable[[Task], Result], tasks: Iterable[Task]
) -> Iterator[tuple[Task, Result]]:
    """(task, function(task)) for each task; a task is let go with its result (itertools.tee would keep 57)."""
    under_way: deque[Task] = deque()

    def remembered() -> Iterator[Task]:
        for task in tasks:
            under_way.append(task)
            yield task

    for result in executor.map(function, remembered()):
        yield under_way.popleft(), result


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Processes that several maps share, since each loads its libraries once."""
    if workers <= 1:
        yield Here()
        return
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        yield Processes(pool, workers)


@contextmanager
def ray_cluster(workers: int) -> Iterator[Executor]:
    """The cluster at RAY_ADDRESS, or `workers` cores of this machine where none is given."""
    try:
        import ray
    except ImportError:
        raise DataError("--executor ray: ray is not installed. `pip install clip-pipeline[ray]` adds it.") from None
    address = os.environ.get("RAY_ADDRESS")
    where: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    ray.init(**where, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield Ray(int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


# By the names that the command line takes.
EXECUTORS: dict[str, Callable[[int], AbstractContextManager[Executor]]] = {"local": processes, "ray": ray_cluster}


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

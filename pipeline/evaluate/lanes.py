"""Lanes: threads of this process that each do a part of the work on a CPU from start to end, beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Done = TypeVar("Done")


def in_lanes(work: Callable[[Part], Done], parts: Sequence[Part], lanes: int) -> list[Done]:
    """What `work` makes of each part, in order.

    A lane that waits for no other keeps its core busy; loader processes beside towers on all cores take turns with
    them, and each turn holds up the threads on the other cores. Decoders, filters and torch let go of Python's lock.

    Args:
        work: of torch and what else may run in several threads; whether it records gradients it says itself.
        parts: more of them than lanes, and alike, so that no lane runs out of work.
        lanes: how many at a time, each with its share of torch's threads; below 2, the calling thread does all.

    Raises:
        What `work` raises, of the first part that fails; no further part is begun.
    """
    lanes, threads = min(lanes, len(parts)), torch.get_num_threads()
    if lanes < 2:
        return [work(part) for part in parts]
    try:
        with ThreadPoolExecutor(
            lanes, "lane", initializer=torch.set_num_threads, initargs=(-(-threads // lanes),)
        ) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # some of its libraries count for the process, not for a thread

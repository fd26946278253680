"""Memory that loader processes share with the trainer: the batches they write, and what each of them is doing.

Shapes: B = pairs of this rank's batch, C = 3, S = image size, L = context length.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import sys
import time
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

# How loader processes start. Forked ones share the tables of the plan and the shards; macOS cannot fork safely.
START = "fork" if sys.platform == "linux" else "spawn"
# Memory that a loader process may gain before it is spoken of.
LEAK = 1 << 30
# Parts that a process makes before its memory counts as what it needs.
WARM = 20

log = logging.getLogger(__name__)


def memory(size: int) -> Any:
    """Bytes that processes which are started from now on share, all zero.

    Forked ones share memory that has no file: containers keep /dev/shm small, and end whom it does not suffice.
    """
    return mmap.mmap(-1, size) if START == "fork" else RawArray(ctypes.c_byte, size)


class Slot(NamedTuple):
    """One batch, to be written or read in place."""

    image_BCSS: Tensor  # uint8, channels last
    token_BL: Tensor  # int64
    id_B: Tensor  # int64
    image_B: Tensor  # int64


class Ring:
    """Batches in turn: step k is written into slot k mod `slots`.

    Args:
        slots: as many as steps may be written or read at a time.
        batch: B.
        size: (height, width) of the images.
        context_length: L.
    """

    def __init__(self, slots: int, batch: int, size: tuple[int, int], context_length: int) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {
            "image": (slots, batch, *size, 3),
            "token": (slots, batch, context_length),
            "id": (slots, batch),
            "image_id": (slots, batch),
        }
        self._types: dict[str, Any] = {name: np.uint8 if name == "image" else np.int64 for name in self._shapes}
        self._memory = {
            name: memory(int(np.prod(shape)) * np.dtype(self._types[name]).itemsize)
            for name, shape in self._shapes.items()
        }
        self.slots = slots

    def slot(self, step: int) -> Slot:
        """The slot of a step."""
        parts = {name: self._array(name)[step % self.slots] for name in self._shapes}
        image_BCSS = torch.from_numpy(parts["image"]).permute(0, 3, 1, 2)
        return Slot(image_BCSS, *(torch.from_numpy(parts[name]) for name in ("token", "id", "image_id")))

    def pin(self) -> None:
        """Let a CUDA device read the images by itself, so that copying them does not wait."""
        array = self._array("image")
        code = torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0)
        if int(code):
            log.warning("cudaHostRegister gave error %d: images are copied to the GPU from ordinary memory", int(code))

    def unpin(self) -> None:
        """Undo `pin`; before the memory goes."""
        torch.cuda.cudart().cudaHostUnregister(self._array("image").ctypes.data)

    def _array(self, name: str) -> NDArray[Any]:
        return np.frombuffer(self._memory[name], self._types[name]).reshape(self._shapes[name])


class Watch:
    """What each loader process is doing, written by itself and read by the trainer.

    Args:
        workers: their number.
    """

    FIELDS = SHARD, SINCE, MEMORY, PARTS = range(4)

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = memory(max(workers, 1) * len(self.FIELDS) * 8)
        self._needed: dict[int, int] = {}
        for worker in range(workers):
            self.at(worker, None)  # from now on it is to get on

    @functools.cached_property
    def _now(self) -> NDArray[np.int64]:
        return np.frombuffer(self._memory, np.int64)

    @functools.cached_property
    def _process(self) -> psutil.Process:
        return psutil.Process()  # first asked for in a loader process

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_now", "_process")}

    def at(self, worker: int, shard: int | None) -> None:
        """A process says which shard it turns to; None for none."""
        self._set(worker, self.SHARD, -1 if shard is None else shard)
        self._set(worker, self.SINCE, time.monotonic_ns())

    def done(self, worker: int) -> None:
        """A process says that it has made a part."""
        self.at(worker, None)
        self._set(worker, self.PARTS, self._get(worker, self.PARTS) + 1)
        taken = self._process.memory_info()
        self._set(worker, self.MEMORY, taken.rss - getattr(taken, "shared", 0))

    def shard(self, worker: int) -> int | None:
        """The shard that a process is at."""
        shard = self._get(worker, self.SHARD)
        return None if shard < 0 else shard

    def waited_s(self, worker: int) -> float:
        """Since when it is there."""
        return (time.monotonic_ns() - self._get(worker, self.SINCE)) / 1e9

    def taken(self) -> int:
        """Bytes that the processes have for themselves, together; a process that keeps gaining is told of by log."""
        for worker in range(self.workers):
            has, parts = self._get(worker, self.MEMORY), self._get(worker, self.PARTS)
            if parts >= WARM and has > self._needed.setdefault(worker, has) + LEAK:
                gained = has - self._needed[worker]
                log.warning("loader process %d has gained %.1f GB since it began: it leaks", worker, gained / 1e9)
                self._needed[worker] = has
        return sum(self._get(worker, self.MEMORY) for worker in range(self.workers))

    def _set(self, worker: int, field: int, value: int) -> None:
        self._now[worker * len(self.FIELDS) + field] = value

    def _get(self, worker: int, field: int) -> int:
        return int(self._now[worker * len(self.FIELDS) + field])

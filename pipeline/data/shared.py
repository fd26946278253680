"""Memory that loader processes share with the trainer: the batches they write, and what each of them is doing.

Shapes: B = pairs of this rank's batch, C = 3, S = image size, L = context length.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Memory that a loader process may gain before it is spoken of.
LEAK = 1 << 30
# Parts that a process makes before its memory counts as what it needs.
WARM = 20

log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """One batch, to be written or read in place."""

    image_BCSS: Tensor  # noqa: N815  uint8, channels last
    token_BL: Tensor  # noqa: N815  int64
    id_B: Tensor  # noqa: N815  int64
    image_B: Tensor  # noqa: N815  int64


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
        # Not /dev/shm by torch's way, which containers keep so small: RawArray takes a file elsewhere if that is full.
        self._memory = {
            name: RawArray(ctypes.c_byte, int(np.prod(shape)) * np.dtype(self._types[name]).itemsize)
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
        return np.frombuffer(self._memory[name], self._types[name]).reshape(self._shapes[name])  # type: ignore[call-overload]


class Watch:
    """What each loader process is doing, written by itself and read by the trainer.

    Args:
        workers: their number.
    """

    FIELDS = PROCESS, SHARD, SINCE, MEMORY, PARTS = range(5)

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._now = RawArray(ctypes.c_int64, max(workers, 1) * len(self.FIELDS))
        self._needed: dict[int, int] = {}
        for worker in range(workers):
            self.at(worker, None)  # from now on it is to get on

    def begin(self, worker: int) -> None:
        """A process says that it is there."""
        self._set(worker, self.PROCESS, os.getpid())
        self.at(worker, None)

    def at(self, worker: int, shard: int | None) -> None:
        """A process says which shard it turns to; None for none."""
        self._set(worker, self.SHARD, -1 if shard is None else shard)
        self._set(worker, self.SINCE, time.monotonic_ns())

    def done(self, worker: int) -> None:
        """A process says that it has made a part."""
        self.at(worker, None)
        self._set(worker, self.PARTS, self._get(worker, self.PARTS) + 1)
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        self._set(worker, self.MEMORY, (resident - shared) * os.sysconf("SC_PAGE_SIZE"))

    def problem(self, awaited: int, timeout_s: float, name: Callable[[int], str]) -> str | None:
        """A process that has died, or has not got on for longer than `timeout_s`: a sentence about it.

        Args:
            awaited: the process whose part the trainer waits for; others may be idle for as long as they like.
            timeout_s: how long a process may be at one sample.
            name: shard → its name.
        """
        alive = {process.pid for process in multiprocessing.active_children()}
        stuck = []
        for worker in range(self.workers):
            process, shard = self._get(worker, self.PROCESS), self._get(worker, self.SHARD)
            where = "between two batches" if shard < 0 else f"at {name(shard)}"
            if process and process not in alive:
                return (
                    f"loader process {worker} ({process}) has died, {where}. Where memory was short (`dmesg` says), "
                    "lower data.workers or data.prefetch."
                )
            waited = (time.monotonic_ns() - self._get(worker, self.SINCE)) / 1e9
            if waited > timeout_s and (shard >= 0 or worker == awaited):
                stuck.append(
                    (shard < 0, -waited, f"loader process {worker} ({process or 'never started'}) has been {where}")
                )
        if not stuck:
            return None
        _, waited, sentence = min(stuck)
        return (
            f"{sentence} for {-waited:.0f} s, longer than data.timeout_s = {timeout_s:g}. Look at the disk or the "
            "server that the shard is on, or raise data.timeout_s."
        )

    def memory(self) -> int:
        """Bytes that the processes have for themselves, together; a process that keeps gaining is told of by log."""
        for worker in range(self.workers):
            has, parts = self._get(worker, self.MEMORY), self._get(worker, self.PARTS)
            if parts >= WARM and has > self._needed.setdefault(worker, has) + LEAK:
                gained = has - self._needed[worker]
                log.warning("loader process %d has gained %.1f GB since it began: it leaks", worker, gained / 1e9)
                self._needed[worker] = has
        return sum(self._get(worker, self.MEMORY) for worker in range(self.workers))

    def processes(self) -> set[int]:
        """Their numbers."""
        return {self._get(worker, self.PROCESS) for worker in range(self.workers)}

    def _set(self, worker: int, field: int, value: int) -> None:
        self._now[worker * len(self.FIELDS) + field] = value

    def _get(self, worker: int, field: int) -> int:
        return self._now[worker * len(self.FIELDS) + field]

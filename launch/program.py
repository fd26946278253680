"""Runs programs to their end, passes requests to stop on to them, and finds out how they really ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

# Of `python -m …` (contract 4).
DONE, FAILED, REQUEUE = 0, 1, 75


def state_of(code: int) -> str:
    """The state of what has ended with an exit code, in SLURM's words where it has one."""
    return {DONE: "COMPLETED", REQUEUE: "INTERRUPTED"}.get(code, "FAILED")


def standalone(processes: int) -> list[str]:
    """What comes before `-m PROGRAM`'s arguments where it is several ranks of one machine."""
    return ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []


class Programs:
    """Runs one program after the other. SIGTERM and Ctrl-C are passed on as SIGTERM: the trainer saves then."""

    def __init__(self) -> None:
        self._asked = False
        self._process: subprocess.Popen[bytes] | None = None
        self._previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """A program's exit code; 128 + N after death by signal N, as shells have it."""
        self._process = subprocess.Popen(command, start_new_session=True, env={**os.environ, **variables})
        if self._asked:  # … while it was being started
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def train(self, command: Sequence[str], variables: Mapping[str, str], run: Path) -> tuple[int, bool]:
        """A trainer's exit code, and whether it is the trainer's own word: torchrun's code for whatever failed is 1.

        RUN/exit.json counts where it is not the one that was there before. That is no matter of clocks, and the nodes
        of a job need not agree on who removes an old one.
        """
        before, _ = _verdict(run)
        code = self.run(command, variables)
        after, said = _verdict(run)
        return (said, True) if said is not None and after != before else (code, code == 0)

    def stopped(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._process:
            self._process.send_signal(signal.SIGTERM)


def _verdict(run: Path) -> tuple[tuple[int, int] | None, int | None]:
    """Which exit.json is there, and the code in it; opening it makes network file systems look again."""
    try:
        with (run / "exit.json").open(encoding="utf-8") as file:
            about = os.fstat(file.fileno())
            return (about.st_ino, about.st_mtime_ns), int(json.load(file)["code"])
    except (OSError, ValueError, KeyError):
        return None, None

"""What a pod of a job runs: the job's program, again after each stop, until it is done or the user must act.

Kubernetes starts failed pods again only after 10 s, 20 s, 40 s … 10 min, so what can go on in its pod does.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import typer

from launch.job import records
from launch.program import DONE, FAILED, REQUEUE, Programs, standalone

# Before the next start, so that the other nodes have noticed, and nobody meets what is about to end.
PAUSE_S = 5.0
# How long a node waits for the others to be started. What ends it before is the job's own limit, if it has one.
JOIN_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Pod:
    """One node of a job.

    Attributes:
        run: the run folder.
        job: by which Kubernetes knows this attempt of the job.
        index: which of its nodes this is.
        nodes: how many there are.
        processes: ranks on each.
        master: HOST:PORT of the first, where they meet.
        trains: whether the program is the trainer, which goes on where it stopped and says how it ended.
        restarts: how often it is started again.
        parts: as how many pods data is prepared; 0 where it is not.
    """

    run: Path
    job: str
    index: int
    nodes: int = 1
    processes: int = 1
    master: str = ""
    trains: bool = False
    restarts: int = 0
    parts: int = 0


def this_pod(run: Path, nodes: int, processes: int, trains: bool, restarts: int, parts: int) -> Pod:
    """The pod that this process runs in, by the variables that its manifest, Kubernetes and Trainer set."""
    index, job = int(os.environ["JOB_COMPLETION_INDEX"]), os.environ["JOB_UID"]
    master = f"{os.environ.get('PET_MASTER_ADDR', '')}:{os.environ.get('PET_MASTER_PORT', '')}"
    return Pod(run, job, index, nodes, processes, master, trains, restarts, parts)


def keep_running(pod: Pod, arguments: Sequence[str], pause_s: float = PAUSE_S) -> int:
    """Run `python -m ARGUMENTS` to its end, and return the pod's exit code.

    0 done; 75 stopped, as the pod was asked to; 1 and 2: starting it again would not help.
    """
    with Programs() as programs:
        code = DONE if _done(pod) else _again(pod, programs, _command(pod, arguments), pause_s)
        if code == DONE:
            _mark(pod).parent.mkdir(parents=True, exist_ok=True)
            _mark(pod).touch()
        if code == DONE and pod.parts and pod.index == 0:
            code = _last_step(pod, programs, arguments)
    return code


def _command(pod: Pod, arguments: Sequence[str]) -> list[str]:
    part = ["--part", f"{pod.index}/{pod.parts}"] if pod.parts else []
    launcher = standalone(pod.processes)
    if pod.nodes > 1:
        launcher = [
            *("torch.distributed.run", f"--nnodes={pod.nodes}", f"--nproc-per-node={pod.processes}"),
            *("--max-restarts=0", "--rdzv-backend=c10d", f"--rdzv-endpoint={pod.master}", f"--rdzv-id={pod.job}"),
            *(f"--rdzv-conf=is_host={int(pod.index == 0)},join_timeout={JOIN_S}", "-m"),
        ]
    return [sys.executable, "-m", *launcher, *arguments, *part]


def _again(pod: Pod, programs: Programs, command: list[str], pause_s: float) -> int:
    """Run the program until it is done, fails for good, or the pod is asked to stop."""
    code = DONE
    for attempt in range(pod.restarts + 1):
        if attempt:
            _say(f"ended with {code}; started again in {pause_s:.0f} s ({attempt} of at most {pod.restarts} times)")
            _sleep(programs, pause_s)
        _wait_for_first(pod, programs)
        if programs.stopped():
            return REQUEUE
        code, known = programs.train(command, {}, pod.run) if pod.trains else (programs.run(command, {}), True)
        if not known and "torch.distributed.run" in command:
            code = 128  # no rank has said why: they were killed, or never met
        if not (code == REQUEUE or code >= 128):
            return code
        if programs.stopped():
            return REQUEUE
    _say(f"error: ended with {code}, after {pod.restarts} restarts (max_restarts of the cluster file).")
    return FAILED


def _wait_for_first(pod: Pod, programs: Programs) -> None:
    """Let the first node begin: it may wait for a machine for hours, which torchrun on the others would not."""
    if pod.nodes == 1 or pod.index == 0:
        return
    host, _, port = pod.master.rpartition(":")
    while not programs.stopped():
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        _sleep(programs, 1)


def _last_step(pod: Pod, programs: Programs, arguments: Sequence[str]) -> int:
    """What needs all parts, on the first of their pods."""
    marks = [_mark(pod, index) for index in range(pod.parts)]
    while missing := [mark for mark in marks if not mark.exists()]:
        if programs.stopped():
            return REQUEUE
        _say(f"waiting for {len(missing)} of {pod.parts} parts")
        _sleep(programs, 30)
    return programs.run([sys.executable, "-m", *arguments], {})


def _done(pod: Pod) -> bool:
    """Whether this pod's share was done by a pod before it. Where nodes train together, one's end is everyone's."""
    indices = range(pod.nodes) if pod.trains else [pod.index]
    return any(_mark(pod, index).exists() for index in indices)


def _mark(pod: Pod, index: int | None = None) -> Path:
    """A file that says that a pod's share is done; a dataset holds nothing but what its manifest lists."""
    kept = records(pod.run, "data" if pod.parts else "train")
    return kept / f"done-{pod.job}-{pod.index if index is None else index}"


def _sleep(programs: Programs, seconds: float) -> None:
    """Sleep, but not past a request to stop."""
    until = time.monotonic() + seconds
    while not programs.stopped() and time.monotonic() < until:
        time.sleep(min(seconds, 0.2))


def _say(text: str) -> None:
    typer.echo(text, err=True)

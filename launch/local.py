"""Runs a job on this machine, stage after stage, each as one process or several."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launch import submission
from launch.cluster import LocalCluster
from launch.job import Job, LaunchError, Stage, Task
from launch.program import Programs, standalone, state_of
from launch.submission import Submission, Submitted


def render(job: Job, stages: Sequence[Stage], cluster: LocalCluster) -> dict[str, str]:
    """{name of a file: its text} of what would be run."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    lines += [shlex.join(command(stage, task)) for stage in stages for task in stage.tasks]
    return {"commands.sh": "\n".join(lines) + "\n"}


def submit(job: Job, stages: Sequence[Stage], cluster: LocalCluster, folder: Path) -> int:
    """Run all tasks one after the other, and return the first exit code that is not 0."""
    if any(stage.nodes > 1 for stage in stages):
        raise LaunchError(f"--nodes {job.nodes}: --cluster local is one machine. Use --processes for ranks on it.")
    codes: list[list[int]] = [[] for _ in stages]
    _record(job, stages, cluster, codes)
    for number, stage in enumerate(stages):
        for task in stage.tasks:
            code = run(stage, task, cluster.environment)
            codes[number].append(code)
            _record(job, stages, cluster, codes)
            if code:
                return code
    return 0


def _record(job: Job, stages: Sequence[Stage], cluster: LocalCluster, codes: Sequence[Sequence[int]]) -> None:
    """Note which process runs the stages, and how those of their tasks ended that have."""
    me = f"{os.getpid()}@{int(psutil.Process().create_time())}"
    jobs = (
        Submitted(stage.name, ":".join([me, *map(str, ended)]), tuple(str(task.run.absolute()) for task in stage.tasks))
        for stage, ended in zip(stages, codes, strict=True)
    )
    submission.record(job.records, Submission(cluster, tuple(jobs)))


def states(found: Submission) -> list[dict[str, Any]]:
    """Of each task {stage, run, id, state, restarts, reason, nodes}: COMPLETED, FAILED, INTERRUPTED, RUNNING, PENDING.

    Where nothing runs them any more, those that have not ended are KILLED, if they had begun, or CANCELLED.
    """
    waiting = ["RUNNING", "PENDING"] if _process(found) else ["KILLED", "CANCELLED"]
    rows = []
    for one in found.jobs:
        me, *codes = one.id.split(":")
        for number, run in enumerate(one.runs):
            code = int(codes[number]) if number < len(codes) else None
            if code is None:
                state = waiting[0]
                waiting[0] = waiting[1]
            else:
                state = state_of(code)
                if code:
                    waiting = ["CANCELLED", "CANCELLED"]
            reason = f"exit code {code}" if code else ""
            row = {"stage": one.stage, "run": run, "id": me, "state": state}
            rows.append(row | {"restarts": 0, "reason": reason, "nodes": ""})
    return rows


def cancel(found: Submission) -> None:
    """Ask what runs here to stop; the trainer saves then."""
    if process := _process(found):
        process.terminate()


def _process(found: Submission) -> psutil.Process | None:
    """The process that runs the stages, if it still does."""
    pid, _, began = found.jobs[0].id.partition(":")[0].partition("@")
    try:
        process = psutil.Process(int(pid))
        alive = int(process.create_time()) == int(began) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if alive else None


def command(stage: Stage, task: Task) -> list[str]:
    """A task's command line; under torchrun where there are several ranks."""
    return [sys.executable, "-m", *standalone(stage.processes), *task.arguments]


def run(stage: Stage, task: Task, environment: dict[str, str]) -> int:
    """Run a task to its end and return its exit code (torchrun would make it 1; exit.json keeps it).

    A stop request (SIGTERM, Ctrl-C) is passed on; the trainer then saves and the code is 75.
    """
    with Programs() as programs:
        if stage.name == "train":
            return programs.train(command(stage, task), environment, task.run)[0]
        return programs.run(command(stage, task), environment)

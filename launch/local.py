"""Runs a job on this machine, stage after stage, each as one process or several."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cluster import LocalCluster
from launch.job import Job, LaunchError, Stage, Task
from launch.program import Programs


def render(job: Job, stages: Sequence[Stage], cluster: LocalCluster) -> dict[str, str]:
    """{name of a file: its text} of what would be run."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    lines += [shlex.join(command(stage, task)) for stage in stages for task in stage.tasks]
    return {"commands.sh": "\n".join(lines) + "\n"}


def submit(job: Job, stages: Sequence[Stage], cluster: LocalCluster, folder: Path) -> int:
    """Run all tasks one after the other, and return the first exit code that is not 0."""
    if any(stage.nodes > 1 for stage in stages):
        raise LaunchError(f"--nodes {job.nodes}: --cluster local is one machine. Use --processes for ranks on it.")
    for stage in stages:
        for task in stage.tasks:
            if code := run(stage, task, cluster.environment):
                return code
    return 0


def command(stage: Stage, task: Task) -> list[str]:
    """A task's command line; under torchrun where there are several ranks."""
    python = [sys.executable, "-m"]
    if stage.processes > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={stage.processes}", "-m"]
    return [*python, *task.arguments]


def run(stage: Stage, task: Task, environment: dict[str, str]) -> int:
    """Run a task to its end and return its exit code (torchrun would make it 1; exit.json keeps it).

    A stop request (SIGTERM, Ctrl-C) is passed on; the trainer then saves and the code is 75.
    """
    with Programs() as programs:
        if stage.name == "train":
            return programs.train(command(stage, task), environment, task.run)[0]
        return programs.run(command(stage, task), environment)

"""What was submitted: the rendered scripts, and by which ids the scheduler knows them.

It is kept in RUN/launch, or beside a dataset as OUT.launch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import cluster
from launch.job import LaunchError, records

RECORD = "submission.json"
# What jobs print, where that is kept in files.
LOGS = "logs"
# ENDED + id: the exit code that a job's script leaves.
ENDED = "ended-"


@dataclass(frozen=True)
class Submitted:
    """One stage at a scheduler.

    Attributes:
        stage: its name.
        id: what the scheduler calls it.
        runs: the run folder of each of its tasks.
    """

    stage: str
    id: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """All that `status`, `logs` and `cancel` need to know."""

    cluster: cluster.AnyCluster
    jobs: tuple[Submitted, ...]


def folder(run: Path) -> Path:
    """Where it is kept for a run, or for a dataset."""
    beside = records(run, "data")
    return beside if beside.is_dir() else records(run, "train")


def keep(folder: Path, files: dict[str, str]) -> Path:
    """Write what will be submitted, in place of what an earlier submission has left, and return the folder.

    The record of that, and how its jobs ended, stay: they may still be looked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.name != RECORD and not path.name.startswith(ENDED):
            path.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def record(folder: Path, submission: Submission) -> None:
    """Say what was submitted."""
    values = {
        "cluster": submission.cluster.model_dump(mode="json"),
        "jobs": [asdict(one) for one in submission.jobs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORD
    new = path.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1), encoding="utf-8")
    new.replace(path)  # at once, for those that read it meanwhile


def recorded(run: Path) -> Submission:
    """What was submitted for a run.

    Raises:
        LaunchError: nothing was.
    """
    path = folder(run) / RECORD
    if not path.is_file():
        raise LaunchError(f"{path} is not there: nothing was submitted with --run {run}.")
    values = json.loads(path.read_text(encoding="utf-8"))
    jobs = tuple(Submitted(one["stage"], one["id"], tuple(one["runs"])) for one in values["jobs"])
    return Submission(cluster.parse(values["cluster"]), jobs)

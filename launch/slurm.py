"""Jobs on SLURM: one sbatch script a stage, an array where it has several tasks."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from launch import network, submission
from launch.cluster import SlurmCluster
from launch.job import Job, LaunchError, Stage, seconds
from launch.submission import Submission, Submitted

TEMPLATE = Path(__file__).parent / "templates/job.sbatch.j2"
# scontrol and sbatch answer at once, or the controller is not there.
PATIENCE_S = 60
# Before its time limit, a job that has not ended by itself is requeued.
REQUEUE_S = 5
# Of the user's own variables; others may be secrets, or differ from run to run.
KEPT = "HOME,USER,LOGNAME,PATH,LANG"
# What sbatch says → the fix.
FIXES = {
    "invalid partition": "`partition` of the cluster file; `sinfo` lists them",
    "Invalid account": "`account` and `partition` of the cluster file; `sacctmgr show assoc user=$USER` lists them",
    "Invalid qos": "`qos` of the cluster file; `sacctmgr show qos` lists them",
    "node configuration is not available": "fewer --nodes, or fewer GPUs, cores or memory a node (the cluster file); "
    "`sinfo -N -l` shows what nodes have",
    "Node count specification invalid": "fewer --nodes; `sinfo` shows how many the partition has",
    "time limit": "a shorter --time; `scontrol show partition` shows MaxTime",
    "Invalid feature": "`constraint` of the cluster file; `sinfo -o %f` lists features",
    "Unable to contact slurm controller": "is this a login node of the cluster? `scontrol ping` must say UP",
}


class GoneError(LaunchError):
    """A job has ended, perhaps so long ago that SLURM has forgotten it."""


def render(job: Job, stages: Sequence[Stage], cluster: SlurmCluster) -> dict[str, str]:
    """{STAGE.sbatch: its text}, which `sbatch` takes as it is.

    Raises:
        LaunchError: the run folder, the time or the secrets are not as they must be.
    """
    from jinja2 import Environment, StrictUndefined

    _check(job, cluster)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = _quoted
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return {f"{stage.name}.sbatch": template.render(_values(job, stage, cluster)) for stage in stages}


def _quoted(value: object) -> str:
    """One word of a script; shlex.quote leaves = bare, which shellcheck takes for a mistake at the start of a value."""
    word = str(value)
    return f"'{word}'" if word.startswith("=") else shlex.quote(word)


def _check(job: Job, cluster: SlurmCluster) -> None:
    folder = job.run.absolute()
    if cluster.shared and not any(folder.is_relative_to(one) for one in cluster.shared):
        names = ", ".join(str(one) for one in cluster.shared)
        raise LaunchError(f"--run {job.run}: {folder} lies on none of the file systems that nodes share ({names}).")
    if not str(folder).isprintable():
        raise LaunchError(f"--run {str(job.run)!r}: a line of a script cannot hold such a name.")
    limit = seconds(job.time or cluster.time)
    if limit <= cluster.stop_seconds:
        raise LaunchError(
            f"--time {job.time or cluster.time}: that leaves nothing before the job is asked to stop, stop_seconds = "
            f"{cluster.stop_seconds} before its end. Raise the one, or lower the other in the cluster file."
        )
    if cluster.secrets:
        path = cluster.secrets.expanduser()
        if not path.is_file():
            raise LaunchError(f"secrets: {path} of the cluster file is not there. It holds NAME=VALUE lines.")
        if path.stat().st_mode & 0o077:
            raise LaunchError(
                f"secrets: others may read {path}. Take that from them: chmod 600 {shlex.quote(str(path))}"
            )


def _values(job: Job, stage: Stage, cluster: SlurmCluster) -> dict[str, Any]:
    """What the template is filled in with."""
    python = [cluster.python]
    if cluster.container:
        binds = [word for one in cluster.shared for word in ("--bind", str(one))]
        gpus = ["--nv"] if _gpus(stage, cluster) else []
        python = ["apptainer", "exec", *gpus, *binds, cluster.container, "python"]
    torchrun = _by_torchrun(stage, cluster)
    return {
        "options": list(options(job, stage, cluster)),
        "records": job.records.absolute(),
        "tasks": [{"run": task.run.absolute(), "arguments": task.arguments} for task in stage.tasks],
        "python": python,
        "torchrun": torchrun,
        "trains": stage.name == "train",
        "nodes": stage.nodes,
        "processes": stage.processes,
        "cpus_per_task": _cpus_per_task(stage, cluster),
        "threads": cluster.cpus_per_process,
        "stop_seconds": cluster.stop_seconds,
        "patience": max(1, cluster.stop_seconds - REQUEUE_S),
        "meet_seconds": cluster.meet_seconds,
        "max_restarts": cluster.max_restarts,
        "modules": cluster.modules,
        "setup": cluster.setup,
        "secrets": cluster.secrets and cluster.secrets.expanduser(),
        "variables": [
            *network.explained(cluster.network, cluster.interface),
            *(network.Setting(name, value, "") for name, value in cluster.environment.items()),
        ],
    }


def options(job: Job, stage: Stage, cluster: SlurmCluster) -> Iterator[str]:
    """What a stage asks of sbatch, as its #SBATCH lines have it."""
    several = len(stage.tasks) > 1
    log = job.records.absolute() / submission.LOGS / f"{stage.name}-{'%A_%a' if several else '%j'}.log"
    pattern = str(log.parent).replace("%", "%%") + "/" + log.name
    asked = {
        "job-name": f"{job.run.name}-{stage.name}",
        "output": pattern,
        "chdir": str(Path.cwd()),
        "nodes": stage.nodes,
        "ntasks-per-node": 1 if _by_torchrun(stage, cluster) else stage.processes,
        "cpus-per-task": _cpus_per_task(stage, cluster),
        "time": job.time or cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": cluster.memory_gb and f"{cluster.memory_gb}G",
        "gres": _gpus(stage, cluster),
        "array": several and f"0-{len(stage.tasks) - 1}",
        "signal": f"B:USR1@{cluster.stop_seconds}",
        "export": KEPT,
        "open-mode": "append",
    }
    yield "--requeue"
    yield from (f"--{name}={shlex.quote(str(value))}" for name, value in asked.items() if value)
    yield from cluster.sbatch


def _by_torchrun(stage: Stage, cluster: SlurmCluster) -> bool:
    """Whether a task is a node, on which torchrun starts the ranks; else each rank is a task."""
    return cluster.launcher == "torchrun" and stage.nodes * stage.processes > 1


def _cpus_per_task(stage: Stage, cluster: SlurmCluster) -> int:
    return cluster.cpus_per_process * (stage.processes if _by_torchrun(stage, cluster) else 1)


def _gpus(stage: Stage, cluster: SlurmCluster) -> str:
    """The GPUs of a node, as --gres has them."""
    if not (stage.gpus and cluster.gpus_per_node):
        return ""
    return cluster.gres or f"gpu:{stage.processes}"


def submit(job: Job, stages: Sequence[Stage], cluster: SlurmCluster, folder: Path) -> int:
    """Hand the stages over, each to begin once the one before is done; sbatch looks at all of them first.

    Raises:
        LaunchError: SLURM refuses one. None was submitted if the trial found that; else those before it were.
    """
    (folder / submission.LOGS).mkdir(exist_ok=True)
    for stage in stages:
        ask("sbatch", "--test-only", str(folder / f"{stage.name}.sbatch"))
    submitted: list[Submitted] = []
    for stage in stages:
        words = ["--parsable", "--kill-on-invalid-dep=yes"]
        if submitted:
            kind = "aftercorr" if stage.each_after_its_own and len(stage.tasks) > 1 else "afterok"
            words.append(f"--dependency={kind}:{submitted[-1].id}")
        number = ask("sbatch", *words, str(folder / f"{stage.name}.sbatch")).strip().partition(";")[0]
        submitted.append(Submitted(stage.name, number, tuple(str(task.run.absolute()) for task in stage.tasks)))
        submission.record(job.records, Submission(cluster, tuple(submitted)))
    return 0


def cancel(found: Submission) -> None:
    """Take all stages back, the last one first, so that none begins because another ended.

    Training is asked to stop before, and given stop_seconds for saving; scancel would leave it KillWait of slurm.conf.
    """
    assert isinstance(found.cluster, SlurmCluster)
    ids, asked = [one.id for one in reversed(found.jobs)], set[str]()
    _scancel("--state=PENDING", *ids)
    until = time.monotonic() + found.cluster.stop_seconds
    try:
        while (training := _training(found)) and time.monotonic() < until:
            if not asked:
                typer.echo(f"waits until it is saved, {found.cluster.stop_seconds} s at the most", err=True)
            for id_ in set(training) - asked:
                _scancel("--batch", "--signal=USR1", id_)
            asked.update(training)
            time.sleep(0.5)
    finally:  # also if somebody does not wait for it: it would requeue itself once it is saved
        _scancel(*ids)


def _scancel(*words: str) -> None:
    with contextlib.suppress(GoneError):  # one of the jobs has ended by itself; the others were told all the same
        ask("scancel", *words)


def _training(found: Submission) -> list[str]:
    return [one["id"] for one in states(found) if one["stage"] == "train" and one["state"] == "RUNNING"]


def states(found: Submission) -> list[dict[str, Any]]:
    """Of each task {stage, run, id, state, restarts, reason, nodes, began}, as the controller knows it.

    A job that ended some minutes ago (MinJobAge of slurm.conf) is forgotten: its state is "".
    """
    rows = []
    for one in found.jobs:
        lines: list[str] = []
        with contextlib.suppress(GoneError):
            lines = ask("scontrol", "show", "job", one.id, "--oneliner").splitlines()
        # A line for each task that has begun, and one for all that wait.
        told = sorted(map(fields, lines), key=lambda job: job.get("ArrayTaskId", "").isdigit())
        by_task = {number: job for job in told for number in _tasks(job, len(one.runs))}
        for number, run in enumerate(one.runs):
            job = by_task.get(number, {})
            rows.append(
                {
                    "stage": one.stage,
                    "run": run,
                    "id": f"{one.id}_{number}" if len(one.runs) > 1 else one.id,
                    "state": job.get("JobState", ""),
                    "restarts": int(job.get("Restarts", "0")),
                    "reason": job.get("Reason", "").removeprefix("None"),
                    "nodes": job.get("NodeList", "").removeprefix("(null)"),
                    "began": _began(job.get("StartTime", "")),
                }
            )
    return rows


def fields(line: str) -> dict[str, str]:
    """What a line of scontrol's NAME=VALUE words says."""
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def _began(time: str) -> float | None:
    """The time, in seconds as time.time() has them, of 2026-01-31T09:30:00 here; None of Unknown."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return None


def _tasks(job: dict[str, str], count: int) -> Iterator[int]:
    """Which of `count` tasks a line is about: 0, or those of an ArrayTaskId like 3 or 0,2,4-7%2."""
    ids = job.get("ArrayTaskId", "0").partition("%")[0]
    if "..." in ids:  # SLURM cuts long lists; those that have begun have lines of their own
        yield from range(int(re.split(r"\D", ids)[0]), count)
        return
    for first, last, step in re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", ids):
        yield from range(int(first), int(last or first) + 1, int(step or 1))


def ask(*words: str, patience_s: float = PATIENCE_S) -> str:
    """What a command of SLURM's says.

    Raises:
        LaunchError: it is not installed, refuses, or does not answer.
        GoneError: the job it is about has ended, or is not known any more.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience_s)
    except FileNotFoundError as error:
        raise LaunchError(
            f"{words[0]}: not found. SLURM's commands must be in PATH where jobs are submitted."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{words[0]}: no answer in {patience_s:.0f} s. `scontrol ping` must say UP.") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if "Invalid job id" in said:
            raise GoneError(f"{shlex.join(words)}: {said}")
        fix = next((fix for key, fix in FIXES.items() if key.lower() in said.lower()), "")
        raise LaunchError(f"{shlex.join(words)}: {said}" + (f" The fix: {fix}." if fix else ""))
    return done.stdout

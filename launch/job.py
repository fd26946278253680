"""What to run: one Job, and the stages that it falls into, independent of where it runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

STAGES = ("train", "evaluate", "export", "data")
# What of an address lets whoever reads it in: user and password, a token instead, or a signed query.
SECRET_ADDRESS = re.compile(
    r"(?<=://)[^/\s@]*:[^/\s]*@|(?<=http://)[^/\s]+@|(?<=https://)[^/\s]+@"
    r"|(?<=[?&])[^=&\s]*(?:sig|signature|token|key|secret|credential|passw(?:or)?d)=[^&\s]+",
    re.IGNORECASE,
)
# Stages that may follow one that is done; all work on the same run folder.
FOLLOWERS = ("evaluate", "export")


class LaunchError(Exception):
    """Something that the user must change before a job can start."""


def seconds(time: str) -> int:
    """Seconds of [D-]HH:MM:SS.

    Raises:
        ValueError: it is nothing of the kind.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", time)
    if not found:
        raise ValueError(f"{time!r} is no time limit; write [D-]HH:MM:SS, such as 24:00:00 or 2-00:00:00")
    days, hours, minutes, rest = (int(number or 0) for number in found.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not total:
        raise ValueError(f"{time!r} leaves no time at all")
    return total


def records(run: Path, what: str) -> Path:
    """Where scripts, logs and ids are kept: in the run folder, but beside a dataset, which holds nothing else."""
    return Path(f"{run.absolute()}.launch") if what == "data" else run / "launch"


@dataclass(frozen=True)
class Job:
    """What a user asks for.

    Attributes:
        run: the run folder; an unfinished run there goes on. For `what` = data, the folder of the dataset.
        what: train, evaluate, export or data.
        recipe: a recipe's name or .yaml file, for training.
        data: the sharded datasets, as the trainer's --data takes them ("DIR [DIR@WEIGHT …]"), or the dataset to
            evaluate on; for `what` = data, the sources ("coco=/data/coco vqa=/data/vqa").
        nodes: machines. Data is prepared by as many parts.
        processes: ranks on each node, one a GPU where it has GPUs; None for the cluster's number.
        time: time limit, [D-]HH:MM:SS; None for the cluster's.
        settings: changes to the recipe, `section.key=value`, or further words for the other stages.
        sweep: `section.key=value,value…`; one run for each combination.
        then: stages that follow on the same run once it is trained: evaluate, export.
        evaluate_on: the dataset for the evaluate stage that follows training; by default the first of `data`.
    """

    run: Path
    what: str = "train"
    recipe: str = ""
    data: str = ""
    nodes: int = 1
    processes: int | None = None
    time: str | None = None
    settings: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    evaluate_on: str = ""

    @property
    def records(self) -> Path:
        """Where scripts, logs and ids are kept."""
        return records(self.run, self.what)

    def __post_init__(self) -> None:
        if self.what not in STAGES:
            raise LaunchError(f"--what {self.what}: not known. Known are {', '.join(STAGES)}.")
        for name, count in (("--nodes", self.nodes), ("--processes", self.processes)):
            if count is not None and count < 1:
                raise LaunchError(f"{name} must be at least 1; found {count}.")
        if self.time is not None:
            try:
                seconds(self.time)
            except ValueError as error:
                raise LaunchError(f"--time: {error}.") from error
        if self.what in ("train", "evaluate", "data") and not self.data.strip():
            raise LaunchError("--data names no dataset. `python -m data_prep build` makes one.")
        if self.what == "train" and not self.recipe:
            raise LaunchError("--recipe names no recipe. `python -m pipeline recipes` lists them.")
        if self.what != "train" and (self.sweep or self.then):
            raise LaunchError(f"--sweep and --then are for training; found --what {self.what}.")
        for stage in self.then:
            if stage not in FOLLOWERS:
                raise LaunchError(f"--then {stage}: not known. Known are {', '.join(FOLLOWERS)}.")
        for word in (self.recipe, self.data, str(self.run), self.evaluate_on, *self.settings, *self.sweep):
            if found := SECRET_ADDRESS.search(word):
                raise LaunchError(
                    f"{word[: found.start()]}…: an address with a password or a key would be in scripts and "
                    "logs. Leave it out, and put it where its library looks (environment from a file: `secrets` of the "
                    "cluster file)."
                )


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        arguments: of `python -m`.
        run: the folder that it works on.
    """

    arguments: tuple[str, ...]
    run: Path


@dataclass(frozen=True)
class Stage:
    """Tasks that may run at once, each on machines of its own: an array where there are several.

    Attributes:
        name: train, evaluate, export, data, or data-end.
        tasks: alike in shape.
        nodes: machines a task.
        processes: ranks on each of them, that meet in one process group where there is more than one in all.
        gpus: whether each rank has a GPU of its own, on a cluster with GPUs.
        each_after_its_own: whether task i waits for task i of the stage before only, not for all of them.
    """

    name: str
    tasks: tuple[Task, ...]
    nodes: int = 1
    processes: int = 1
    gpus: bool = True
    each_after_its_own: bool = False


def stages(job: Job, processes: int) -> list[Stage]:
    """The stages of a job in order, with `processes` ranks on each node where the job does not say."""
    processes = job.processes or processes
    if job.what == "data":
        return list(_data_stages(job))
    if job.what != "train":
        return [_following(job.what, (job,), processes)]
    variants = tuple(_variants(job))
    trained = tuple(Task(_train(one, job.nodes * processes), one.run) for one in variants)
    following = (_following(name, variants, processes) for name in job.then)
    return [Stage("train", trained, job.nodes, processes), *following]


def _train(job: Job, world: int) -> tuple[str, ...]:
    words = ("pipeline", "train", job.recipe, str(job.run), "--data", job.data, *job.settings)
    return (*words, f"train.processes={world}")


def _following(name: str, variants: tuple[Job, ...], processes: int) -> Stage:
    """Evaluation or export of runs; they follow training, or are a job of their own with words of their own."""
    tasks = []
    for job in variants:
        words = () if job.what == "train" else job.settings
        data = job.evaluate_on or job.data.split()[0].rpartition("@")[0] or job.data.split()[0] if job.data else ""
        on = ("--data", data) if name == "evaluate" else ()
        tasks.append(Task(("pipeline", name, str(job.run), *on, *words), job.run))
    ranks = processes if name == "evaluate" else 1
    return Stage(name, tuple(tasks), 1, ranks, gpus=name == "evaluate", each_after_its_own=True)


def _data_stages(job: Job) -> Iterator[Stage]:
    """As many parts as nodes, and then whatever needs all of them."""
    words = ("data_prep", "build", *job.data.split(), "--out", str(job.run), *job.settings)
    if job.nodes > 1:
        parts = tuple(Task((*words, "--part", f"{part}/{job.nodes}"), job.run) for part in range(job.nodes))
        yield Stage("data", parts, gpus=False)
    yield Stage("data-end" if job.nodes > 1 else "data", (Task(words, job.run),), gpus=False)


def _variants(job: Job) -> Iterator[Job]:
    """The job itself, or one for each combination of a sweep's values, in a run folder named after them."""
    choices = []
    for sweep in job.sweep:
        name, equals, values = sweep.partition("=")
        if not equals or not name or not values:
            raise LaunchError(f"--sweep {sweep}: found no KEY=VALUE,VALUE…, such as optim.lr=1e-4,5e-4.")
        # Commas inside brackets belong to a value: data.crop_scale=[.5,1],[.9,1]
        choices.append([f"{name}={value}" for value in re.split(r",(?![^\[{]*[\]}])", values)])
    for combination in itertools.product(*choices):
        run = job.run / ",".join(combination).replace("/", "_") if combination else job.run
        yield replace(job, run=run, settings=(*job.settings, *combination), sweep=())

"""python -m launch COMMAND: start the stages on a machine."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.demo import IMAGES
from launch.job import Job, LaunchError, stages

if TYPE_CHECKING:
    from launch.cluster import AnyCluster
    from launch.submission import Submission

USER_MUST_ACT = 2
# States, in SLURM's words, of jobs that still write their run folder, or will.
ACTIVE = {
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED"),
    *("COMPLETING", "STAGE_OUT", "REQUEUED", "REQUEUE_HOLD"),
}

RunOption = Annotated[Path, typer.Option(help="The run folder; an unfinished run there goes on.")]
RunArgument = Annotated[Path, typer.Argument(help="The run folder that was submitted with.", metavar="RUN")]
ClusterOption = Annotated[str, typer.Option(help="A file of launch/clusters by name, or a .yaml file.")]
WhatOption = Annotated[str, typer.Option(help="train, evaluate, export, or data (RUN is then the dataset's folder).")]
RecipeOption = Annotated[str, typer.Option(help="A recipe's name or a .yaml file.")]
DataOption = Annotated[
    str,
    typer.Option(
        help="Sharded datasets, each with its weight; for --what data, the sources: NAME=PATH …",
        metavar="DIR[@WEIGHT]…",
    ),
]
NodesOption = Annotated[int, typer.Option(help="Machines; data is prepared in as many parts.")]
ProcessesOption = Annotated[
    int | None, typer.Option(help="Ranks on each node: CPU processes (gloo), or one a GPU (nccl). By cluster file.")
]
TimeOption = Annotated[str | None, typer.Option(help="Time limit; by cluster file.", metavar="[D-]HH:MM:SS")]
SweepOption = Annotated[
    list[str] | None,
    typer.Option(help="One run for each value; several --sweep: for each combination.", metavar="KEY=VALUE,VALUE…"),
]
ThenOption = Annotated[
    list[str] | None, typer.Option(help="What follows once a run is trained: evaluate, export. Repeat for both.")
]
EvaluateOnOption = Annotated[
    str, typer.Option(help="Dataset for --then evaluate; by default the first of --data.", metavar="DIR")
]
SettingsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as optim.lr=1e-3; for other stages, further words after --.",
        metavar="[KEY=VALUE]…",
    ),
]

app = typer.Typer(
    help="Start the pipeline: the demo, or jobs on this machine, SLURM or Kubernetes.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="Where everything is written; an earlier demo there is removed.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the sample data, the weights and the order of samples.")] = 0,
    images: Annotated[int, typer.Option(help="Images to generate; fewer are faster and teach less.")] = IMAGES,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the demo recipe, such as train.steps=100.", metavar="[KEY=VALUE]…"),
    ] = None,
) -> None:
    """From nothing to a report: sample data, shards, tokenizer, training, evaluation, export."""
    from launch.demo import demo as run_demo

    run_demo(run, seed, images=images, settings=tuple(settings or ()))


@app.command("render", help="Print the scripts or manifests that `submit` would hand over, and submit nothing.")
@app.command(
    "submit",
    help="Start a job. On this machine: wait for it, and exit as it does (0 done, 2 change something, 75 again).",
)
def submit_or_render(
    context: typer.Context,
    run: RunOption,
    cluster: ClusterOption = "local",
    what: WhatOption = "train",
    recipe: RecipeOption = "",
    data: DataOption = "",
    nodes: NodesOption = 1,
    processes: ProcessesOption = None,
    time: TimeOption = None,
    sweep: SweepOption = None,
    then: ThenOption = None,
    evaluate_on: EvaluateOnOption = "",
    settings: SettingsArgument = None,
) -> None:
    """Two commands that take the same words."""
    from launch import cluster as clusters
    from launch import submission

    job = Job(
        run,
        what,
        recipe=recipe,
        data=data,
        nodes=nodes,
        processes=processes,
        time=time,
        settings=tuple(settings or ()),
        sweep=tuple(sweep or ()),
        then=tuple(then or ()),
        evaluate_on=evaluate_on,
    )
    site = clusters.load(cluster)
    parts = stages(job, site.processes)
    backend = _backend(site)
    if context.info_name == "render":
        files = backend.render(job, parts, site)
        for name, text in files.items():
            typer.echo(f"# --- {job.records / name}\n{text}" if len(files) > 1 else text, nl=False)
        return
    _refuse_a_second({run, *(task.run for part in parts for task in part.tasks)})
    folder = submission.keep(job.records, backend.render(job, parts, site))
    raise typer.Exit(backend.submit(job, parts, site, folder))


@app.command()
def status(run: RunArgument) -> None:
    """Say how a run's jobs are getting on: state, nodes, restarts, and of training step, rate, loss and time left."""
    from launch import follow

    found = _submitted(run)
    follow.show(follow.rows(run, found, _backend(found.cluster).states if found else lambda _: []))


@app.command()
def logs(
    run: RunArgument,
    lines: Annotated[int, typer.Option(min=1, help="Of each job.")] = 50,
) -> None:
    """Print the last lines of a run's jobs: of the rank that failed first, where one did."""
    from launch import follow

    found = _submitted(run)
    backend = _backend(found.cluster) if found else None
    if found and backend and hasattr(backend, "last_lines"):  # logs that are no files here
        typer.echo(backend.last_lines(found, lines))
        return
    typer.echo(follow.last_lines(run, found, backend.states(found) if backend else [], lines))


@app.command()
def cancel(run: RunArgument) -> None:
    """Take a submitted run back. It is asked to stop, saves, and the same `submit` goes on with it."""
    from launch import submission

    found = submission.recorded(run)
    _backend(found.cluster).cancel(found)


@app.command()
def doctor(
    cluster: ClusterOption = "local",
    folder: Annotated[Path, typer.Option(help="Where run folders will be.", metavar="DIR")] = Path("runs"),
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes jobs will have.")] = 2,
    wait: Annotated[int, typer.Option(min=1, help="Seconds that the job which is tried may wait for nodes.")] = 120,
) -> None:
    """Check a site, also by a job that sums numbers over its nodes, and say what to change.

    Exit codes: 0 jobs will run; 2 something must be changed first.
    """
    from rich.console import Console

    from launch import cluster as clusters
    from launch import doctor as checks

    console = Console()
    with console.status("checking"):
        findings = list(checks.doctor(clusters.load(cluster), folder, nodes, wait))
    console.print(checks.table(findings))
    raise typer.Exit(USER_MUST_ACT if any(one.state == "fail" for one in findings) else 0)


@app.command(hidden=True)
def check_node(
    folder: Annotated[Path, typer.Option(help="What is kept of the job, which all nodes must see.")],
    token: Annotated[str, typer.Option(help="A file there that the first node has written.")],
    master: Annotated[str, typer.Option(help="The first node's address.")],
    port: Annotated[int, typer.Option(help="Where the ranks will meet.")],
    nodes: Annotated[int, typer.Option(help="How many nodes the job has.")],
    meet: Annotated[int, typer.Option(help="Seconds that they wait for each other.")],
) -> None:
    """What a job's batch script runs on each node before the program: is there what the program needs?"""
    from launch import preflight

    node = preflight.this_node(folder, token, master, port, nodes)
    problems, warnings = preflight.check(node, meet)
    if problems or warnings:
        typer.echo(preflight.report(node, problems, warnings), err=True)
    raise typer.Exit(USER_MUST_ACT if problems else 0)


@app.command(hidden=True)
def pod(
    arguments: Annotated[list[str], typer.Argument(help="After --: of `python -m`.")],
    run: RunOption,
    folder: Annotated[str, typer.Option(help="Where relative paths begin.")] = "",
    nodes: Annotated[int, typer.Option(help="How many nodes train together.")] = 1,
    processes: Annotated[int, typer.Option(help="Ranks on each.")] = 1,
    trains: Annotated[bool, typer.Option("--trains", help="It is the trainer.")] = False,
    restarts: Annotated[int, typer.Option(help="How often it is started again in this pod.")] = 0,
    parts: Annotated[int, typer.Option(help="As how many pods data is prepared.")] = 0,
) -> None:
    """What each pod of a job on Kubernetes runs: a program, again after each stop."""
    from launch import pod as pods

    if folder:
        os.chdir(folder)
    raise typer.Exit(pods.keep_running(pods.this_pod(run, nodes, processes, trains, restarts, parts), arguments))


def _submitted(run: Path) -> Submission | None:
    """What was submitted for a run; None for one that was started otherwise."""
    from launch import submission

    there = (submission.folder(run) / submission.RECORD).is_file()
    return submission.recorded(run) if there else None


def _refuse_a_second(runs: set[Path]) -> None:
    """Two jobs that write one run folder would spoil it; the runs of a sweep are known to the sweep alone."""
    runs = {run.absolute() for run in runs}
    for folder in sorted(runs | {run.parent for run in runs}):
        found = _submitted(folder)
        states = _backend(found.cluster).states(found) if found else []
        active = [one for one in states if one["state"] in ACTIVE]
        if own := [one for one in active if folder in runs or folder / Path(one["run"]).name in runs]:
            told = ", ".join(f"{one['id']} ({one['state']})" for one in own)
            raise LaunchError(
                f"--run {own[0]['run']} is being worked on: {told}. Wait, or take that back first: "
                f"python -m launch cancel {shlex.quote(str(folder))}"
            )


def _backend(site: AnyCluster) -> Any:
    """The module that renders, submits, looks after and cancels on such a cluster; loaded when it is wanted."""
    return importlib.import_module(f"launch.{site.backend}")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        app(argv)
    except LaunchError as error:
        typer.echo(f"error: {error}", err=True)
        return USER_MUST_ACT
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m launch COMMAND: start the stages on a machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.demo import IMAGES
from launch.job import Job, LaunchError

USER_MUST_ACT = 2

app = typer.Typer(
    help="Start the pipeline: the demo, or a training job on one or several processes of this machine.",
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


@app.command()
def submit(
    recipe: Annotated[str, typer.Option(help="A recipe's name or a .yaml file.")],
    data: Annotated[
        str, typer.Option(help="Sharded datasets to train on, each with its weight.", metavar="DIR[@WEIGHT]…")
    ],
    run: Annotated[Path, typer.Option(help="The run folder; an unfinished run there goes on.")],
    cluster: Annotated[str, typer.Option(help="Where to run. Known: local, this machine.")] = "local",
    processes: Annotated[int, typer.Option(help="Ranks: CPU processes (gloo), or one a GPU (nccl).")] = 1,
    settings: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe, such as optim.lr=1e-3.", metavar="[KEY=VALUE]…")
    ] = None,
) -> None:
    """Start a training job and wait for it. Exit codes are the trainer's: 0 done, 2 change something, 75 run again."""
    from launch import local

    backends = {"local": local.run}
    if cluster not in backends:
        raise LaunchError(f"--cluster {cluster}: not known. Known are {', '.join(backends)}.")
    raise typer.Exit(backends[cluster](Job(recipe, data, run, processes, tuple(settings or ()))))


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

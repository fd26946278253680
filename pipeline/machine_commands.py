"""The commands that look at machines rather than at data or models; they import what they need when they run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.failure import FAILED

app = typer.Typer()


@app.command("plan-memory")
def plan_memory(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `recipes`) or a .yaml file.", metavar="RECIPE")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe, such as train.batch_size=4096.", metavar="[KEY=VALUE]…"),
    ] = None,
    gpu_gb: Annotated[
        list[float] | None,
        typer.Option(help="A device's memory in GB, repeat for several. By default this machine's, or 24, 40, 80."),
    ] = None,
    world: Annotated[int, typer.Option(min=1, help="Ranks that the batch is divided by.")] = 1,
) -> None:
    """Say what a rank's device memory goes to, and how many pairs at a time fit; no GPU is needed."""
    from rich.console import Console

    from pipeline import config, memory

    Console().print(memory.report(config.load(recipe, settings or []), world, gpu_gb or ()))


@app.command("gpu-check")
def gpu_check(
    out: Annotated[Path, typer.Option(help="Where the figures are written.", metavar="FILE")] = Path("gpu-check.json"),
    device: Annotated[str, typer.Option(help="cuda; or cpu, for the same checks at a small size.")] = "cuda",
) -> None:
    """Run what needs a CUDA device, for ten minutes at the most, and write what each check measured as it ends.

    Exit codes: 0 all is well; 2 there is no such device; 1 a check failed, or there was no time left for it.
    """
    from pipeline.gpu_check import gpu_check as run_checks

    if not run_checks(out, device):
        raise typer.Exit(FAILED)


@app.command("network-check")
def network_check(
    sizes: Annotated[
        list[float] | None, typer.Option("--mb", help="Megabytes to sum; repeat for several. By default, by backend.")
    ] = None,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds that ranks wait for each other.")] = 60,
) -> None:
    """Sum numbers over the ranks that a launcher started: are the sums right, and how fast is the network?

    Start it as training is started. Rank 0 prints one line of JSON on stdout, and a sentence on stderr.
    """
    from pipeline.network_check import network_check as run_check

    found = run_check(sizes or (), timeout)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(json.dumps(asdict(found)))
        typer.echo(str(found), err=True)

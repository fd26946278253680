"""What a run says while it runs: metrics.jsonl always, TensorBoard, Weights & Biases, a progress bar or log lines."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import math
import statistics
import sys
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.locations import without_credentials
from data_prep.record import DataError
from pipeline.checkpoint import write_atomically
from pipeline.throughput import Throughput

log = logging.getLogger(__name__)

Value = float | int | str | None

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
# Files of lines that each name a step, and are cut back when a run goes on from an earlier one.
BY_STEP = (METRICS, EVALUATIONS, "quarantine.jsonl")
# What a window of steps says of itself is its last step's, but for these.
AVERAGED = ("loss", "grad_norm", "data_wait_s")
SUMMED = ("skipped",)
# Value → how a log line and the bar give it.
FIGURES = {
    "loss": "loss {:.4f}",
    "logit_scale": "scale {:.2f}",
    "lr": "lr {:.3g}",
    "samples_per_s": "{:.4g} samples/s",
    "data_wait_share": "waiting {:.0%}",
    "mfu": "MFU {:.1%}",
    "skipped": "skipped {}",
}
SHOW_EVERY_S = 0.5
# An upload that does not end would outlast what SIGTERM grants; what is missing then, `wandb sync RUN/wandb/…` sends.
WANDB_FINISH_S = 15.0


class Tracker:
    """Writes one line a step; made on the main rank only.

    metrics.jsonl gets each step as it is. The log, TensorBoard and Weights & Biases get one point for each
    `log_every_steps` steps, and one for what is left at the end: means over them for the loss, the gradient's norm and
    the rates, a sum for skipped steps, and the last step's value of anything else.

    Args:
        run: the run folder.
        step: steps already done; later lines in metrics.jsonl, evaluations.jsonl and quarantine.jsonl are cut off.
        total: steps of the whole run.
        tensorboard: write RUN/tensorboard too.
        wandb: Weights & Biases project to write to; empty for none.
        log_every_steps: steps between points, and between log lines where there is no terminal.
        throughput: that sums up rates; with what it knows of the model and the device, each line gets `mfu`.
        settings: the recipe as plain values, for Weights & Biases.

    Raises:
        DataError: `wandb` names a project, and the package is missing or nobody is logged in.
    """

    def __init__(
        self,
        run: Path,
        *,
        step: int,
        total: int,
        tensorboard: bool = True,
        wandb: str = "",
        log_every_steps: int = 50,
        throughput: Throughput | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        for name in BY_STEP:
            cut_back(run / name, step)
        self._run = run
        self._total = total
        self._log_every_steps = log_every_steps
        self._window: list[dict[str, Any]] = []
        self._throughput = throughput or Throughput(window=log_every_steps)
        self._wandb: Any = start_wandb(run, wandb, settings or {}) if wandb else None
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, flush_secs=30)
        self._metrics: IO[str] = (run / METRICS).open("a", encoding="utf-8")
        self._bar: Progress | None = None
        self._shown = 0.0
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.add_task("train", total=total, completed=step, figures="")
            self._bar.start()

    def log(self, values: Mapping[str, Value]) -> None:
        """Record one step, its number as `step`; a value that is not finite is written as null.

        The line is with the operating system when this returns: a killed run shows its last step.
        """
        plain = finite(values)
        step = plain["step"]
        if plain.get("samples_per_s") and plain.get("samples_seen"):
            batch = plain["samples_seen"] // step
            self._throughput.add(batch, batch / plain["samples_per_s"], plain.get("data_wait_s") or 0.0)
            if self._throughput.mfu is not None:
                plain["mfu"] = self._throughput.mfu
        self._metrics.write(json.dumps(plain) + "\n")
        self._metrics.flush()
        self._window.append(plain)
        if self._bar:
            self._show(self._bar, step)
        if step % self._log_every_steps == 0 or step == self._total:
            self._tell()

    def log_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Record how the model of a step measures, each figure named SET/METRIC, or ema/SET/METRIC."""
        plain = {"step": step, **finite(figures)}
        with (self._run / EVALUATIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
        self._send(plain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Finish the files and give the terminal back."""
        if self._bar:
            self._bar.stop()
        if self._window:
            self._tell()
        self._metrics.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def _tell(self) -> None:
        """Sum up the steps since the last time, for all but metrics.jsonl, and begin a new window."""
        values = self._summary()
        self._window.clear()
        self._send(values)
        if not self._bar:
            left = self._throughput.eta_s(self._total - values["step"])
            eta = "" if left is None else f"  ETA {timedelta(seconds=round(left))}"
            log.info("step %d/%d  %s%s", values["step"], self._total, in_words(values), eta)

    def _show(self, bar: Progress, step: int) -> None:
        """Move the bar; its figures change at a pace that an eye can follow."""
        bar.update(bar.task_ids[0], completed=step)
        if (now := time.monotonic()) - self._shown >= SHOW_EVERY_S:
            self._shown = now
            bar.update(bar.task_ids[0], figures=in_words(self._summary()))

    def _summary(self) -> dict[str, Any]:
        """The window as one step's values."""
        values = dict(self._window[-1])
        for name in AVERAGED:
            if known := [line[name] for line in self._window if line.get(name) is not None]:
                values[name] = statistics.fmean(known)
        for name in SUMMED:
            if name in values:
                values[name] = sum(line[name] or 0 for line in self._window)
        if rate := self._throughput.smooth_samples_per_s:
            values |= {"samples_per_s": rate, "data_wait_share": self._throughput.data_wait_share}
        return values

    def _send(self, values: Mapping[str, Any]) -> None:
        """Pass the numbers on to TensorBoard and Weights & Biases."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self._wandb:
            self._wandb.log(numbers)
        if self._board:
            for name in numbers.keys() - {"step"}:
                self._board.add_scalar(name, numbers[name], numbers["step"])


def finite(values: Mapping[str, Value]) -> dict[str, Any]:
    """The same, with None for what JSON has no number for."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def in_words(values: Mapping[str, Any]) -> str:
    """The figures of a log line, of those that are there."""
    return "  ".join(form.format(values[name]) for name, form in FIGURES.items() if values.get(name))


def start_wandb(run: Path, project: str, settings: Mapping[str, Any]) -> Any:
    """Begin the Weights & Biases run whose id RUN/wandb.json keeps, or go on with it.

    wandb's own variables (WANDB_MODE=offline, WANDB_ENTITY…) hold. What it would collect unasked is left out, since
    secrets may be in it: the command line, the console, the git remote, the code.

    Returns:
        wandb's Run.

    Raises:
        DataError: the package is missing, or nobody is logged in.
    """
    wandb: Any = None
    with contextlib.suppress(ImportError):
        wandb = importlib.import_module("wandb")
    if not hasattr(wandb, "init"):  # a folder named wandb, as it leaves them behind, passes for an empty package
        raise DataError(
            f"tracking.wandb = {project!r}, but wandb is not installed. Install it with "
            "`pip install 'clip-pipeline[wandb]'`, or set tracking.wandb to nothing."
        )
    path = run / "wandb.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("project") != project:
        known = {"project": project, "id": uuid.uuid4().hex[:8]}
        write_atomically(path, json.dumps(known))
    begin = functools.partial(
        wandb.init,
        project=project,
        id=known["id"],
        resume="allow",
        name=run.resolve().name,
        dir=str(run),
        config=without_credentials(settings),
        allow_val_change=True,
        settings=wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_meta=True, finish_timeout=WANDB_FINISH_S
        ),
    )
    try:
        try:
            started = begin()
        except wandb.errors.AuthenticationError:
            raise
        except wandb.errors.CommError as error:  # its server being out is no reason not to train
            log.warning(
                "Weights & Biases does not answer (%s). The figures stay in %s, from where `wandb sync` sends them.",
                str(error).split("\n")[0],
                run / "wandb",
            )
            wandb.teardown()  # which else holds the id of the failed attempt
            started = begin(mode="offline")
    except wandb.errors.Error as error:
        raise DataError(
            f"tracking.wandb = {project!r}: wandb did not start ({error}). Log in with `wandb login`, keep the figures "
            "here with WANDB_MODE=offline, or set tracking.wandb to nothing."
        ) from error
    # A run that goes on from an earlier checkpoint repeats steps, which wandb's own counter would refuse.
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file that speak of later steps, and a last line that a crash cut off."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").split("\n") if line and _step(line) <= step]
    write_atomically(path, "".join(line + "\n" for line in kept))


def is_evaluated(run: Path, step: int) -> bool:
    """Whether a run's evaluations.jsonl has figures of a step."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / EVALUATIONS).read_text(encoding="utf-8").splitlines()
        return any(_step(line) == step for line in lines)
    return False


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf

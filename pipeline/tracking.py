"""What a run says while it runs: metrics.jsonl always, TensorBoard, and a progress bar or plain log lines."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.checkpoint import write_atomically

log = logging.getLogger(__name__)

Value = float | int | str | None


class Tracker:
    """Writes one line a step; made on the main rank only.

    Args:
        run: the run folder.
        step: steps already done; later lines in metrics.jsonl are cut off.
        total: steps of the whole run.
        tensorboard: write RUN/tensorboard too.
        log_every_steps: steps between log lines where there is no terminal.
    """

    def __init__(self, run: Path, *, step: int, total: int, tensorboard: bool, log_every_steps: int) -> None:
        for name in ("metrics.jsonl", "quarantine.jsonl"):
            cut_back(run / name, step)
        self._metrics: IO[str] = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._total = total
        self._log_every_steps = log_every_steps
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.add_task("train", total=total, completed=step, figures="")
            self._bar.start()

    def log(self, values: Mapping[str, Value]) -> None:
        """Record one step; a value that is not finite is written as null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._metrics.write(json.dumps(plain) + "\n")
        self._metrics.flush()
        step = int(str(plain["step"]))
        if self._board:
            for name, value in plain.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)
        figures = "  ".join(
            f"{name} {plain[name]:.4g}" for name in ("loss", "logit_scale", "lr", "samples_per_s") if plain.get(name)
        )
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        elif step % self._log_every_steps == 0 or step == self._total:
            log.info("step %d/%d  %s", step, self._total, figures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the files and give the terminal back."""
        self._metrics.close()
        if self._board:
            self._board.close()
        if self._bar:
            self._bar.stop()


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file that speak of later steps, and a last line that a crash cut off."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").split("\n") if line and _step(line) <= step]
    write_atomically(path, "".join(line + "\n" for line in kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf

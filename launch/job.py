"""What to run, and on how many processes: one training job, independent of where it runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


class LaunchError(Exception):
    """Something that the user must change before a job can start."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        recipe: a recipe's name or .yaml file.
        data: the sharded datasets, as the trainer's --data takes them: "DIR [DIR@WEIGHT …]".
        run: the run folder; an unfinished run there goes on.
        processes: ranks.
        settings: changes to the recipe, `section.key=value`.
    """

    recipe: str
    data: str
    run: Path
    processes: int = 1
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise LaunchError(f"--processes must be at least 1; found {self.processes}.")
        if not self.data.strip():
            raise LaunchError("--data names no dataset. `python -m data_prep build` makes one.")

    def command(self) -> list[str]:
        """The trainer's command line; under torchrun where there are several processes."""
        python = [sys.executable, "-m"]
        if self.processes > 1:
            python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        trainer = ["pipeline", "train", self.recipe, str(self.run), "--data", self.data]
        return [*python, *trainer, *self.settings, f"train.processes={self.processes}"]

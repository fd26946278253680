"""What the checks of `gpu-check` share: their size on a device, towers, pictures, and a trainer in its own process."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline import config, model
from pipeline.config import Recipe
from pipeline.failure import TrainingError
from pipeline.tracking import read_metrics

STEPS = 20
# No run of the trainer takes so long, unless it hangs.
LIMIT_S = 240

Figures = dict[str, Any]


class Skipped(Exception):  # noqa: N818 (nothing is wrong)
    """A check that this device cannot run; the message is the reason."""


@dataclass(frozen=True)
class Size:
    """How large the checks are.

    Attributes:
        pictures: that are generated.
        pixels: of a picture's side.
        batch: pairs a step of the trainer.
        vision_cfg, text_cfg: of the towers that it trains, open_clip's.
        pairs: N of the loss.
        width: of its features.
        workers: loader processes.
        model: open_clip's name of the towers whose speed and memory are measured.
        model_batch: pairs a step of those.
    """

    pictures: int
    pixels: int
    batch: int
    vision_cfg: Mapping[str, int]
    text_cfg: Mapping[str, int]
    pairs: int
    width: int
    workers: int
    model: str
    model_batch: int


SIZES = {
    "cuda": Size(
        pictures=4096,
        pixels=256,
        batch=512,
        vision_cfg={"image_size": 224, "patch_size": 32, "width": 384, "layers": 6, "head_width": 64},
        text_cfg={"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
        pairs=32768,
        width=512,
        workers=8,
        model="ViT-B-32",
        model_batch=512,
    ),
    "cpu": Size(
        pictures=256,
        pixels=32,
        batch=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        pairs=512,
        width=64,
        workers=1,
        model="",
        model_batch=16,
    ),
}


@dataclass(frozen=True)
class Bench:
    """What the checks share.

    Attributes:
        precision: bf16, or fp32 on a device without bfloat16.
        end: of the time that there is, by time.monotonic().
    """

    device: torch.device
    size: Size
    folder: Path
    accelerator: Accelerator
    precision: str = "bf16"
    end: float = math.inf

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def forget_peak(self) -> None:
        """Measure the peak of the device's memory from now on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def model_config(self, name: str = "") -> dict[str, Any]:
        """open_clip's description of the small towers; nothing for a name, which has one of its own."""
        towers = {"embed_dim": 64, "vision_cfg": dict(self.size.vision_cfg), "text_cfg": dict(self.size.text_cfg)}
        return {} if name else towers

    def towers(self, name: str = "") -> Any:
        """Those of open_clip's name, or the small ones, freshly drawn, on the device."""
        torch.manual_seed(0)
        return model.build(model.model_cfg(name, self.model_config(name))).to(self.device).train()

    def recipe(self, **sections: Mapping[str, Any]) -> Recipe:
        """The small towers' recipe, with these changes."""
        values: dict[str, dict[str, Any]] = {
            "data": {"datasets": [{"path": str(self.data)}], "workers": self.size.workers},
            "model": {"config": self.model_config()},
            "optim": {"lr": 1e-3, "warmup_steps": 5, "schedule": "constant"},
            "train": {"steps": STEPS, "batch_size": self.size.batch, "precision": "fp32"},
            "checkpoint": {"every_steps": STEPS // 2},
            "tracking": {"tensorboard": False},
        }
        values["train"]["device"] = "cpu" if self.device.type == "cpu" else "auto"
        for name, changes in sections.items():
            values[name] = values.get(name, {}) | dict(changes)
        return config.parse(values, "gpu-check")

    def train(self, name: str, **sections: Mapping[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
        """Train in a process of its own, whose peak of memory is then its own: (run folder, lines of its metrics).

        Raises:
            TrainingError: it failed, with what it said last.
        """
        run, file = self.folder / name, self.folder / f"{name}.yaml"
        file.write_text(self.recipe(**sections).to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline", "train", str(file), str(run)]
        limit_s = min(LIMIT_S, self.end - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        if done.returncode:
            raise TrainingError(f"the trainer ended with {done.returncode}: …{done.stderr[-2000:]}")
        return run, read_metrics(run)


def expect(fine: bool, otherwise: str) -> None:
    """Raise TrainingError where a check finds what it should not."""
    if not fine:
        raise TrainingError(otherwise)

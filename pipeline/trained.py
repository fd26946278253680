"""A run's checkpoint, ready for inference: towers, tokenizer and preprocessing that belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from pipeline import checkpoint as checkpoints
from pipeline import config, model, tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """What evaluation, export and the report need of a run.

    Attributes:
        run: the run folder.
        step: of the checkpoint.
        recipe: the run's resolved recipe.
        model_cfg: open_clip's description of the towers.
        towers: in evaluation mode, float32.
        tokenize: (B,) texts → (B, L) int64.
        preprocess: a PIL image → (3, S, S) float32: open_clip's own transform for inference.
    """

    run: Path
    step: int
    recipe: config.Recipe
    model_cfg: dict[str, Any]
    towers: model.Towers
    tokenize: tokenizer.Tokenizer
    preprocess: Callable[[Image.Image], Tensor]


def load(run: Path, step: int | None = None, device: torch.device | str = "cpu") -> TrainedModel:
    """Load the newest checkpoint of a run, or the one of `step`, after verifying its files.

    Raises:
        DataError: no run, no such checkpoint, or a damaged one.
    """
    available = checkpoints.steps(run)
    if not available or (step is not None and step not in available):
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise checkpoints.CheckpointError(
            f"{run}: {wanted} was looked for in {run / 'checkpoints'}; "
            + (f"there are the steps {sorted(available)}." if available else "there is none. Train the run first.")
        )
    recipe = config.load_file(run / "config.yaml")
    saved = checkpoints.load(run, available[0] if step is None else step, weights_only=True)
    model_cfg = model.model_cfg(recipe.model.name, recipe.model.config)
    kept_cfg = model.with_kept_text(model_cfg, run)
    towers = model.build(
        kept_cfg,
        init_bias=recipe.loss.init_bias if recipe.loss.kind == "sigmoid" else None,
        image_mean=recipe.model.image_mean,
        image_std=recipe.model.image_std,
    )
    towers.load_state_dict(saved.model)
    tokenize = tokenizer.load(
        recipe.tokenizer.kind, tokenizer.kept(recipe.tokenizer.kind, run / "tokenizer"), kept_cfg
    )
    return TrainedModel(
        run=run,
        step=saved.step,
        recipe=recipe,
        model_cfg=model_cfg,
        towers=towers.eval().to(device),
        tokenize=tokenize,
        preprocess=inference_transform(towers, recipe.data.interpolation),
    )


def inference_transform(towers: model.Towers, interpolation: str) -> Callable[[Image.Image], Tensor]:
    """open_clip's own transform for inference: a PIL image → (3, S, S) float32, as these towers take it.

    Args:
        towers: they know size, mean and deviation.
        interpolation: resize filter, `bicubic` or `bilinear`.
    """
    return open_clip.image_transform(
        model.image_size(towers),
        is_train=False,
        mean=towers.visual.image_mean,
        std=towers.visual.image_std,
        interpolation=interpolation,
    )

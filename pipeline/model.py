"""Recipe → open_clip / timm towers. The model is open_clip's own class, so its weights load there unchanged."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from torch import nn

from data_prep.record import DataError

# open_clip's CLIP or CustomTextCLIP; open_clip has no type annotations.
Towers = Any


class ModelError(DataError):
    """A model description that open_clip does not take."""


def model_cfg(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg, by its built-in name or given whole."""
    if config:
        return copy.deepcopy(config)
    found = open_clip.get_model_config(name)
    if found is None:
        raise ModelError(f"model.name {name!r} is not one of open_clip's: {', '.join(open_clip.list_models())}")
    return found


def build(config: dict[str, Any], *, init_scale: float = 1 / 0.07) -> Towers:
    """The two towers with freshly drawn weights (seed torch before), and logit_scale = ln(init_scale).

    Raises:
        ModelError: open_clip or timm refuses the description.
    """
    settings = copy.deepcopy(config)
    custom_text = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    tower = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    try:
        towers = tower(**settings, init_logit_scale=math.log(init_scale))
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(f"open_clip cannot build model {settings}: {error}") from error
    # open_clip's factory leaves the normalisation with the image tower; so do we.
    set_model_preprocess_cfg(towers, asdict(PreprocessCfg(size=towers.visual.image_size)))
    return towers


def image_size(model: Towers) -> tuple[int, int]:
    """(height, width) that the image tower takes."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a sample's features depend on the other samples of its rank's batch (BatchNorm)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices and kernels decay; gains, biases and the temperature do not."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim >= 2]
    plain = [parameter for name, parameter in trained if parameter.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@torch.no_grad()
def clamp_scale(model: Towers, max_scale: float) -> None:
    """Hold logit_scale in [0, ln(max_scale)], as the original CLIP does after each step."""
    model.logit_scale.clamp_(0.0, math.log(max_scale))

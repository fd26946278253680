"""A folder that plain open_clip loads as `local-dir:FOLDER`: configuration, weights, tokenizer.

A Hugging Face text tower is built by open_clip from what its name on the hub says. Where a folder described it, or in
half precision, the description is in text_tower, which open_clip looks for in the working directory: such an export is
loaded from within its folder.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline import model, tokenizer
from pipeline.export import huggingface_tokenizer
from pipeline.trained import TrainedModel


def write(trained: TrainedModel, folder: Path) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors, and a tokenizer that is not open_clip's own."""
    model_cfg = copy.deepcopy(trained.model_cfg)
    # What a built-in configuration says of its tokenizer; the run was trained with another or with open_clip's own.
    for name in ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"):
        model_cfg["text_cfg"].pop(name, None)
    # open_clip has a bias on logits where its description says so, whatever the weights have.
    model_cfg.pop("init_logit_bias", None)
    if trained.towers.logit_bias is not None:
        model_cfg["init_logit_bias"] = trained.recipe.loss.init_bias
    if not isinstance(trained.tokenize, tokenizer.OpenClipTokenizer):
        huggingface_tokenizer.write(trained.tokenize, folder)
        # Any name makes open_clip look for the tokenizer's files; in a local folder it looks nowhere else.
        model_cfg["text_cfg"]["hf_tokenizer_name"] = trained.recipe.tokenizer.kind
    if name := model_cfg["text_cfg"].get("hf_model_name"):
        model_cfg["text_cfg"]["hf_model_name"] = _text_tower(name, trained.towers.text.config, folder)
    preprocess = trained.towers.visual.preprocess_cfg
    preprocess_cfg = {
        "mean": list(preprocess["mean"]),
        "std": list(preprocess["std"]),
        "interpolation": trained.recipe.data.interpolation,
        "resize_mode": preprocess["resize_mode"],
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = {name: tensor.cpu().contiguous() for name, tensor in trained.towers.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def _text_tower(name: str, described: Any, folder: Path) -> str:
    """By which name open_clip builds a Hugging Face text tower in float32, on any machine."""
    by_folder = Path(name).is_absolute() or Path(name).is_dir()
    if not by_folder and described.dtype in (None, torch.float32):
        return name
    described = copy.deepcopy(described)
    described.dtype = torch.float32
    described.save_pretrained(folder / model.KEPT_TEXT)
    return f"./{model.KEPT_TEXT}"

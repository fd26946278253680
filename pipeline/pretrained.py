"""Weights to begin with: open_clip's, timm's, Hugging Face's, or a file's. Nothing else downloads any."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import timm.models
import torch
from open_clip import model as open_clip_model
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.convert import convert_state_dict
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoint import MALFORMED
from pipeline.model import (
    REFUSED,
    TEMPERATURE,
    ModelError,
    Towers,
    construct,
    first_line,
    nearest,
    read_description,
)

log = logging.getLogger(__name__)


def load_pretrained(towers: Towers, config: Mapping[str, Any], *, name: str, pretrained: str) -> None:
    """Begin from trained weights, logit_scale included. At the first start of a run only; this may download.

    Args:
        towers: from `build`; unchanged on an error.
        config: what it was built from.
        name: open_clip's name of the model, if it has one.
        pretrained: open_clip's tag for that name, or a file: .safetensors, or torch.save's (weights only), also one of
            open_clip_train. Empty for timm's and Hugging Face's own weights, where vision_cfg.timm_model_pretrained or
            text_cfg.hf_model_pretrained asks for them; projections then stay as drawn.

    Raises:
        ModelError: no such tag or file, it cannot be fetched or read, or it is of another model.
    """
    if not pretrained:
        _load_own(towers, config)
        return
    if tag := tag_of(name, pretrained):
        _check_tag(towers, config, name.replace("/", "-"), pretrained, tag)
    try:
        path = Path(open_clip.download_pretrained(tag) if tag else pretrained)
    except REFUSED as error:
        raise ModelError(
            f"{pretrained!r} cannot be fetched ({first_line(error)}). Without network, name a file."
        ) from error
    _load_whole(towers, _read_weights(path), str(path))


def tag_of(name: str, pretrained: str) -> Mapping[str, Any]:
    """What open_clip knows of a tag; empty for a file.

    Raises:
        ModelError: it is neither.
    """
    key = name.replace("/", "-")
    tag: Mapping[str, Any] = open_clip.get_pretrained_cfg(key, pretrained) or {}
    if not tag and not Path(pretrained).is_file():
        near = nearest(pretrained, open_clip.list_pretrained_tags_by_model(key))
        raise ModelError(f"model.pretrained {pretrained!r} is no file, and no tag of model.name {name!r}. {near}")
    return tag


def normalisation(config: Mapping[str, Any], *, name: str, pretrained: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of red, green and blue (of 0 to 1) in the pixels that a model is given.

    They are those on which the weights to begin with were trained, where that is known: open_clip's tag says it, then a
    model's .json file of itself (preprocess_cfg), then timm of its own weights. Else they are OpenAI's.

    Args:
        config: open_clip's model_cfg.
        name: the model's, as the recipe has it; a .json file is read.
        pretrained: as for load_pretrained.

    Raises:
        ModelError: no such tag or file.
    """
    known: Mapping[str, Any] = tag_of(name, pretrained) if pretrained else {}
    if not known and name.endswith(".json"):
        known = read_description(name).get("preprocess_cfg", {})
    if not known and not pretrained and config["vision_cfg"].get("timm_model_pretrained"):
        known = _timm_cfg(str(config["vision_cfg"].get("timm_model_name")))
    return known.get("mean", OPENAI_DATASET_MEAN), known.get("std", OPENAI_DATASET_STD)


def _timm_cfg(name: str) -> Mapping[str, Any]:
    """What timm knows of its weights for a tower; empty for a name that building then refuses."""
    try:
        found = timm.models.get_pretrained_cfg(name)
    except REFUSED:
        return {}
    return {} if found is None else found.to_dict()


def _check_tag(towers: Towers, config: Mapping[str, Any], name: str, pretrained: str, tag: Mapping[str, Any]) -> None:
    quick, wanted = bool(config.get("quick_gelu", False)), bool(tag.get("quick_gelu", False))
    if quick != wanted:
        raise ModelError(
            f"model.pretrained {pretrained!r} was trained with quick_gelu {wanted}, this model has {quick}. Take "
            f"model.name {name.removesuffix('-quickgelu') + '-quickgelu' * wanted!r}."
        )
    theirs, mine = [tag["mean"], tag["std"]], [towers.visual.image_mean, towers.visual.image_std]
    if list(map(tuple, theirs)) != list(map(tuple, mine)):
        log.warning("%s was trained on pixels normalised by mean, std %s; here it sees %s.", pretrained, theirs, mine)


def _load_own(towers: Towers, config: Mapping[str, Any]) -> None:
    """Weights of timm and of Hugging Face: the model is built again with them, and they are copied from it."""
    image = bool(config["vision_cfg"].get("timm_model_name") and config["vision_cfg"].get("timm_model_pretrained"))
    text = bool(config["text_cfg"].get("hf_model_name") and config["text_cfg"].get("hf_model_pretrained"))
    if image or text:
        with torch.random.fork_rng(devices=[]):
            donor = construct(config, init_scale=1.0, init_bias=None, own_weights=True)
    if image:
        towers.visual.trunk.load_state_dict(donor.visual.trunk.state_dict())
    if text:
        towers.text.transformer.load_state_dict(donor.text.transformer.state_dict())


def _load_whole(towers: Towers, state: dict[str, Tensor], source: str) -> None:
    """Weights of both towers, brought to this model's form as open_clip's load_checkpoint brings them."""
    mine = towers.state_dict()
    state = convert_state_dict(towers, state)
    if hasattr(towers, "text"):
        state = open_clip_model.convert_to_custom_text_state_dict(state)
    for name in TEMPERATURE:
        if name in mine and name in state and state[name].numel() == mine[name].numel():
            state[name] = state[name].reshape(mine[name].shape)
    # Constants that older transformers saved; a bias that softmax does not see.
    for name in {"text.transformer.embeddings.position_ids", "logit_bias"} - set(mine):
        state.pop(name, None)
    # A bias that the weights' loss did without; counts that open_clip's frozen BatchNorm does not save.
    for name in mine:
        if name.endswith(("logit_bias", ".num_batches_tracked")):
            state.setdefault(name, mine[name])
    try:
        open_clip_model.resize_pos_embed(state, towers)
        open_clip_model.resize_text_pos_embed(state, towers)
    except REFUSED:
        log.debug("positions of another width, as the error then says", exc_info=True)
    check_same(mine, state, source)
    towers.load_state_dict(state)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by open_clip's names: a wrapping {"state_dict": …} and DDP's and torch.compile's prefixes are removed."""
    load = READERS.get(path.suffix)
    if load is None:
        raise ModelError(f"{path}: weights are read from {', '.join(READERS)}; found {path.suffix!r}. Convert them.")
    try:
        state = load(path)
    except (*MALFORMED, OSError) as error:
        # What is more than weights may be code that would run.
        raise ModelError(f"{path}: is not weights only ({first_line(error)}). Save it as .safetensors.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ModelError(f"{path}: holds no table of tensors by name. Save the model's state_dict().")
    plain = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}
    # Half precision cannot be resized on a CPU.
    return {name: value.float() if value.is_floating_point() else value for name, value in plain.items()}


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file,
    **dict.fromkeys((".pt", ".pth", ".bin"), functools.partial(torch.load, map_location="cpu", weights_only=True)),
}


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    shapes = {name: (tuple(found[name].shape), tuple(expected[name].shape)) for name in expected if name in found}
    differences = {
        "lacks": [name for name in expected if name not in found],
        "has besides": [name for name in found if name not in expected],
        "has in another shape": [f"{name} {one}, not {two}" for name, (one, two) in shapes.items() if one != two],
    }
    if listed := [
        f"{kind} {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for kind, names in differences.items()
        if names
    ]:
        raise ModelError(f"{source} is of another model than model.name or model.config; it {'; '.join(listed)}.")

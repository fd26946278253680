"""Recipe → open_clip / timm towers. The model is open_clip's own class, so its weights load there unchanged."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import timm.layers
import timm.models
from open_clip import hf_model
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import PatchDropout
from torch import nn

from data_prep.record import DataError

# open_clip's CLIP or CustomTextCLIP; open_clip has no type annotations.
Towers = Any

# What open_clip, timm and transformers raise for a description that they do not take, or cannot fetch.
REFUSED = (TypeError, RuntimeError, ValueError, AssertionError, LookupError, ArithmeticError, OSError, ImportError)
PATCH_DROPOUTS = (PatchDropout, timm.layers.PatchDropout, timm.layers.PatchDropoutWithIndices)
# In a run's folder: Hugging Face's description of its text tower, so that nobody is asked for it again.
KEPT_TEXT = "text_tower"
# In the folder of one that was imported: whence, open_clip's description of the towers, and the pixels that they take.
IMPORTED = "model.json"
TEMPERATURE = ("logit_scale", "logit_bias")

log = logging.getLogger(__name__)


class ModelError(DataError):
    """A model description that open_clip does not take, or weights that do not fit it."""


def model_cfg(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg: by its built-in name, from a .json file (an open_clip_config.json too), or given whole.

    Raises:
        ModelError: no such name or file, or the file describes no model.
    """
    if config:
        return copy.deepcopy(config)
    if not name.endswith(".json"):
        known, key = open_clip.list_models(), name.replace("/", "-")
        if key in known:
            return dict(open_clip.get_model_config(key))
        raise ModelError(f"model.name {name!r} is not one of open_clip's, nor a .json file. {nearest(key, known)}")
    found = read_description(name)
    found = found.get("model_cfg", found)
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in found]:
        raise ModelError(f"model.name {name!r} lacks {', '.join(missing)}, so it is no open_clip model_cfg.")
    return dict(found)


def read_description(name: str) -> dict[str, Any]:
    """What a model's .json file says: a model_cfg, or an open_clip_config.json with it and a preprocess_cfg.

    Raises:
        ModelError: it cannot be read, or holds no table.
    """
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name {name!r} cannot be read as JSON ({first_line(error)}).") from error
    return found if isinstance(found, dict) else {}


def build(
    config: Mapping[str, Any],
    *,
    init_scale: float = 1 / 0.07,
    init_bias: float | None = None,
    patch_dropout: float = 0.0,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Towers:
    """The two towers in float32 with freshly drawn weights (seed torch before). No weights are ever downloaded.

    Args:
        config: open_clip's model_cfg.
        init_scale: logit_scale = ln(init_scale).
        init_bias: logit_bias, of the sigmoid loss; None for a model that has none, whatever config says.
        patch_dropout: share of patches that the image tower leaves out in training; 0 leaves config's.
        image_mean: of red, green and blue, of 0 to 1, in the pixels that it is given; None for OpenAI's.
        image_std: the same.

    Raises:
        ModelError: open_clip, timm or transformers refuses the description, or patch dropout.
    """
    vision_cfg = dict(config["vision_cfg"]) | ({"patch_dropout": patch_dropout} if patch_dropout else {})
    towers = construct({**config, "vision_cfg": vision_cfg}, init_scale=init_scale, init_bias=init_bias)
    if patch_dropout and not any(isinstance(module, PATCH_DROPOUTS) for module in towers.visual.modules()):
        raise ModelError(f"model.patch_dropout is {patch_dropout}, but {called(towers.visual)} has none. Set it to 0.")
    # open_clip's factory leaves the normalisation with the image tower; so do we.
    preprocess = PreprocessCfg(
        size=towers.visual.image_size,
        mean=tuple(image_mean or OPENAI_DATASET_MEAN),
        std=tuple(image_std or OPENAI_DATASET_STD),
    )
    open_clip.set_model_preprocess_cfg(towers, asdict(preprocess))
    return towers


def keep_text(config: Mapping[str, Any], run: Path) -> None:
    """Write Hugging Face's description of the text tower, where it is theirs, to RUN/text_tower/config.json.

    Raises:
        ModelError: there is none.
    """
    shutil.rmtree(run / KEPT_TEXT, ignore_errors=True)  # of another start of the run
    if hf_name := config["text_cfg"].get("hf_model_name"):
        _hf_config(hf_name).save_pretrained(run / KEPT_TEXT)


def with_kept_text(config: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The same model_cfg, with what a run or an export keeps of a Hugging Face text tower in place of its name."""
    folder, text_cfg = run / KEPT_TEXT, dict(config["text_cfg"])
    if "hf_model_name" in text_cfg and (folder / "config.json").is_file():
        text_cfg["hf_model_name"] = str(folder)
    return {**config, "text_cfg": text_cfg}


def image_size(model: Towers) -> tuple[int, int]:
    """(height, width) that the image tower takes."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_tokenizer(config: Mapping[str, Any], *, vocab_size: int, end_id: int | None, pad_id: int) -> None:
    """See that the text tower takes features where a text ends, and has an embedding for each of vocab_size ids.

    Args:
        config: open_clip's model_cfg.
        vocab_size: ids of the tokenizer.
        end_id: what it puts behind a text; None if nothing.
        pad_id: what it then fills up with.

    Raises:
        ModelError: a wrong token would stand for the text, or there are too few embeddings.
    """
    text_cfg = config["text_cfg"]
    if hf_name := text_cfg.get("hf_model_name"):
        theirs = _hf_config(hf_name)
        embeddings, where = int(theirs.vocab_size), f"vocab_size of {hf_name}"
        if theirs.pad_token_id != pad_id:
            raise ModelError(f"pad_token_id of {hf_name} is {theirs.pad_token_id}, the tokenizer pads with {pad_id}.")
        length, positions = int(text_cfg.get("context_length", 77)), getattr(theirs, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise ModelError(f"text_cfg.context_length is {length}; {hf_name!r} has {positions} positions. Lower it.")
    else:
        embeddings, where = int(text_cfg.get("vocab_size", 49408)), "text_cfg.vocab_size"
        _check_pooling(text_cfg, vocab_size, end_id, pad_id)
    if vocab_size > embeddings:
        raise ModelError(f"{where} is {embeddings}, but the tokenizer has {vocab_size} ids. Set it to {vocab_size}.")


def checkpoint_activations(towers: Towers) -> None:
    """Recompute each block's activations in the backward pass (Chen et al. 2016).

    Raises:
        ModelError: a tower that cannot.
    """
    text = getattr(towers, "text", towers)
    unable = towers.visual if isinstance(towers.visual, ModifiedResNet) else None
    if isinstance(towers.visual, TimmModel):
        try:  # open_clip would only log that it goes on without
            towers.visual.trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            unable = towers.visual
    if isinstance(text, HFTextEncoder) and not text.transformer.supports_gradient_checkpointing:
        unable = text.transformer
    if unable is not None:
        raise ModelError(f"model.activation_checkpointing: {called(unable)} cannot do it. Set it to false.")
    towers.set_grad_checkpointing()


def construct(
    config: Mapping[str, Any], *, init_scale: float, init_bias: float | None, own_weights: bool = False
) -> Towers:
    """open_clip's model; `own_weights` loads timm's and Hugging Face's where config asks for them."""
    settings = copy.deepcopy(dict(config))
    vision_cfg, text_cfg = settings["vision_cfg"], settings["text_cfg"]
    settings |= {"init_logit_scale": math.log(init_scale), "init_logit_bias": init_bias}
    if (timm_name := str(vision_cfg.get("timm_model_name"))).startswith(("hf-hub:", "hf_hub:")):
        raise ModelError(f"timm_model_name {timm_name!r} would be fetched at each start. Name one of timm's models.")
    if hf_name := text_cfg.get("hf_model_name"):
        _hf_config(hf_name)
        text_cfg["hf_model_pretrained"] = own_weights and text_cfg.get("hf_model_pretrained", False)
    vision_cfg["timm_model_pretrained"] = own_weights and vision_cfg.get("timm_model_pretrained", False)
    towers = open_clip.CustomTextCLIP if settings.pop("custom_text", False) or hf_name else open_clip.CLIP
    try:
        # A config.json of Hugging Face's may ask for half precision.
        return towers(**settings).float()
    except REFUSED as error:
        what = "load timm's or Hugging Face's weights for" if own_weights else "build"
        raise ModelError(f"open_clip cannot {what} {settings}: {type(error).__name__}: {error}") from error


def _check_pooling(text_cfg: Mapping[str, Any], vocab_size: int, end_id: int | None, pad_id: int) -> None:
    """What open_clip's text_global_pool, or the class embedding that goes before it, takes for the whole text."""
    pool, eos, pad = text_cfg.get("pool_type", "argmax"), text_cfg.get("eos_id", 2), text_cfg.get("pad_id", 0)
    fits = {"argmax": end_id == vocab_size - 1, "eos": eos == end_id, "none": False}
    fits["first"] = bool(text_cfg.get("no_causal_mask"))  # under a mask it sees no other token; the last one sees all
    if not (pad == pad_id if text_cfg.get("embed_cls") else fits.get(pool, True)):
        fix = "pool_type: last" if end_id is None else f"pool_type: eos, eos_id: {end_id}"
        raise ModelError(
            f"text_cfg has pool_type {pool!r}, eos_id {eos}, pad_id {pad}; the tokenizer ends texts with {end_id} of "
            f"{vocab_size} ids, pads with {pad_id}, and a wrong token would be the text's. Set {fix}, pad_id: {pad_id}."
        )


def _hf_config(name: str) -> Any:
    """Hugging Face's description of a text tower, which open_clip asks for by name whenever it builds one."""
    if hf_model.transformers is None:
        raise ModelError(f"text_cfg.hf_model_name {name!r} needs transformers: pip install 'clip-pipeline[hf]'.")
    try:
        return hf_model.AutoConfig.from_pretrained(name)
    except REFUSED as error:
        raise ModelError(
            f"text_cfg.hf_model_name {name!r}: no config.json ({first_line(error)}). It is read when a run begins, so "
            "without network name a folder that holds it (`hf download NAME config.json --local-dir FOLDER`)."
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(lower[one] for one in near)}." if near else ""


def called(tower: nn.Module) -> str:
    return type(getattr(tower, "trunk", tower)).__name__


def first_line(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

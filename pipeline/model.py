"""Recipe → open_clip / timm towers. The model is open_clip's own class, so its weights load there unchanged."""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import timm.layers
import timm.models
import torch
from open_clip import hf_model
from open_clip import model as open_clip_model
from open_clip.convert import convert_state_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import PatchDropout, TextTransformer, VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from data_prep.record import DataError
from pipeline.checkpoint import MALFORMED

# open_clip's CLIP or CustomTextCLIP; open_clip has no type annotations.
Towers = Any

# What open_clip, timm and transformers raise for a description that they do not take, or cannot fetch.
REFUSED = (TypeError, RuntimeError, ValueError, AssertionError, LookupError, ArithmeticError, OSError, ImportError)
PATCH_DROPOUTS = (PatchDropout, timm.layers.PatchDropout, timm.layers.PatchDropoutWithIndices)
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
        raise ModelError(f"model.name {name!r} is not one of open_clip's, nor a .json file. {_nearest(key, known)}")
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name {name!r} cannot be read as JSON ({_line(error)}).") from error
    found = found.get("model_cfg", found) if isinstance(found, dict) else {}
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in found]:
        raise ModelError(f"model.name {name!r} lacks {', '.join(missing)}, so it is no open_clip model_cfg.")
    return dict(found)


def build(
    config: Mapping[str, Any],
    *,
    init_scale: float = 1 / 0.07,
    init_bias: float | None = None,
    patch_dropout: float = 0.0,
) -> Towers:
    """The two towers in float32 with freshly drawn weights (seed torch before). No weights are ever downloaded.

    Args:
        config: open_clip's model_cfg.
        init_scale: logit_scale = ln(init_scale).
        init_bias: logit_bias, of the sigmoid loss; None for a model that has none, whatever config says.
        patch_dropout: share of patches that the image tower leaves out in training; 0 leaves config's.

    Raises:
        ModelError: open_clip, timm or transformers refuses the description, or patch dropout.
    """
    vision_cfg = dict(config["vision_cfg"]) | ({"patch_dropout": patch_dropout} if patch_dropout else {})
    towers = _construct({**config, "vision_cfg": vision_cfg}, init_scale=init_scale, init_bias=init_bias)
    if patch_dropout and not any(isinstance(module, PATCH_DROPOUTS) for module in towers.visual.modules()):
        raise ModelError(f"model.patch_dropout is {patch_dropout}, but {_called(towers.visual)} has none. Set it to 0.")
    # open_clip's factory leaves the normalisation with the image tower; so do we.
    open_clip.set_model_preprocess_cfg(towers, asdict(PreprocessCfg(size=towers.visual.image_size)))
    return towers


def image_size(model: Towers) -> tuple[int, int]:
    """(height, width) that the image tower takes."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """BatchNorm's buffers that training changes: where there are any, features depend on a rank's whole batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms if not _is_locked(norm) for buffer in norm.buffers()]


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
    else:
        embeddings, where = int(text_cfg.get("vocab_size", 49408)), "text_cfg.vocab_size"
        _check_pooling(text_cfg, vocab_size, end_id, pad_id)
    if vocab_size > embeddings:
        raise ModelError(f"{where} is {embeddings}, but the tokenizer has {vocab_size} ids. Set it to {vocab_size}.")


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
    key = name.replace("/", "-")
    if tag := open_clip.get_pretrained_cfg(key, pretrained):
        _check_tag(towers, config, key, pretrained, tag)
    elif not Path(pretrained).is_file():
        near = _nearest(pretrained, open_clip.list_pretrained_tags_by_model(key))
        raise ModelError(f"model.pretrained {pretrained!r} is no file, and no tag of model.name {name!r}. {near}")
    try:
        path = Path(open_clip.download_pretrained(tag) if tag else pretrained)
    except REFUSED as error:
        raise ModelError(f"{pretrained!r} cannot be fetched ({_line(error)}). Without network, name a file.") from error
    _load_whole(towers, _read_weights(path), str(path))


def layer_groups(towers: Towers, tower: str) -> list[list[str]]:
    """Names of one tower's parameters, from its input to its output: stem, block after block, projection.

    The final norm, and a pooling that does not project, belong to the last block. `tower` is "image" or "text".

    Raises:
        ModelError: a timm tower that does not say how its layers follow each other.
    """
    image, text = tower == "image", "text." if hasattr(towers, "text") else ""
    prefix = "visual." if image else text
    module = towers.get_submodule(prefix.removesuffix("."))
    names = [name for name, _ in towers.named_parameters() if name.startswith("visual.") == image]
    if isinstance(module, TimmModel):
        depth = _timm_depth(module)
    else:
        depth = functools.partial(_depth, *LAYERS.get(type(module), LAYERS[TextTransformer]))
    depths = {name: depth(name.removeprefix(prefix)) for name in names if name not in TEMPERATURE}
    blocks = max((found for found in depths.values() if found[0] == BLOCK), default=(BLOCK,))
    depths = {name: blocks if found[0] == AFTER_BLOCKS else found for name, found in depths.items()}
    return [[name for name in depths if depths[name] == one] for one in sorted(set(depths.values()))]


def lock(towers: Towers, *, image: int | None, text: int | None) -> None:
    """Leave a tower as it was loaded but for so many layer groups at its end (LiT, Zhai et al. 2022); None trains all.

    The projection is the last group, so 0 also locks one that was freshly drawn. Locked BatchNorm keeps its
    statistics, and locked layers drop nothing, also after `towers.train()`; state-dict names stay open_clip's. Call it
    before DDP and the optimizer.

    Raises:
        ModelError: a tower with fewer groups, or one whose layers have no known order.
    """
    for tower, unlocked in (("image", image), ("text", text)):
        if unlocked is None:
            continue
        groups = layer_groups(towers, tower)
        if unlocked >= len(groups):
            raise ModelError(
                f"model.unlocked_{tower}_groups is {unlocked}, and the {tower} tower has {len(groups)} layer groups. "
                f"Lower it, or set model.lock_{tower}=false."
            )
        for name in itertools.chain(*groups[: len(groups) - unlocked]):
            towers.get_parameter(name).requires_grad_(False)
        # It looks anew each time, for modules may be replaced (SyncBatchNorm) after this.
        towers.train = functools.partial(_train_unlocked, towers)
        towers.train(towers.training)


def parameter_groups(
    towers: Towers, *, lr: float | None = None, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained, always in the same order: params, lr (if given), lr_scale, weight_decay, name.

    What decays is open_clip's choice: matrices, kernels, and embeddings of positions; no gains, biases, class
    embedding, or temperature. With layer_decay < 1, a layer group has lr_scale = layer_decay ** (groups above it in
    its tower) (Bao et al. 2021), and the temperature 1.
    """
    layers: dict[str, tuple[str, float]] = {}
    for tower in ("image", "text") if layer_decay < 1 else ():
        groups = layer_groups(towers, tower)
        for depth, names in enumerate(groups):
            layers |= dict.fromkeys(names, (f"{tower}.{depth}.", layer_decay ** (len(groups) - 1 - depth)))
    order = dict.fromkeys([("", 1.0), *layers.values()])
    found: dict[str, dict[str, Any]] = {
        layer + kind: {"params": [], "lr_scale": scale, "weight_decay": decay, "name": layer + kind}
        for layer, scale in order
        for kind, decay in (("decayed", weight_decay), ("plain", 0.0))
    }
    for name, parameter in towers.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            found[layers.get(name, ("",))[0] + ("decayed" if decays else "plain")]["params"].append(parameter)
    rates = [{} if lr is None else {"lr": lr * group["lr_scale"]} for group in found.values()]
    return [group | rate for group, rate in zip(found.values(), rates, strict=True) if group["params"]]


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
        raise ModelError(f"model.activation_checkpointing: {_called(unable)} cannot do it. Set it to false.")
    towers.set_grad_checkpointing()


class WeightAverage:
    """Moving average of the parameters, where they lie: a ← decay · a + (1 - decay) · w; buffers are copied."""

    def __init__(self, towers: Towers, decay: float) -> None:
        self.decay = decay
        self._tensors = {name: tensor.detach().clone() for name, tensor in towers.state_dict().items()}
        self._parameters = [name for name, _ in towers.named_parameters(remove_duplicate=False)]

    @torch.no_grad()
    def update(self, towers: Towers) -> None:
        """Take in the weights after a step; nothing waits for the device."""
        now = towers.state_dict()
        averages, weights = ([tensors[name] for name in self._parameters] for tensors in (self._tensors, now))
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for name in now.keys() - set(self._parameters):
            self._tensors[name].copy_(now[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by open_clip's names; the tensors themselves, not copies."""
        return dict(self._tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved average, or raise ModelError: other names or shapes."""
        _check_same(self._tensors, state, "the saved average of the weights")
        for name, tensor in state.items():
            self._tensors[name].copy_(tensor)


STEM, BLOCK, AFTER_BLOCKS, PROJECTION = range(4)
RESBLOCK = r"transformer\.resblocks\.(\d+)"
HF_BLOCK = r"transformer\.(?:encoder\.)?(?:layers?|block)\.(\d+)"
# What the names of a tower's parameters begin with: in the stem, in block number (…), in the projection.
LAYERS = {
    VisionTransformer: (r"conv1|class_embedding|positional_embedding|ln_pre", RESBLOCK, "proj"),
    ModifiedResNet: (r"conv\d|bn\d", r"layer(\d+)\.(\d+)", "attnpool"),
    TextTransformer: ("token_embedding|positional_embedding|cls_emb", RESBLOCK, "text_projection"),
    HFTextEncoder: (r"transformer\.(embed|shared|layernorm_emb)", HF_BLOCK, "proj"),
}


def _depth(stem: str, block: str, projection: str, name: str) -> tuple[int, ...]:
    """Sorts by how far from the input a parameter is."""
    if re.match(stem, name):
        return (STEM,)
    if found := re.match(block, name):
        return (BLOCK, *map(int, found.groups()))
    return (PROJECTION,) if re.match(projection, name) else (AFTER_BLOCKS,)


def _timm_depth(visual: TimmModel) -> Callable[[str], tuple[int, ...]]:
    try:
        depths = timm.models.group_parameters(visual.trunk, visual.trunk.group_matcher(), reverse=True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"{_called(visual)} has no layer groups. Unset lock_image and optim.layer_decay.") from error
    return lambda name: (BLOCK, depths[name[6:]]) if name.startswith("trunk.") else (PROJECTION,)


def _train_unlocked(towers: Towers, mode: bool = True) -> Towers:
    """nn.Module.train, but for modules of which nothing is trained."""
    nn.Module.train(towers, mode)
    for module in towers.modules() if mode else ():
        if _is_locked(module):
            nn.Module.train(module, False)
    return towers


def _is_locked(module: nn.Module) -> bool:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)


def _construct(
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
            f"text_cfg.hf_model_name {name!r}: no config.json ({_line(error)}). It is read at each start, so without "
            "network name a folder that holds it (`hf download NAME config.json --local-dir FOLDER`)."
        ) from error


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
            donor = _construct(config, init_scale=1.0, init_bias=None, own_weights=True)
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
    _check_same(mine, state, source)
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
        raise ModelError(f"{path}: is not weights only ({_line(error)}). Save it as .safetensors.") from error
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


def _check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
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


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(lower[one] for one in near)}." if near else ""


def _called(tower: nn.Module) -> str:
    return type(getattr(tower, "trunk", tower)).__name__


def _line(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""A tower's layers in order, and what follows from it: which of them are trained, and at which rate."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import timm.models
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from pipeline.model import TEMPERATURE, ModelError, Towers, called

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


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """BatchNorm's buffers that training changes: where there are any, features depend on a rank's whole batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms if not _is_locked(norm) for buffer in norm.buffers()]


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
        raise ModelError(f"{called(visual)} has no layer groups. Unset lock_image and optim.layer_decay.") from error
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

"""The same weights by open_clip's names and by those of transformers' CLIPModel, each way.

open_clip's names are those of its CLIP, whose text tower has no prefix. Its projections are applied from the right and
its queries, keys and values come from one matrix; transformers has the transposes, and three matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
BLOCKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = ("visual.proj", "text_projection")
KINDS = ("weight", "bias")


def to_transformers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of one tower or both by transformers' names, and the names of those that have no counterpart there."""
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for ours, theirs in _names(state):
        if len(theirs) == 3:
            found |= dict(zip(theirs, state[ours].chunk(3), strict=True))
        else:
            found[theirs[0]] = state[ours].T if ours in TRANSPOSED else state[ours]
        taken.add(ours)
    return {name: tensor.contiguous() for name, tensor in found.items()}, [name for name in state if name not in taken]


def from_transformers(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The reverse, for the weights that `expected` names (open_clip's), and the names that are left over.

    Raises:
        KeyError: one is missing.
    """
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for ours, theirs in _names(expected):
        tensor = torch.cat([state[name] for name in theirs]) if len(theirs) == 3 else state[theirs[0]]
        found[ours] = (tensor.T if ours in TRANSPOSED else tensor).contiguous()
        taken |= set(theirs)
    return found, [name for name in state if name not in taken]


def _names(ours: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of open_clip's names that has a counterpart, with that, or the three of queries, keys and values."""
    for name in ours:
        if name in OUTER:
            yield name, (OUTER[name],)
            continue
        stack, _, rest = name.partition("resblocks.")
        number, _, inner = rest.partition(".")
        layer, _, kind = inner.rpartition(".")
        prefix = f"{BLOCKS.get(stack + 'resblocks')}.{number}"
        if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = inner.removeprefix("attn.in_proj_")
            yield name, tuple(f"{prefix}.self_attn.{one}_proj.{kind}" for one in "qkv")
        elif layer in IN_BLOCK and kind in KINDS:
            yield name, (f"{prefix}.{IN_BLOCK[layer]}.{kind}",)

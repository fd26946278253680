"""Texts through a causal tower without the padding behind them, which takes most of the time and changes nothing.

Shapes: B texts, L = context length, K = the longest of them in tokens, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.model import Towers

# Where the text is read off: at its last token, found by its id.
POOLS = ("argmax", "eos")


class _EncodeText(nn.Module):
    """`encode_text` as a forward method."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, token_BL: Tensor) -> Tensor:
        return self.towers.encode_text(token_BL, normalize=True)


def encode_texts(towers: Towers, token_BL: Tensor) -> Tensor:
    """(B, D) unit-norm, as `towers.encode_text` gives but for rounding.

    Where no token sees a later one and the embedding is read off at the end of the text, what stands behind the
    longest text is left out. Other towers, and those whose weights are cut over ranks, get everything.
    """
    found = _causal(towers)
    if not found:
        return towers.encode_text(token_BL, normalize=True)
    name, last = found
    length = int(last(token_BL).max()) + 1
    encode = _EncodeText(towers)
    shorter = {
        f"{name}positional_embedding": encode.get_parameter(f"{name}positional_embedding")[:length],
        f"{name}attn_mask": encode.get_buffer(f"{name}attn_mask")[:length, :length],
    }
    features: Tensor = torch.func.functional_call(encode, shorter, (token_BL[:, :length],))
    return features


def _causal(towers: Towers) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """Where in an _EncodeText the text tower lies, and (B, L) tokens → (B,) the place that is read off."""
    tower: Any
    if type(towers) is open_clip.CLIP:
        name, tower, pool, end = "towers.", towers, towers.text_pool_type, towers.text_eos_id
    elif type(towers) is open_clip.CustomTextCLIP and type(towers.text) is TextTransformer:
        name, tower, pool, end = "towers.text.", towers.text, towers.text.pool_type, towers.text.eos_id
    else:
        return None
    appended = getattr(tower, "cls_emb", None) is not None
    if appended or pool not in POOLS or tower.attn_mask is None or isinstance(tower.positional_embedding, DTensor):
        return None
    return name, lambda token_BL: (token_BL if pool == "argmax" else (token_BL == end).int()).argmax(dim=1)

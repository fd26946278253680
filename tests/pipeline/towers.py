"""Small towers of every kind, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import model

PAIRS = 4
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}


def described(**vision_cfg: Any) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": TEXT}


PLAIN = described(**VIT)
CONFIGS = {
    "vit": PLAIN,
    "vit, own text class": {**PLAIN, "custom_text": True},
    "resnet": described(layers=[1, 1, 2, 1], width=8, head_width=16, image_size=32),
    "timm vit": described(timm_model_name="test_vit", timm_pool="token", image_size=160),
    "timm resnet": described(timm_model_name="test_resnet", timm_drop=0.5, image_size=64),
    "timm, its own head": described(timm_model_name="test_convnext", timm_proj="", image_size=64),
}
BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 12, "pad_token_id": 0, "dtype": "bfloat16"}


def kinds(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", names or [*CONFIGS, "bert"], indirect=True)


def built(config: dict[str, Any], seed: int = 0, **options: Any) -> model.Towers:
    """Towers without a weight that is zero, so that a gradient reaches each of them."""
    torch.manual_seed(seed)
    towers = model.build(config, **options)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return towers


def batch(towers: model.Towers) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(PAIRS, 3, *model.image_size(towers), generator=generator)
    return image, torch.randint(1, 50, (PAIRS, 8), generator=generator)


def loss_of(towers: model.Towers) -> Tensor:
    image_BD, text_BD, scale, *_ = towers(*batch(towers))
    return nn.functional.cross_entropy(scale * image_BD @ text_BD.T, torch.arange(PAIRS))


def copied(towers: model.Towers) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in towers.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

"""A folder that transformers loads by `from_pretrained`, without its hub and without code of ours.

It is a CLIPModel where both towers are open_clip's plain transformers. With timm's image tower, or Hugging Face's text
tower, it is a VisionTextDualEncoderModel. What neither has is refused by the layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import timm
from open_clip.hf_model import ClsPooler, HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from pipeline.export import huggingface_tokenizer
from pipeline.export.clip_weights import to_transformers
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.model import Towers, image_size
from pipeline.trained import TrainedModel

PIL_FILTERS = {"bilinear": 2, "bicubic": 3}
GELUS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
# What transformers' CLIP takes for a sign of its first checkpoints, which pooled the largest id whatever eos was.
LEGACY_EOS = 2

INSTEAD = "Export to open_clip or onnx instead, which hold any model."


class Tower(NamedTuple):
    """One half of the model: transformers' description of it, and its weights by the names that they have there."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def write(trained: TrainedModel, folder: Path) -> None:
    """Write config.json, model.safetensors, the tokenizer's files and the image processor's.

    Raises:
        ExportError: a layer, a pooling or a tokenizer that transformers has no counterpart for.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it would draw one for each file
    towers = trained.towers
    if towers.logit_bias is not None:
        _refuse("logit_bias", "the sigmoid loss's bias on logits")
    fast = huggingface_tokenizer.converted(trained.tokenize)
    image = _image_tower(towers.visual, trained.model_cfg["vision_cfg"])
    text = _text_tower(towers, fast, trained.tokenize.end_id)
    plain = (image.config["model_type"], text.config["model_type"]) == ("clip_vision_model", "clip_text_model")
    kind = "CLIP" if plain else "VisionTextDualEncoder"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=image.config,
        text_config=text.config,
        projection_dim=image.state["visual_projection.weight"].shape[0],
    )
    model = getattr(transformers, f"{kind}Model")(config)
    if text.config["model_type"] == "clip_text_model":
        fast.model_input_names = ["input_ids", "attention_mask"]
    state = {**image.state, **text.state, "logit_scale": towers.logit_scale.reshape(())}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(f"transformers builds other towers than open_clip's: {error}") from error
    model.save_pretrained(folder)
    images = _image_processor(towers, trained.recipe.data.interpolation)
    getattr(transformers, f"{kind}Processor")(images, fast).save_pretrained(folder)
    # Where tools look that know no processor_config.json.
    images.save_pretrained(folder)


def _image_processor(towers: Towers, interpolation: str) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    height, width = image_size(towers)
    if height != width:
        raise ExportError(f"images of {height} × {width} have no counterpart in transformers' CLIPProcessor. {INSTEAD}")
    return CLIPImageProcessorPil(
        size={"shortest_edge": height},
        crop_size={"height": height, "width": width},
        image_mean=list(towers.visual.image_mean),
        image_std=list(towers.visual.image_std),
        resample=PIL_FILTERS[interpolation],
    )


def _image_tower(visual: Any, vision_cfg: Mapping[str, Any]) -> Tower:
    if isinstance(visual, TimmModel):
        return _timm_tower(visual, vision_cfg)
    if not isinstance(visual, VisionTransformer):
        _refuse("visual", type(visual).__name__)
    if visual.attn_pool is not None:
        _refuse("visual.attn_pool", "attentional pooling")
    if visual.pool_type != "tok":
        _refuse("visual", f"pool_type {visual.pool_type!r}; there, the class token is taken")
    if isinstance(visual.ln_pre, nn.Identity):
        _refuse("visual.ln_pre", "none (no_ln_pre)")
    if len({*visual.image_size}) > 1 or len({*visual.patch_size}) > 1:
        _refuse("visual.conv1", f"images of {visual.image_size} in patches of {visual.patch_size}, not squares")
    config = {
        "model_type": "clip_vision_model",
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        **_transformer_config(visual.transformer),
    }
    return Tower(config, _renamed({f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}))


def _timm_tower(visual: Any, vision_cfg: Mapping[str, Any]) -> Tower:
    """The trunk as transformers' TimmWrapperModel has it: timm builds it by name, and pools without a classifier."""
    pool = vision_cfg.get("timm_pool", "avg")
    layers = dict(visual.head.named_children())
    projection: Any = layers.pop("proj", None)
    if projection is None or projection.bias is not None or set(layers) - {"drop"}:
        what = f"timm_pool {pool!r}, timm_proj {vision_cfg.get('timm_proj', 'linear')!r}, or a bias"
        _refuse("visual.head", f"{what}; there, the trunk pools and a linear layer without bias follows")
    pooled: dict[str, Any] = {"global_pool": pool} if pool else {}
    # A ViT that is made for average pooling has its last norm behind that; open_clip changes the pooling afterwards.
    for model_args in (pooled, {**pooled, "fc_norm": False}):
        try:
            built = timm.create_model(vision_cfg["timm_model_name"], num_classes=0, **model_args)
        except TypeError:  # a tower that has no fc_norm
            continue
        if built.state_dict().keys() == visual.trunk.state_dict().keys():
            break
    else:
        _refuse("visual.trunk", f"{type(visual.trunk).__name__} with timm_pool {pool!r}, which timm builds otherwise")
    config = {
        "model_type": "timm_wrapper",
        "architecture": vision_cfg["timm_model_name"],
        "model_args": model_args,
        "hidden_size": projection.in_features,
    }
    state = {f"vision_model.timm_model.{name}": tensor for name, tensor in visual.trunk.state_dict().items()}
    return Tower(config, {**state, "visual_projection.weight": projection.weight})


def _text_tower(towers: Towers, fast: Any, end_id: int | None) -> Tower:
    text: Any = getattr(towers, "text", towers)
    if isinstance(text, HFTextEncoder):
        return _huggingface_tower(text)
    pool = towers.text_pool_type if text is towers else text.pool_type
    if pool not in ("argmax", "eos"):
        _refuse("the text tower", f"pool_type {pool!r}; there, the first end of text is taken")
    if end_id == LEGACY_EOS:
        _refuse("the tokenizer", f"end of text {LEGACY_EOS}, to transformers a sign of its first checkpoints")
    if getattr(text, "cls_emb", None) is not None:
        _refuse("text.cls_emb", "embed_cls")
    if text.attn_mask is None:
        _refuse("text.attn_mask", "none (no_causal_mask)")
    if not isinstance(text.text_projection, nn.Parameter):
        _refuse("text_projection", "with a bias" if text.text_projection is not None else "none")
    config = {
        "model_type": "clip_text_model",
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": text.positional_embedding.shape[0],
        "pad_token_id": fast.pad_token_id,
        "bos_token_id": fast.bos_token_id,
        # Where `argmax` pools too: it is the largest of all ids.
        "eos_token_id": end_id,
        **_transformer_config(text.transformer),
    }
    state = {name: tensor for name, tensor in text.state_dict().items() if not name.startswith(("visual.", "logit_"))}
    return Tower(config, _renamed(state))


def _huggingface_tower(text: Any) -> Tower:
    if text.config.is_encoder_decoder:
        _refuse("text.transformer", f"the encoder of {type(text.transformer).__name__}")
    if not isinstance(text.pooler, ClsPooler) or getattr(text.transformer, "pooler", None) is None:
        _refuse("text.pooler", f"{type(text.pooler).__name__}; there, hf_pooler_type is cls_pooler")
    if not isinstance(text.proj, nn.Linear):
        _refuse("text.proj", f"{type(text.proj).__name__}; there, hf_proj_type is linear")
    # What is named bfloat16 there would be built in that; where it was read from is nobody's business.
    config = text.transformer.config.to_dict() | {"dtype": "float32", "_name_or_path": ""}
    state = {f"text_model.{name}": tensor for name, tensor in text.transformer.state_dict().items()}
    return Tower(config, {**state, "text_projection.weight": text.proj.weight})


def _transformer_config(transformer: Any) -> dict[str, Any]:
    """The settings that both of CLIP's towers share, as the first block has them; all are built alike."""
    block = transformer.resblocks[0]
    if type(block) is not ResidualAttentionBlock:
        _refuse("resblocks", f"{type(block).__name__}: normalised, scaled or cosine attention")
    if not isinstance(block.ls_1, nn.Identity):
        _refuse("resblocks.0.ls_1", "LayerScale")
    activation = block.mlp.gelu
    names = {QuickGELU: "quick_gelu", nn.GELU: GELUS.get(getattr(activation, "approximate", ""))}
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": names[type(activation)],
        "layer_norm_eps": block.ln_1.eps,
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found, left = to_transformers(state)
    if left:
        _refuse(left[0], "a weight")
    return found


def _refuse(layer: str, what: str) -> NoReturn:
    raise ExportError(f"{layer} ({what}) has no counterpart in transformers' CLIP. {INSTEAD}")

"""Models that others trained: how open_clip or transformers loads them, and how open_clip describes them.

Shapes: B images or texts, S side, L context length, D embedding width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from PIL import Image
from torch import Tensor

from pipeline import model, untrusted
from pipeline.export.clip_weights import from_transformers
from pipeline.export.huggingface import LEGACY_EOS
from pipeline.model import ModelError, first_line
from pipeline.trained import FOLDER_CONFIG, SCHEMAS, load_any

CONFIG = "config.json"
# transformers' names of CLIP's activations → open_clip's settings.
ACTIVATIONS: dict[str, tuple[bool, dict[str, str]]] = {
    "quick_gelu": (True, {}),
    "gelu": (False, {}),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
}
# Pillow's filters.
FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Foreign:
    """A model as its own library has it, and what it is made of.

    Attributes:
        model_cfg: open_clip's description of the towers.
        state: weights by open_clip's names, float32.
        mean: of red, green and blue in the pixels that it takes.
        std: the same.
        interpolation: of resizing, bicubic or bilinear.
        tokenizer: transformers' object; None for open_clip's byte-pair encoding.
        encode_images: by that library: B PIL images → (B, D) unit-norm.
        encode_texts: by that library: B texts → (B, D) unit-norm.
    """

    model_cfg: dict[str, Any]
    state: dict[str, Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    tokenizer: Any
    encode_images: Callable[[Sequence[Image.Image]], Tensor]
    encode_texts: Callable[[Sequence[str]], Tensor]


def read(source: str) -> Foreign:
    """Load a model.

    Args:
        source: open_clip's NAME,FILE or NAME,TAG; a folder with open_clip_config.json, `local-dir:FOLDER`; `hf-hub:ID`;
            or a folder of transformers' CLIPModel.

    Raises:
        ModelError: nothing of that kind, what would run code, or what cannot be loaded or described.
    """
    folder = Path(source.removeprefix(SCHEMAS[0]))
    if (folder / "config.yaml").is_file():
        raise ModelError(f"{source} is a run folder already: evaluate, export or train it as it is.")
    if folder.is_dir():
        untrusted.check_folder(folder)
    if (folder / FOLDER_CONFIG).is_file() or source.startswith(SCHEMAS) or "," in source:
        return _of_open_clip(source)
    if (folder / CONFIG).is_file():
        return _of_transformers(folder)
    raise ModelError(
        f"{source}: looked for a folder with {FOLDER_CONFIG} or {CONFIG}, {' or '.join(one + '…' for one in SCHEMAS)}, "
        "or NAME,FILE such as ViT-B-32,epoch_32.pt, and found none of them."
    )


def _of_open_clip(source: str) -> Foreign:
    loaded = load_any(source)
    towers, known = loaded.towers, loaded.towers.visual.preprocess_cfg
    if type(towers) not in (open_clip.CLIP, open_clip.CustomTextCLIP):
        raise ModelError(f"{source}: {type(towers).__name__} has more than two towers; there is no place for the rest.")
    if known["resize_mode"] != "shortest":
        raise ModelError(
            f"{source}: images are resized by {known['resize_mode']!r}; here, the shorter side is, and the centre cut "
            "out. `evaluate` takes the model as it is, without an import."
        )
    return Foreign(
        model_cfg=loaded.model_cfg,
        state=towers.state_dict(),
        mean=known["mean"],
        std=known["std"],
        interpolation="bilinear" if known["interpolation"] == "bilinear" else "bicubic",
        tokenizer=_tokenizer_of(loaded.tokenize, source),
        encode_images=lambda images: towers.encode_image(
            torch.stack([loaded.preprocess(image) for image in images]), normalize=True
        ),
        encode_texts=lambda texts: towers.encode_text(loaded.tokenize(texts), normalize=True),
    )


def _tokenizer_of(tokenize: Any, source: str) -> Any:
    """transformers' object behind an open_clip tokenizer, None for open_clip's own, if it works as those here do."""
    ours = {SimpleTokenizer: (get_clean_fn("lower"), None), HFTokenizer: (get_clean_fn("whitespace"), "")}
    found = tokenize.clean_fn, getattr(tokenize, "tokenizer_mode", None)
    if ours.get(type(tokenize)) != found or getattr(tokenize, "strip_sep_token", False):
        raise ModelError(f"{source}: {type(tokenize).__name__}, or how it cleans texts, has no counterpart here.")
    return getattr(tokenize, "tokenizer", None)


def _of_transformers(folder: Path) -> Foreign:
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        raise ModelError(f"{folder / CONFIG}: its model_type is {kind!r}; of transformers' models, `clip` is imported.")
    try:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        # Named, since a configuration may name one that would be fetched.
        made = {"dtype": torch.float32, "attn_implementation": "sdpa", "output_loading_info": True}
        theirs, known = CLIPModel.from_pretrained(folder, **here, **made)
        fast = AutoTokenizer.from_pretrained(folder, **here)
        images = CLIPImageProcessorPil.from_pretrained(folder, **here)
    except Exception as error:  # whatever transformers and the libraries below it raise
        raise ModelError(f"{folder}: transformers cannot load it: {first_line(error)}") from error
    if absent := sorted({*known["missing_keys"], *(name for name, *_ in known["mismatched_keys"])}):
        raise ModelError(f"{folder}: has no weights for {', '.join(absent[:3])}; {len(absent)} are missing.")
    theirs.eval()
    model_cfg = _described(theirs.config, folder)
    length = model_cfg["text_cfg"]["context_length"]
    state, left = from_transformers(theirs.state_dict(), model.build(model_cfg).state_dict())
    if left:
        raise ModelError(f"{folder}: {left[0]} has no counterpart in open_clip's CLIP.")

    def encode_texts(texts: Sequence[str]) -> Tensor:
        tokens = fast(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found = theirs.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return torch.nn.functional.normalize(found.pooler_output, dim=-1)

    def encode_images(pictures: Sequence[Image.Image]) -> Tensor:
        found = theirs.get_image_features(images(list(pictures), return_tensors="pt").pixel_values)
        return torch.nn.functional.normalize(found.pooler_output, dim=-1)

    return Foreign(
        model_cfg=model_cfg,
        state=state,
        mean=images.image_mean,
        std=images.image_std,
        interpolation=_interpolation(images, theirs.config.vision_config.image_size, folder),
        tokenizer=None if _is_open_clip_s(fast) else fast,
        encode_images=encode_images,
        encode_texts=encode_texts,
    )


def _described(config: Any, folder: Path) -> dict[str, Any]:
    """open_clip's model_cfg of transformers' CLIPConfig."""
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if not acts <= ACTIVATIONS.keys() or len({ACTIVATIONS[act][0] for act in acts}) > 1:
        raise ModelError(
            f"{folder / CONFIG}: hidden_act is {' and '.join(sorted(acts))}; open_clip has no such towers."
        )
    if vision.num_channels != 3 or not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise ModelError(
            f"{folder / CONFIG}: images of {vision.num_channels} channels, {vision.image_size} in patches of "
            f"{vision.patch_size}; those of 3 channels and square are imported."
        )
    largest = text.eos_token_id in (LEGACY_EOS, text.vocab_size - 1)
    pooling = {"pool_type": "argmax"} if largest else {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": ACTIVATIONS[vision.hidden_act][0],
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_tower(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **pooling,
            **_tower(text),
        },
    }


def _tower(config: Any) -> dict[str, Any]:
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) < config.intermediate_size:
        ratio = math.nextafter(ratio, math.inf)  # open_clip cuts off what a product loses to rounding
    gelu = ACTIVATIONS[config.hidden_act][1]
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": ratio,
        "norm_kwargs": {"eps": config.layer_norm_eps},
        **({"act_kwargs": gelu} if gelu else {}),
    }


def _interpolation(images: Any, side: int, folder: Path) -> str:
    """The filter of transformers' image processor, if it prepares images as open_clip does."""
    crop = {"height": side, "width": side}
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    found = {name: getattr(images, name) for name in (*steps, "size", "crop_size", "resample")}
    wanted = {**dict.fromkeys(steps, True), "size": {"shortest_edge": side}, "crop_size": crop}
    if {**found, **wanted} != found or found["resample"] not in FILTERS or abs(images.rescale_factor * 255 - 1) > 1e-6:
        raise ModelError(f"{folder}: its image processor has {found}; CLIP's resizes to {side}, and cuts out {side}.")
    return FILTERS[found["resample"]]


def _is_open_clip_s(fast: Any) -> bool:
    """Whether transformers' tokenizer has the vocabulary of open_clip's, which goes under other names."""
    names = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}
    return {names.get(piece, piece): number for piece, number in fast.get_vocab().items()} == SimpleTokenizer().encoder

"""What another tool needs to make a model's inputs, beside formats that hold the towers only: preprocess.json.

{"image": {"size": [height, width], "mean", "std", "interpolation", "resize_mode"}, as in open_clip_config.json: the
image is resized until it covers the size, its centre cut out, and of 0 to 1 the mean is taken, then divided by std;
"text": {"tokenizer", "context_length", "start_id", "end_id", "pad_id"}: a text's blanks are evened out, it is cut to
the context length, start and end included, and filled up with pad_id. `tokenizer` is the file beside it:
sentencepiece.model for sentencepiece, which adds neither start nor end, or tokenizer.json for tokenizers, which adds
both; "logits": {"scale", "bias"}: cosine × scale + bias is what the model was trained to make of a pair.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from pipeline import model
from pipeline.export import huggingface_tokenizer
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.tokenizer import SentencePieceTokenizer
from pipeline.trained import TrainedModel

NAME = "preprocess.json"
SENTENCEPIECE, TOKENIZERS = "sentencepiece.model", "tokenizer.json"


def write(trained: TrainedModel, folder: Path) -> None:
    """Write preprocess.json and the tokenizer's file.

    Raises:
        ExportError: a tokenizer of transformers' that is not one of tokenizers'.
    """
    if isinstance(trained.tokenize, SentencePieceTokenizer):
        shutil.copyfile(trained.tokenize.path, folder / SENTENCEPIECE)
    else:
        theirs = huggingface_tokenizer.converted(trained.tokenize)
        if not theirs.is_fast:
            raise ExportError(f"{type(theirs).__name__} has no {TOKENIZERS}, so that no other tool could be given it.")
        found = json.loads(theirs.backend_tokenizer.to_str())
        if theirs.split_special_tokens:
            # `tokenizers` would take what spells one for the token, such as each `!` where that is CLIP's padding.
            found["added_tokens"] = []
        (folder / TOKENIZERS).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    (folder / NAME).write_text(json.dumps(about(trained), indent=1), encoding="utf-8")


def about(trained: TrainedModel) -> dict[str, Any]:
    """What preprocess.json says."""
    towers, tokenize = trained.towers, trained.tokenize
    known = towers.visual.preprocess_cfg
    image = {
        "size": list(model.image_size(towers)),
        "mean": list(known["mean"]),
        "std": list(known["std"]),
        "interpolation": trained.recipe.data.interpolation,
        "resize_mode": known["resize_mode"],
    }
    text: dict[str, Any] = {"tokenizer": TOKENIZERS, "context_length": tokenize.context_length}
    if isinstance(tokenize, SentencePieceTokenizer):
        text |= {"tokenizer": SENTENCEPIECE, "start_id": tokenize.bos_id}
    text |= {"end_id": tokenize.end_id, "pad_id": tokenize.pad_id}
    scale, bias = logits(towers)
    return {"image": image, "text": text, "logits": {"scale": math.exp(scale), "bias": bias}}


def logits(towers: model.Towers) -> tuple[float, float]:
    """What makes logits of cosines: logit_scale, the factor's logarithm, and the sigmoid loss's bias, else 0."""
    return towers.logit_scale.item(), 0.0 if towers.logit_bias is None else towers.logit_bias.item()

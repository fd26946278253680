"""Is an export equal to its checkpoint? Asked of the other library, in a fresh process, on real inputs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from data_prep import manifest
from data_prep.record import TRAIN, DataError
from pipeline.evaluate import sets
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.trained import TrainedModel

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
IMAGES = 32
TEXTS = 128

# Beside real captions: what tokenizers trip over.
ODD_TEXTS = (
    *("", "  two  spaces ", "ÜMLAUTS and ½", "a &amp; b", "日本語 😀"),
    *("<s> </s> <pad>", "tab\tand\nnewline", "long " * 90, "A\u0332B e\u0301 1\ufe0f\u20e3"),
)


@dataclass(frozen=True)
class Inputs:
    """Images and texts to compare on, and where they are from."""

    images: list[Image.Image]
    texts: list[str]
    origin: str


def real_inputs(data: Path) -> Inputs:
    """Up to 32 images and 128 captions: of an evaluation set, else of the train shards, else (it is gone) generated."""
    try:
        dataset = manifest.read(data)
        named = [source for source in dataset.evaluation_sets if source.kind in ("retrieval", "selection")]
        shard = dataset.split(TRAIN)[0].name
        items = sets.read(named[0]) if named else sets.read_tar(dataset.path / shard)
        origin = named[0].name if named else shard
    except DataError as error:
        log.info("parity is checked on generated inputs, since there are no real ones: %s", error)
        random = np.random.default_rng(0)
        images = [Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8)) for _ in range(IMAGES)]
        return Inputs(
            images, [*(f"generated text number {number}" for number in range(TEXTS)), *ODD_TEXTS], "generated"
        )
    items = items[:IMAGES]
    texts = [text for item in items for text in item.captions][:TEXTS]
    return Inputs([item.open() for item in items], [*texts, *ODD_TEXTS], origin)


def compare(trained: TrainedModel, folder: Path, script: Path, inputs: Inputs) -> dict[str, Any]:
    """Embed the same inputs with the checkpoint here and with the export there.

    Args:
        trained: the checkpoint.
        folder: the export.
        script: loads the export with its own library, as `reload_open_clip.py` does.

    Returns:
        max_abs over both towers' unit-norm float32 embeddings, and by tower; how many token ids differ.

    Raises:
        ExportError: the other library cannot load the export; its message is quoted.
    """
    with tempfile.TemporaryDirectory() as temporary:
        exchange = Path(temporary)
        for number, image in enumerate(inputs.images):
            image.save(exchange / f"{number:04d}.png")
        (exchange / "texts.json").write_text(json.dumps(inputs.texts), encoding="utf-8")
        # -P: the script's own folder has an open_clip.py that is not the library
        command = [sys.executable, "-P", str(script), str(folder.resolve()), str(exchange)]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary, env=offline)
        if done.returncode:
            raise ExportError(f"{folder}: its own library does not load it: {done.stderr.strip().splitlines()[-1]}")
        theirs = load_file(exchange / "embeddings.safetensors")
    with torch.inference_mode():
        image_BCSS = torch.stack([trained.preprocess(image) for image in inputs.images])
        token_BL = trained.tokenize(inputs.texts)
        ours = {
            "images": trained.towers.encode_image(image_BCSS, normalize=True),
            "texts": trained.towers.encode_text(token_BL, normalize=True),
        }
    theirs_BL = theirs["tokens"]
    same_shape = theirs_BL.shape == token_BL.shape
    differing = int((token_BL != theirs_BL).sum()) if same_shape else token_BL.numel()
    # Not max(): a difference that is not a number must not pass for a small one.
    apart = {name: float((ours[name] - theirs[name]).abs().amax()) for name in ours}
    return {
        "max_abs": float(np.max(list(apart.values()))),
        "max_abs_images": apart["images"],
        "max_abs_texts": apart["texts"],
        "differing_tokens": differing,
        "images": len(inputs.images),
        "texts": len(inputs.texts),
        "inputs": inputs.origin,
    }


def is_equal(figures: dict[str, Any]) -> bool:
    """Whether an export may be published."""
    return bool(figures["max_abs"] <= TOLERANCE and figures["differing_tokens"] == 0)

"""Weights that others trained → a run folder, which is evaluated, exported and trained further as our own are."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import begin, config, foreign, model, tokenizer
from pipeline import checkpoint as checkpoints
from pipeline import trained as loading
from pipeline.foreign import Foreign
from pipeline.model import ModelError
from pipeline.trained import TrainedModel

TOLERANCE = 1e-5
IMAGES = 8
TEXTS = (
    *("a photo of a cat", "two dogs, and a red ball!", "It's 12 o'clock; they're late.", "naïve straße", ""),
    *("left-of (or right-of) the blue circle", "many words " * 60, "."),
)

log = logging.getLogger(__name__)


def import_run(source: str, run: Path) -> None:
    """Write a run folder with a checkpoint of step 0, once it gives the same embeddings.

    Args:
        source: what foreign.read takes.
        run: where it goes; nothing may be there.

    Raises:
        ModelError: a source that cannot be loaded or described here, a folder that is not empty, or embeddings that
            differ by more than 1e-5. Nothing is written then.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ModelError(f"{run}: something is there already. Choose another folder.")
    found = foreign.read(source)
    unproven = run.with_name(f".{run.name}.importing")
    shutil.rmtree(unproven, ignore_errors=True)
    try:
        _write(found, source, unproven, run)
        apart = _apart(found, loading.load(unproven))
        if not apart <= TOLERANCE:
            raise ModelError(
                f"{source} was not imported: embeddings differ by up to {apart:.1e} (allowed: {TOLERANCE:.0e}) on "
                "generated inputs, so its tokenizer, pixels or layers are not those that are described."
            )
        shutil.rmtree(run, ignore_errors=True)
        unproven.rename(run)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    log.info("%s: %s, max difference %.1e. To train from it, in another folder:", run, source, apart)
    log.info("python -m pipeline train RECIPE OTHER_RUN --data DATA %s", begin.words_of_import(run))


def _write(found: Foreign, source: str, run: Path, final: Path) -> None:
    """Write the run, whose folder will be called `final`."""
    run.mkdir(parents=True)
    kind = "open_clip" if found.tokenizer is None else "huggingface"
    values: dict[str, Any] = {
        "data": {"interpolation": found.interpolation},
        "tokenizer": {"kind": kind},
        "model": {"config": found.model_cfg, "image_mean": found.mean, "image_std": found.std},
        "loss": {"kind": "sigmoid" if "logit_bias" in found.state else "info_nce"},
        # Nothing was trained here; a recipe has a length, and a batch.
        "train": {"steps": 1, "batch_size": 1},
    }
    recipe = config.parse(values, source)
    checkpoints.write_atomically(run / "config.yaml", recipe.to_yaml())
    if found.tokenizer is not None:
        found.tokenizer.save_pretrained(tokenizer.kept(kind, run / "tokenizer"))
    model.keep_text(found.model_cfg, run)
    preprocess_cfg = {"mean": list(found.mean), "std": list(found.std), "interpolation": found.interpolation}
    described: dict[str, Any] = {
        "model_cfg": copy.deepcopy(found.model_cfg),
        "preprocess_cfg": preprocess_cfg,
        "imported": source,
    }
    if "hf_model_name" in found.model_cfg["text_cfg"]:
        described["model_cfg"]["text_cfg"]["hf_model_name"] = str(final.resolve() / model.KEPT_TEXT)
    checkpoints.write_atomically(run / model.IMPORTED, json.dumps(described, indent=1))
    checkpoints.publish(run, checkpoints.Checkpoint(0, found.state, {}, {"imported": source, "metrics": {}}))


def _apart(found: Foreign, ours: TrainedModel) -> float:
    """The largest difference of any element of a unit-norm embedding, on generated images and texts."""
    height, width = model.image_size(ours.towers)
    random = np.random.default_rng(0)
    # What these leave over is even, so that every library cuts out the same centre.
    shapes = [(height, width), (2 * height, 2 * width), (2 * height, 6 * width), (3 * height, width)]
    images = [
        Image.fromarray(random.integers(0, 256, (*shapes[number % len(shapes)], 3), dtype=np.uint8))
        for number in range(IMAGES)
    ]
    with torch.inference_mode():
        pixel_BCSS = torch.stack([ours.preprocess(image) for image in images])
        apart = [
            ours.towers.encode_image(pixel_BCSS, normalize=True) - found.encode_images(images),
            ours.towers.encode_text(ours.tokenize(TEXTS), normalize=True) - found.encode_texts(TEXTS),
        ]
    return float(torch.cat([one.flatten() for one in apart]).abs().amax())

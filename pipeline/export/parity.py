"""Is an export equal to its checkpoint? Asked of the other library, in a fresh process, on real inputs.

B = images or texts, D = embedding width, L = context length, S = pixels of a side, Q = queries, N = what is ranked.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_prep import manifest
from data_prep.record import DataError
from pipeline.evaluate import sets, splits
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.export import own_processing, preparation
from pipeline.failure import ParityError
from pipeline.trained import TrainedModel

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
IMAGES = 32
TEXTS = 128

# Beside real captions: what tokenizers trip over.
ODD_TEXTS = (
    *("", "  two  spaces ", "ÜMLAUTS and ½", "a &amp; b", "日本語 😀"),
    *("<s> </s> <pad>", "<|endoftext|> !", "tab\tand\nnewline", "long " * 90, "A\u0332B e\u0301 1\ufe0f\u20e3"),
)


@dataclass(frozen=True)
class Inputs:
    """Images and texts to compare on, and where they are from."""

    images: list[Image.Image]
    texts: list[str]
    origin: str


def real_inputs(data: str) -> Inputs:
    """Up to 32 images and 128 captions: of an evaluation set, else of the first tar, else (they are gone) generated.

    The last image is a square of the first, whose centre every library finds in the same place.

    Args:
        data: a dataset, a folder or a pattern of tars, here or behind an address; empty for none.
    """
    try:
        items, origin = _items(data)
        found = list(itertools.islice(_sound(items), IMAGES - 1))
        if not found:
            raise DataError(f"{data}/{origin}: has no image.")
    except (DataError, OSError) as error:
        log.info("parity is checked on generated inputs, since there are no real ones: %s", error)
        random = np.random.default_rng(0)
        images = [Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8)) for _ in range(IMAGES)]
        return Inputs(
            images, [*(f"generated text number {number}" for number in range(TEXTS)), *ODD_TEXTS], "generated"
        )
    images = [image for _, image in found]
    side = min(images[0].size)
    texts = [text for item, _ in found for text in item.captions][:TEXTS]
    return Inputs([*images, images[0].crop((0, 0, side, side))], [*texts, *ODD_TEXTS], origin)


def _items(data: str) -> tuple[list[Item], str]:
    """Some images with captions, and where they are from."""
    if not data:
        raise DataError("the run names no data.")
    if (Path(data) / manifest.MANIFEST).is_file():
        dataset = manifest.read(Path(data))
        if named := [source for source in dataset.evaluation_sets if source.kind in ("retrieval", "selection")]:
            return sets.read(named[0]), named[0].name
    placed = splits.open_train(data).items(0)
    return [item for _, item in placed], placed[0][0] if placed else "the first tar"


def _sound(items: Sequence[Item]) -> Iterator[tuple[Item, Image.Image]]:
    """Those that decode; training does without the others too."""
    for item in items:
        try:
            yield item, item.open()
        except EvaluationError as error:
            log.warning("%s Left out.", error)


def compare(trained: TrainedModel, folder: Path, scripts: Sequence[Path], inputs: Inputs) -> dict[str, Any]:
    """Embed the same inputs with the checkpoint here and with the export there.

    Args:
        trained: the checkpoint.
        folder: the export.
        scripts: `python SCRIPT FOLDER INPUTS` loads the export with its own library only. INPUTS holds texts.json and
            images 0000.png, 0001.png …, and, for towers without a preprocessing of their own, what ours makes of
            them: pixels.npy (B, 3, S, S) and tokens.npy (B, L). It writes INPUTS/found.npz; together they find `images`
            and `texts`, unit-norm float32 (B, D); `tokens`, of the texts; `logits`, logit_scale and the bias, else 0.
            Where images and texts are not prepared by open_clip, `images` are of pixels.npy, and what the images become
            is `pixels`, or `transformers_pixels`, whose crops may fall elsewhere; texts that open_clip's cleaning
            changes are then left out, and counted.

    Returns:
        The figures of `measure`, and what they are of.

    Raises:
        ParityError: the other library cannot load the export; its message is quoted.
    """
    with torch.inference_mode():
        pixel_BCSS = torch.stack([trained.preprocess(image) for image in inputs.images])
        token_BL = trained.tokenize(inputs.texts)
        ours = {
            "images": trained.towers.encode_image(pixel_BCSS, normalize=True).numpy(),
            "texts": trained.towers.encode_text(token_BL, normalize=True).numpy(),
            "tokens": token_BL.numpy(),
            "logits": np.array(preparation.logits(trained.towers)),
        }
    theirs: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        exchange = Path(temporary)
        for number, image in enumerate(inputs.images):
            image.save(exchange / f"{number:04d}.png")
        (exchange / "texts.json").write_text(json.dumps(inputs.texts), encoding="utf-8")
        np.save(exchange / "pixels.npy", pixel_BCSS.numpy())
        np.save(exchange / "tokens.npy", ours["tokens"])
        for script in scripts:
            # -P: the script's own folder has an open_clip.py that is not the library
            command = [sys.executable, "-P", str(script.resolve()), str(folder.resolve()), str(exchange)]
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=offline)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
                raise ParityError(f"{folder}: its own library does not load it: {said[-1]}")
            with np.load(exchange / "found.npz") as file:
                theirs |= file
            (exchange / "found.npz").unlink()
    about: dict[str, Any] = {"images": len(inputs.images), "texts": len(inputs.texts), "inputs": inputs.origin}
    others = theirs.keys() & {"pixels", "transformers_pixels"}
    if "pixels" in others:
        about["max_abs_pixels"] = _largest(pixel_BCSS.numpy(), theirs["pixels"])
    if "transformers_pixels" in others:
        sizes = [image.size for image in inputs.images]
        about |= own_processing.measure_pixels(pixel_BCSS.numpy(), theirs["transformers_pixels"], sizes)
    if others:
        kept_B = own_processing.unchanged(inputs.texts)
        about |= {"texts": int(kept_B.sum()), "texts_changed_by_cleaning": int((~kept_B).sum())}
        ours, theirs = ({**one, **{name: one[name][kept_B] for name in ("texts", "tokens")}} for one in (ours, theirs))
    return measure(ours, theirs) | about


def measure(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """How far apart embeddings are, and what they find.

    Args:
        ours: `images` and `texts`, unit-norm (B, D), `tokens` (B, L), and `logits` (2,).
        theirs: the same.

    Returns:
        max_abs over images and texts, and of each; max_abs_logits, of logit_scale and the bias; reordered_texts and
        reordered_images (see `reordered`), of those that each image and each text finds; differing_tokens, how many ids
        differ.
    """
    apart = {name: _largest(ours[name], theirs[name]) for name in ("images", "texts")}
    if apart["images"] < np.inf and apart["texts"] < np.inf:
        ours_IT, theirs_IT = (one["images"].astype(np.float64) @ one["texts"].T for one in (ours, theirs))
        orders = {"texts": reordered(ours_IT, theirs_IT), "images": reordered(ours_IT.T, theirs_IT.T)}
    else:
        orders = {"texts": ours["texts"].shape[0], "images": ours["images"].shape[0]}
    return {
        # Not max(): a difference that is not a number must not pass for a small one.
        "max_abs": float(np.max(list(apart.values()))),
        **{f"max_abs_{name}": value for name, value in apart.items()},
        **{f"reordered_{name}": value for name, value in orders.items()},
        "max_abs_logits": _largest(ours["logits"], theirs["logits"]),
        "differing_tokens": _differing(ours["tokens"], theirs["tokens"]),
    }


def reordered(ours_QN: NDArray[Any], theirs_QN: NDArray[Any]) -> int:
    """How many of N stand, in any of Q rankings, behind one that they lead by more than the tolerance.

    Args:
        ours_QN: similarities, by which they lead.
        theirs_QN: those that rank them.
    """
    ranked_QN = np.take_along_axis(ours_QN, np.argsort(-theirs_QN, axis=1, kind="stable"), axis=1)
    return int((ranked_QN - np.minimum.accumulate(ranked_QN, axis=1) > TOLERANCE).sum())


def is_equal(figures: Mapping[str, Any]) -> bool:
    """Whether an export may be published."""
    counted = (figures["reordered_texts"], figures["reordered_images"], figures["differing_tokens"])
    largest = figures["max_abs"], figures["max_abs_logits"], figures.get("max_abs_pixels", 0.0)
    return all(value <= TOLERANCE for value in largest) and not any(counted)


def _largest(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else np.inf


def _differing(ours_BL: NDArray[Any], theirs_BL: NDArray[Any]) -> int:
    return int((ours_BL != theirs_BL).sum()) if ours_BL.shape == theirs_BL.shape else ours_BL.size

"""What a report shows of single images: best and worst retrievals, confused classes, and where words are seen.

Shapes: N images, M texts, P places of a hidden patch, W words, D = embedding width, S = the model's image size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluate.embed import Embedder, distinct, rows
from pipeline.evaluate.measures import OpenSet, open_set
from pipeline.evaluate.pictures import embedded
from pipeline.evaluate.result import read_rows
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.sources import Source
from pipeline.trained import LoadedModel

SHOWN = 3
NEAREST = 5
THUMBNAIL = 96
CONFUSED = 8
# Of the picture's side: a hidden patch, and how far it moves.
PATCH, STRIDE = 1 / 4, 1 / 8
MAP = 160
WORD = re.compile(r"\w+")


def retrieval(source: Source, embedder: Embedder) -> dict[str, Any]:
    """The queries that a model answers best and worst, both ways, each with its nearest answers.

    Best are those whose right answer comes first, by its similarity; worst those where it comes last. One an image.
    """
    opened = open_set(source)
    unique = distinct(opened.texts)
    image_ND, text_UD = embedder.images(opened.items).cpu(), embedder.texts(unique).cpu()
    embed = rows(unique, text_UD)
    sampled = opened.figures(image_ND, embed).sampled
    owner_M = np.repeat(np.arange(len(opened.items)), [len(item.captions) for item in opened.items])
    own_M = (image_ND[owner_M] * embed(opened.texts)).sum(dim=1).numpy()
    nearest_own_N = np.array([own.max() for own in np.split(own_M, np.flatnonzero(np.diff(owner_M)) + 1)])
    to_images, to_texts = (sampled[f"{way}_retrieval_median_rank"].values for way in ("image", "text"))

    def texts_to_images(chosen: Sequence[int]) -> list[dict[str, Any]]:
        return [_text_to_images(opened, text, int(to_images[text]), image_ND, embed) for text in chosen]

    def images_to_texts(chosen: Sequence[int]) -> list[dict[str, Any]]:
        return [_image_to_texts(opened, image, int(to_texts[image]), image_ND, unique, text_UD) for image in chosen]

    best_texts, worst_texts = _extremes(to_images, own_M, owner_M)
    best_images, worst_images = _extremes(to_texts, nearest_own_N, np.arange(len(image_ND)))
    return {
        "set": source.name,
        "images": len(opened.items),
        "texts": len(unique),
        "to_images": {"best": texts_to_images(best_texts), "worst": texts_to_images(worst_texts)},
        "to_texts": {"best": images_to_texts(best_images), "worst": images_to_texts(worst_images)},
    }


def _extremes(rank_Q: Any, score_Q: Any, owner_Q: Any) -> tuple[list[int], list[int]]:
    """(best, worst) queries, each of another image."""
    ordered = np.lexsort((-score_Q, rank_Q)).tolist()
    return _one_an_image(ordered, owner_Q), _one_an_image(ordered[::-1], owner_Q)


def _one_an_image(ordered: Sequence[int], owner_Q: Any) -> list[int]:
    first: dict[int, int] = {}
    for query in ordered:
        first.setdefault(int(owner_Q[query]), query)
        if len(first) == SHOWN:
            break
    return list(first.values())


def _text_to_images(opened: OpenSet, text: int, rank: int, image_ND: Tensor, embed: Any) -> dict[str, Any]:
    caption = opened.texts[text]
    nearest = torch.topk(image_ND @ embed([caption])[0], min(NEAREST, len(image_ND))).indices.tolist()
    shown = [
        {"source": embedded(opened.items[near].open(), THUMBNAIL), "right": caption in opened.items[near].captions}
        for near in nearest
    ]
    return {"text": caption, "rank": rank, "images": shown}


def _image_to_texts(
    opened: OpenSet, image: int, rank: int, image_ND: Tensor, unique: Sequence[str], text_UD: Tensor
) -> dict[str, Any]:
    item = opened.items[image]
    nearest = torch.topk(text_UD @ image_ND[image], min(NEAREST, len(unique))).indices.tolist()
    said = [{"text": unique[near], "right": unique[near] in item.captions} for near in nearest]
    return {"source": embedded(item.open(), THUMBNAIL), "rank": rank, "texts": said}


def confusion(source: Source, record: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most often, each with a picture.

    Args:
        source: a classification set.
        record: what was measured on it.
        folder: where that lies, with its rows.
    """
    answered_N = read_rows(folder / f"{source.name}.parquet")["mean_per_class_precision"].groups
    items = source.items()
    if len(items) != len(answered_N):
        raise EvaluationError(
            f"{source.path}: has {len(items)} images, and {folder} has results of {len(answered_N)}. Evaluate again."
        )
    wrong = sorted((pair for pair in record["confusion"] if pair[0] != pair[1]), key=lambda pair: -pair[2])
    found = []
    for label, answered, count in wrong[:CONFUSED]:
        item = next(
            item for item, answer in zip(items, answered_N, strict=True) if (item.label, answer) == (label, answered)
        )
        of, taken_for = record["classes"][label], record["classes"][answered]
        found.append(
            {
                "source": embedded(item.open(), THUMBNAIL),
                "name": of["name"],
                "answered": taken_for["name"],
                "count": count,
                "share": count / of["images"],
            }
        )
    return found


def word_maps(model: LoadedModel, items: Sequence[Item], *, batch_size: int) -> list[dict[str, Any]]:
    """Where a model sees each word of an image's first caption, by hiding one patch after the other.

    A place is warm where the similarity of picture and word falls when a patch over it is hidden behind the picture's
    mean colour (Zeiler and Fergus 2014, section 4.2). So it asks the model as a whole, and any tower can be asked.
    """
    return [_word_maps(model, item, batch_size) for item in items]


@torch.no_grad()
def _word_maps(model: LoadedModel, item: Item, batch_size: int) -> dict[str, Any]:
    device = next(model.towers.parameters()).device
    image_CSS = model.preprocess(item.open())
    words = distinct(WORD.findall(item.captions[0]))
    text_WD = model.towers.encode_text(model.tokenize(words).to(device), normalize=True)
    hidden_PCSS, mask_PSS = _hide(image_CSS)
    batches = torch.cat([image_CSS[None], hidden_PCSS]).split(batch_size)
    features = [model.towers.encode_image(batch.to(device), normalize=True) for batch in batches]
    score_PW = (torch.cat(features) @ text_WD.T).double().cpu()
    fall_PW = score_PW[:1] - score_PW[1:]
    fall_WSS = torch.einsum("pw,phs->whs", fall_PW, mask_PSS) / mask_PSS.sum(dim=0)
    picture = _displayed(model, image_CSS)
    maps = [
        {
            "word": word,
            "similarity": float(score_PW[0, number]),
            "most": float(fall_WSS[number].max()),
            "source": _overlay(picture, fall_WSS[number]),
        }
        for number, word in enumerate(words)
    ]
    return {"key": item.key, "text": item.captions[0], "source": embedded(picture, MAP), "maps": maps}


def _hide(image_CSS: Tensor) -> tuple[Tensor, Tensor]:
    """The image with one patch hidden (P, C, S, S), and which pixels those are (P, S, S)."""
    height, width = image_CSS.shape[1:]
    masks = []
    for top in _places(height):
        for left in _places(width):
            mask = torch.zeros(height, width, dtype=torch.float64)
            mask[top : top + round(height * PATCH), left : left + round(width * PATCH)] = 1
            masks.append(mask)
    mask_PSS = torch.stack(masks)
    mean_C11 = image_CSS.mean(dim=(1, 2), keepdim=True)
    return torch.where(mask_PSS[:, None] > 0, mean_C11, image_CSS), mask_PSS


def _places(side: int) -> list[int]:
    last = side - round(side * PATCH)
    return sorted({min(round(side * STRIDE * number), last) for number in range(round(1 / STRIDE))})


def _displayed(model: LoadedModel, image_CSS: Tensor) -> Image.Image:
    """What the model sees, its normalisation undone."""
    visual = model.towers.visual
    mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (visual.image_mean, visual.image_std))
    shown = ((image_CSS * std_C11 + mean_C11).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(shown).resize((MAP, MAP), Image.Resampling.NEAREST)


def _overlay(picture: Image.Image, fall_SS: Tensor) -> str:
    """Warm where the similarity falls the most; what rises when hidden stays cold."""
    share_SS = (fall_SS.clamp(min=0) / fall_SS.max().clamp(min=1e-12)).numpy()
    colour = (matplotlib.colormaps["inferno"](share_SS)[..., :3] * 255).astype(np.uint8)
    heat = Image.fromarray(colour).resize(picture.size, Image.Resampling.BILINEAR)
    return embedded(Image.blend(picture, heat, 0.6), MAP)

"""The images of a split that are nearest to a text, or the images and captions nearest to an image.

The split is embedded once a model, into a folder that `embed` writes; then a search reads that alone.
Shapes: N images, M texts, B of them at a time, D = embedding width.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import sys
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from data_prep.locations import path_of, read_bytes
from pipeline import ranks
from pipeline import trained as loading
from pipeline.data.cache import cache_folder
from pipeline.evaluate import embeddings, pictures
from pipeline.evaluate.embed import embed_images, embed_texts
from pipeline.evaluate.embeddings import Embeddings
from pipeline.evaluate.pixels import transformed
from pipeline.evaluate.run import LOG_WIDTH, results_folder
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.splits import Split, open_split
from pipeline.evaluate.ties import scores
from pipeline.trained import LoadedModel, TrainedModel

PAGE = "search.html"


class Found(NamedTuple):
    """One of the best matches.

    Attributes:
        score: cosine similarity.
        row: in the embeddings' `images` or `texts`.
        key: of the image.
        caption: the text that was found; of an image its first, empty where it has none.
        place: the file that the image lies in.
        span: (first byte, number of bytes) of it there.
    """

    score: float
    row: int
    key: str
    caption: str
    place: str
    span: tuple[int, int]


class Answer(NamedTuple):
    """The best images, and where an image was asked for, the best captions, each said once."""

    images: list[Found]
    texts: list[Found]
    page: Path


def search(
    source: str,
    query: str,
    data: str,
    split: str,
    *,
    top: int = 10,
    html: Path | None = None,
    kept: Path | None = None,
    step: int | None = None,
    average: bool = False,
    transform: str = "exact",
) -> Answer:
    """Print the best matches, and write a page that shows them.

    Args:
        source: a run folder, or any other model (see trained.load_any).
        query: a text; or the path of an image.
        data: the dataset, or another tool's tars.
        split: see splits.open_split.
        top: matches.
        html: where the page goes; None for search.html beside the embeddings.
        kept: a folder that `embed` wrote; None for the model's own, which is made where it is missing.
        step: a run's checkpoint; None for the newest.
        average: a run's moving average of the weights.
        transform: of pixels.TRANSFORMS, how images become the model's input.

    Raises:
        DataError: no such model, split or image, or `kept` is of others.
    """
    with ranks.inference() as (_, _, device):
        opened = open_split(data, split)
        model = loading.load_any(source, step, device, average=average)
        model = replace(model, preprocess=transformed(transform, model.preprocess))
        picture = _picture(query)
        folder = kept or default_folder(model, opened, average=average)
        if not (kept or embeddings.is_finished(folder)):
            embeddings.write(model, opened, folder)
        embedded = _checked(embeddings.read(folder), model, opened)
        if picture:
            query_D = embed_images(model, [picture], batch_size=1, workers=0)[0]
        else:
            query_D = embed_texts(model, [query], batch_size=1)[0]
    images = nearest_images(embedded, query_D, top, opened.address)
    texts = nearest_texts(embedded, query_D, top, opened.address) if picture else []
    page = html or folder / PAGE
    shown = (pictures.Shown(found.score, found.caption, f"{found.place} {found.key}", _open(found)) for found in images)
    title = f"{query} – the nearest of {embedded.about['images']:,} images in {data}, {split}"
    said = [(found.score, found.caption) for found in texts]
    pictures.write(page, title, shown, query=picture.open() if picture else None, texts=said)
    _print(images, texts, page)
    return Answer(images, texts, page)


def default_folder(model: LoadedModel, split: Split, *, average: bool = False) -> Path:
    """RUN/eval/STEP/embeddings/… of a run; of other models in this user's cache."""
    digest = hashlib.sha256(f"{model.identity} {split.fingerprint}".encode()).hexdigest()[:16]
    run = isinstance(model, TrainedModel)
    folder = results_folder(model, average=average) if run else cache_folder()
    return folder / "embeddings" / f"{split.name}-{digest}"


def nearest_images(embedded: Embeddings, query_D: Tensor, top: int, data: str) -> list[Found]:
    """The images nearest to a query; of equal ones the first.

    Args:
        embedded: of the split.
        query_D: unit-norm.
        top: how many.
        data: where the dataset is now.
    """
    best = nearest(embedded.array("images"), embedded.items.bounds, query_D, top, lambda row: row)
    found = []
    for score, row in best:
        item = embedded.items[row]
        caption = "" if item["text"] is None else embedded.texts[item["text"]]["caption"]
        found.append(_found(score, row, item, caption, data))
    return found


def nearest_texts(embedded: Embeddings, query_D: Tensor, top: int, data: str) -> list[Found]:
    """The captions nearest to a query, as `nearest_images`; equal captions once."""
    if not embedded.about["texts"]:
        return []
    texts = embedded.texts
    best = nearest(embedded.array("texts"), texts.bounds, query_D, top, lambda row: texts[row]["caption"])
    return [_found(score, row, embedded.items[texts[row]["image"]], texts[row]["caption"], data) for score, row in best]


def nearest(
    key_ND: Any, bounds: np.ndarray, query_D: Tensor, top: int, same: Callable[[int], Hashable]
) -> list[tuple[float, int]]:
    """(score, row) of the best rows, the best first; of rows that are the same the best, of equal scores the first.

    Args:
        key_ND: what is sliced gives (B, D).
        bounds: of the stretches that are read at a time.
        query_D: unit-norm.
        top: how many.
        same: what rows have in common of which one is wanted.
    """
    best: dict[Hashable, tuple[float, int]] = {}
    for begin, end in itertools.pairwise(bounds.tolist()):
        if begin == end:  # of a tar of which no image decodes; safetensors gives no empty slice
            continue
        key_BD = torch.from_numpy(np.array(key_ND[begin:end], dtype=np.float32))
        score_B = scores(query_D.cpu()[None], key_BD)[0].numpy()
        least = min(best.values(), key=_order)[0] if len(best) == top else -np.inf
        here: dict[Hashable, tuple[float, int]] = {}
        for index in np.argsort(-score_B, kind="stable").tolist():
            if len(here) == top or score_B[index] <= least:
                break
            here.setdefault(same(begin + index), (float(score_B[index]), begin + index))
        for name, match in here.items():
            best[name] = max(best.get(name, match), match, key=_order)
        best = dict(sorted(best.items(), key=lambda entry: _order(entry[1]), reverse=True)[:top])
    return list(best.values())


def _order(match: tuple[float, int]) -> tuple[float, int]:
    return match[0], -match[1]


def _found(score: float, row: int, item: dict[str, Any], caption: str, data: str) -> Found:
    return Found(score, row, item["key"], caption, f"{data}/{item['file']}", (item["offset"], item["bytes"]))


def _picture(query: str) -> Item | None:
    """The image that a query names, None where it is a text.

    Raises:
        EvaluationError: a file that is no image.
    """
    path = Path(query)
    try:
        size = path.stat().st_size if path.is_file() else -1
    except OSError:  # too long for a path
        return None
    if size < 0:
        return None
    item = Item(path.name, path, 0, size)
    item.open()
    return item


def _checked(embedded: Embeddings, model: LoadedModel, split: Split) -> Embeddings:
    wanted = {"weights": model.identity, "split": split.name, "fingerprint": split.fingerprint}
    for name, value in wanted.items():
        if embedded.about[name] != value:
            raise EvaluationError(
                f"{embedded.folder}: holds embeddings of another {name}: {embedded.about[name]}, and asked for is "
                f"{value}. Leave --embeddings out, or embed again."
            )
    return embedded


def _open(found: Found) -> Image.Image:
    return Image.open(io.BytesIO(read_bytes(path_of(found.place), found.span))).convert("RGB")


def _print(images: list[Found], texts: list[Found], page: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    for title, matches in (("images", images), ("captions", texts)):
        if matches:
            table = Table("score", "key", "caption", box=None, title=title, title_justify="left")
            table.add_column("where", overflow="fold")
            for found in matches:
                table.add_row(f"{found.score:.3f}", *map(escape, (found.key, found.caption, found.place)))
            console.print(table)
    pictures.say(console, page)

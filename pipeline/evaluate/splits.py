"""A whole split, part after part, so that memory does not grow with it: train tars of ours or others', or an evaluation
set.

Shapes: N images and M texts of a part, D = embedding width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from data_prep.manifest import Shards
from data_prep.record import TRAIN
from pipeline.data.cache import LIMIT_GB, Cache, cache_folder
from pipeline.data.store import ShardStore
from pipeline.data.tars import open_tars
from pipeline.evaluate import sets, sources
from pipeline.evaluate.embed import NotFiniteError, distinct, embed_images, embed_texts, rows
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.trained import LoadedModel

log = logging.getLogger(__name__)

# Images of an evaluation set that are a part.
PART = 1000


class Split(Protocol):
    """Images with their texts, in order, in parts that do not depend on who reads them."""

    @property
    def name(self) -> str:
        """`train`, or the evaluation set's."""

    @property
    def address(self) -> str:
        """What the parts' files are relative to."""

    @property
    def fingerprint(self) -> str:
        """Of all images and texts."""

    @property
    def size(self) -> int:
        """Samples, as they were counted before: some may have no image."""

    def __len__(self) -> int:
        """How many parts there are."""

    def identity(self, part: int) -> str:
        """Tells a part's bytes from others'."""

    def items(self, part: int) -> list[tuple[str, Item]]:
        """A part's images, each with its file, relative to `address`; without their pictures."""


@dataclass(frozen=True)
class TrainSplit:
    """Train tars: a part is a tar, fetched and verified before it is read."""

    store: ShardStore
    name: str = TRAIN

    @property
    def address(self) -> str:
        return self.store.sets[0].address

    @property
    def fingerprint(self) -> str:
        return self.store.sets[0].fingerprint

    @property
    def size(self) -> int:
        return int(self.shards.numbers("samples").sum())

    @property
    def shards(self) -> Shards:
        return self.store.sets[0].shards

    def __len__(self) -> int:
        return len(self.shards)

    def identity(self, part: int) -> str:
        shard, versions = self.shards[part], self.store.sets[0].versions
        return f"{shard.name} {shard.bytes} {shard.sha256 or versions[part]}"

    def items(self, part: int) -> list[tuple[str, Item]]:
        """The captions of an image are those in its `json`, else its `txt`."""
        tar, _ = self.store.arrive(part)
        return [(self.shards[part].name, _with_captions(item)) for item in sets.read_tar(tar)]


@dataclass(frozen=True)
class SetSplit:
    """An evaluation set: a part is a stretch of its images."""

    name: str
    address: str
    every: Sequence[Item]

    @property
    def fingerprint(self) -> str:
        return _digest(self.every)

    @property
    def size(self) -> int:
        return len(self.every)

    def __len__(self) -> int:
        return -(-len(self.every) // PART)

    def identity(self, part: int) -> str:
        return f"{part} {_digest(self._part(part))}"

    def items(self, part: int) -> list[tuple[str, Item]]:
        return [(item.file.relative_to(self.address).as_posix(), item) for item in self._part(part)]

    def _part(self, part: int) -> Sequence[Item]:
        return self.every[part * PART : (part + 1) * PART]


def open_train(data: str) -> TrainSplit:
    """The train split of a dataset, or a folder or pattern of another tool's tars.

    Raises:
        DataError: nothing there that can be trained on.
    """
    cache = Cache(cache_folder(), int(LIMIT_GB * 1e9))
    return TrainSplit(ShardStore([open_tars(data, cache)], cache))


def open_split(data: str, name: str) -> Split:
    """A split by its name: `train` (see open_train), or an evaluation set (see sources.find).

    Raises:
        DataError: there is none.
    """
    if name == TRAIN:
        return open_train(data)
    available = {source.name: source for source in sources.find(Path(data))}
    if name not in available:
        raise EvaluationError(f"{data}: has no split {name}. It has {', '.join([TRAIN, *available])}.")
    return SetSplit(name, data, available[name].items())


class Embedded(NamedTuple):
    """A part's embeddings, unit-norm float32 rows on the CPU.

    Attributes:
        files, items: (N,) the images, as Split.items gives them.
        image_ND: of them.
        texts: (M,) all captions, image after image.
        owner_M: which of the N images a text is of.
        text_MD: of the texts.
        left_out: file and key of each image that does not decode.
    """

    files: list[str]
    items: list[Item]
    image_ND: Tensor
    texts: list[str]
    owner_M: Tensor
    text_MD: Tensor
    left_out: list[str]


def embed_part(model: LoadedModel, split: Split, part: int) -> Embedded:
    """Embed a part; an image that does not decode is left out, and said.

    Batches begin anew with each part, so that a row has the same bits whoever embeds the part.
    """
    given = split.items(part)
    sound, image_ND = given, torch.empty(0, 0)
    try:
        image_ND = _images(model, given)
    except NotFiniteError:
        raise
    except EvaluationError as error:
        log.warning("%s Left out.", error)
        sound = [(file, item) for file, item in given if _decodes(item)]
        image_ND = _images(model, sound)
    items = [item for _, item in sound]
    texts = [text for item in items for text in item.captions]
    owners = [index for index, item in enumerate(items) for _ in item.captions]
    unique = distinct(texts)
    text_MD = image_ND[:0]
    if texts:
        text_MD = rows(unique, embed_texts(model, unique, batch_size=model.batch_size))(texts)
    kept = {item.key for item in items}
    left_out = [f"{file} {item.key}" for file, item in given if item.key not in kept]
    return Embedded(
        [file for file, _ in sound], items, image_ND, texts, torch.tensor(owners, dtype=torch.int64), text_MD, left_out
    )


def shared(parts: int, rank: int, world: int, what: str) -> Iterator[int]:
    """The parts that are this rank's, one after the other; rank 0 shows how far it is."""
    own, console = range(rank, parts, world), Console(stderr=True)
    if console.is_terminal:
        yield from track(own, what, console=console, disable=rank > 0)
        return
    for number, part in enumerate(own, 1):
        yield part
        if rank == 0 and 10 * number // len(own) > 10 * (number - 1) // len(own):
            log.info("%s: %d of %d parts", what, min(number * world, parts), parts)


def _images(model: LoadedModel, given: Sequence[tuple[str, Item]]) -> Tensor:
    items = [item for _, item in given]
    if not items:
        return torch.empty(0, 0)
    return embed_images(model, items, batch_size=model.batch_size, workers=model.workers)


def _decodes(item: Item) -> bool:
    try:
        item.open()
    except EvaluationError:
        return False
    return True


def _with_captions(item: Item) -> Item:
    """A train sample's `txt` is one caption, whatever lines it has."""
    known = item.record.get("captions")
    if isinstance(known, list) and known:
        return replace(item, captions=tuple(str(text) for text in known))
    return replace(item, captions=("\n".join(item.captions),) if item.captions else ())


def _digest(items: Sequence[Item]) -> str:
    said = [[item.identity, item.captions] for item in items]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()

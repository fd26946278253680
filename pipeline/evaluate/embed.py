"""Images and texts → unit-norm embeddings, over all ranks, kept between runs.

Shapes: N items, U distinct texts, D = embedding width.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from pipeline import exchange
from pipeline.data.plan import rank_bounds
from pipeline.evaluate.lanes import in_lanes
from pipeline.evaluate.pixels import Preprocess, pixels
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.short_texts import encode_texts
from pipeline.loss.tiles import gather
from pipeline.model import Towers
from pipeline.tokenizer import Tokenizer

# Of images or texts at a time: more of them leave a CPU's caches, and malloc's arenas, which costs more than it gains.
MOST_ON_CPU = 32


class NotFiniteError(EvaluationError):
    """Embeddings with NaN or infinity: it is the weights that are at fault, not the set."""


class Model(Protocol):
    """What embeds: a LoadedModel, or towers that are still being trained.

    Attributes:
        towers: in evaluation mode.
        tokenize: (B,) texts → (B, L) int64.
        preprocess: a PIL image → (3, S, S) float32; open_clip's own, or pixels.Fast.
    """

    @property
    def towers(self) -> Towers: ...
    @property
    def tokenize(self) -> Tokenizer: ...
    @property
    def preprocess(self) -> Preprocess: ...


@dataclass(frozen=True)
class KeptEmbeddings:
    """Embeddings in a folder, each under the hash of all that it depends on.

    Attributes:
        folder: where they lie, on a file system that all ranks share.
        identity: of the model: its weights, and how it treats pixels and texts.
    """

    folder: Path
    identity: str

    def get(self, items: Sequence[str], make: Callable[[], Tensor]) -> Tensor:
        """The embeddings of these items, made where they are not there; (N, D).

        Collective: every rank calls it.
        """
        digest = hashlib.sha256(self.identity.encode())
        for item in items:
            digest.update(f"{len(item)}:{item}".encode("utf-8", "surrogatepass"))
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        if exchange.from_main(lambda: _readable(path)):
            return load_file(path)["embeddings"]
        made = make()
        exchange.from_main(lambda: _write(path, made))
        return made


def _readable(path: Path) -> bool:
    try:
        load_file(path)
    except (OSError, SafetensorError):  # not there, or cut off
        return False
    return True


def _write(path: Path, embeddings: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    save_file({"embeddings": embeddings.cpu().contiguous()}, partial)
    partial.replace(path)


@dataclass(frozen=True)
class Embedder:
    """A model over all ranks: each embeds a share of whole batches, and every rank gets all.

    An item is then among the same others as on one rank, and its embedding has the same bits.

    Attributes:
        model: the same on every rank. Where its weights are cut over ranks (FSDP2), `encode_image` and `encode_text`
            must be registered as forward methods; every rank calls them equally often.
        batch_size: images or texts that a rank embeds at a time; on a CPU no more than MOST_ON_CPU.
        workers: threads a rank that load and embed images, or where towers are no CPU's, processes that load them.
        rank: this rank.
        world: ranks.
        cache: where embeddings are kept; None for nowhere.
    """

    model: Model
    batch_size: int
    workers: int
    rank: int = 0
    world: int = 1
    cache: KeptEmbeddings | None = None

    def images(self, items: Sequence[Item]) -> Tensor:
        """(N, D) float32 unit-norm rows in the order of `items`, on the CPU, or where the towers are on CUDA.

        Raises:
            EvaluationError: an image does not decode, or embeddings are not finite; on every rank.

        Collective: every rank calls it.
        """

        def embed(part: Sequence[Item], workers: int) -> Tensor:
            return embed_images(self.model, part, batch_size=self._batch, workers=workers)

        return self._all(
            [item.identity for item in items],
            items,
            lambda part: embed(part, self.workers),
            lambda part: embed(part, 0),
        )

    def texts(self, unique: Sequence[str]) -> Tensor:
        """(U, D), as `images`; the texts must be distinct (see `distinct`).

        Collective: every rank calls it.
        """

        def embed(part: Sequence[str]) -> Tensor:
            return embed_texts(self.model, part, batch_size=self._batch)

        # Before ranks take their shares: batches are then the same on any number of them.
        order = by_length(unique)
        ordered = [unique[number] for number in order]
        return in_place(self._all(ordered, ordered, embed, embed), order)

    def _all(
        self,
        names: Sequence[str],
        items: Sequence[Any],
        embed: Callable[[Sequence[Any]], Tensor],
        embed_one: Callable[[Sequence[Any]], Tensor],
    ) -> Tensor:
        def make() -> Tensor:
            own: list[Tensor] = []
            exchange.together(lambda: own.append(self._share(items, embed, embed_one)))
            return self._gather(own[0], len(items))

        return self.cache.get(names, make).to(self._device) if self.cache else make()

    def _share(
        self,
        items: Sequence[Any],
        embed: Callable[[Sequence[Any]], Tensor],
        embed_one: Callable[[Sequence[Any]], Tensor],
    ) -> Tensor:
        """The embeddings of this rank's share, which has no rows where there are fewer batches than ranks."""
        begin, end = self._bounds(len(items))[self.rank : self.rank + 2]
        parts = [embed(items[begin:end])] if begin < end else []
        if -(-(end - begin) // self._batch) < -(-len(items) // (self._batch * self.world)):
            # Others run the towers once more. So do we, for sharded towers, and to know D.
            parts.append(embed_one(items[:1])[:0])
        return torch.cat(parts)

    def _bounds(self, items: int) -> list[int]:
        """W + 1 borders of the ranks' shares of a set, in whole batches."""
        batches = -(-items // self._batch)
        return [min(bound * self._batch, items) for bound in rank_bounds(batches, self.world)]

    def _gather(self, own_BD: Tensor, items: int) -> Tensor:
        bounds = self._bounds(items)
        # On the towers' device, where the ranks' backend has served the loss.
        every_ND = gather(own_BD.to(self._towers_device), [end - begin for begin, end in itertools.pairwise(bounds)])
        return every_ND.to(self._device)

    @property
    def _batch(self) -> int:
        return _fitting(self.batch_size, self._towers_device)

    @property
    def _towers_device(self) -> torch.device:
        device: torch.device = next(self.model.towers.parameters()).device
        return device

    @property
    def _device(self) -> torch.device:
        # MPS has no float64, which scores are made of.
        return self._towers_device if self._towers_device.type == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class Cropped(Dataset[Tensor]):
    """Items as numbers, decoded when asked for."""

    items: Sequence[Item]
    crop: Callable[[Item], Tensor]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.crop(self.items[index])


def embed_images(model: Model, items: Sequence[Item], *, batch_size: int, workers: int) -> Tensor:
    """(N, D) float32 on the CPU, unit-norm rows in the order of `items`; torch's random state stays as it is.

    On a CPU `workers` threads take batch after batch from file to embedding; elsewhere so many processes load them.
    """
    parameter = next(model.towers.parameters())
    crop, finish = pixels(model.preprocess, parameter.device)
    size = _fitting(batch_size, parameter.device)

    # Without gradients, but not in inference mode: what towers keep from call to call must still serve training.
    @torch.no_grad()
    def encode(image_BCSS: Tensor) -> Tensor:
        feature_BD = model.towers.encode_image(finish(image_BCSS).to(parameter.dtype), normalize=True)
        return feature_BD.float().cpu()

    # Where weights are cut over ranks, these run the towers in step.
    if parameter.device.type == "cpu" and not any(isinstance(one, DTensor) for one in model.towers.parameters()):
        parts = [items[begin : begin + size] for begin in range(0, len(items), size)]
        done = in_lanes(lambda part: encode(torch.stack([crop(item) for item in part])), parts, workers)
    else:
        generator = torch.Generator()  # else it takes a seed for its workers from torch's own
        loader = DataLoader(Cropped(items, crop), batch_size=size, num_workers=workers, generator=generator)
        done = [encode(image_BCSS) for image_BCSS in loader]
    return _finite(torch.cat(done), "image")


@torch.no_grad()
def embed_texts(model: Model, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """(U, D) float32 on the CPU, unit-norm rows in the order of `texts`, which must be distinct (see `distinct`)."""
    device = next(model.towers.parameters()).device
    order, size = by_length(texts), _fitting(batch_size, device)
    parts = (order[begin : begin + size] for begin in range(0, len(texts), size))
    tokens = (model.tokenize([texts[number] for number in part]).to(device) for part in parts)
    features = [encode_texts(model.towers, token).float().cpu() for token in tokens]
    return _finite(in_place(torch.cat(features), order), "text")


def _fitting(batch_size: int, device: torch.device) -> int:
    return min(batch_size, MOST_ON_CPU) if device.type == "cpu" else batch_size


def by_length(texts: Sequence[str]) -> list[int]:
    """Places in `texts` from the shortest to the longest: a batch takes as long as its longest text."""
    return sorted(range(len(texts)), key=lambda number: len(texts[number]))


def in_place(row_UD: Tensor, order: Sequence[int]) -> Tensor:
    """Rows that were made in this order, back where they belong."""
    placed_UD = torch.empty_like(row_UD)
    placed_UD[torch.tensor(order, device=row_UD.device)] = row_UD
    return placed_UD


def distinct(texts: Sequence[str]) -> list[str]:
    """Each text once, in order: its place in a batch would change the last bits, and ties would depend on them."""
    return list(dict.fromkeys(texts))


def rows(unique: Sequence[str], text_UD: Tensor) -> Callable[[Sequence[str]], Tensor]:
    """Texts → their rows of `text_UD`."""
    place = {text: number for number, text in enumerate(unique)}
    return lambda texts: text_UD[[place[text] for text in texts]]


def _finite(feature_ND: Tensor, tower: str) -> Tensor:
    # Comparisons with NaN are false, which would rank everything first.
    if not feature_ND.isfinite().all():
        raise NotFiniteError(f"the {tower} tower gives embeddings that are not finite; an earlier step may be sound.")
    return feature_ND

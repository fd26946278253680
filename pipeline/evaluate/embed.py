"""Images and texts → unit-norm embeddings, with open_clip's own preprocessing.

Shapes: N items, U distinct texts, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.model import Towers
from pipeline.tokenizer import Tokenizer


class NotFiniteError(EvaluationError):
    """Embeddings with NaN or infinity: it is the weights that are at fault, not the set."""


class Model(Protocol):
    """What embeds: a TrainedModel, or towers that are still being trained.

    Attributes:
        towers: in evaluation mode.
        tokenize: (B,) texts → (B, L) int64.
        preprocess: a PIL image → (3, S, S) float32.
    """

    @property
    def towers(self) -> Towers: ...
    @property
    def tokenize(self) -> Tokenizer: ...
    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]: ...


@dataclass(frozen=True)
class Preprocessed(Dataset[Tensor]):
    """Items as the model's input, decoded when asked for."""

    items: Sequence[Item]
    preprocess: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(self.items[index].open())


# Without gradients, but not in inference mode: what towers keep from call to call must still serve training.
@torch.no_grad()
def embed_images(model: Model, items: Sequence[Item], *, batch_size: int, workers: int) -> Tensor:
    """(N, D) float32 on the CPU, unit-norm rows in the order of `items`; torch's random state stays as it is."""
    loader = DataLoader(
        Preprocessed(items, model.preprocess),
        batch_size=batch_size,
        num_workers=workers,
        generator=torch.Generator(),  # else it takes a seed for its workers from torch's own
    )
    parameter = next(model.towers.parameters())
    batches = [
        model.towers.encode_image(image.to(parameter.device, parameter.dtype), normalize=True).float().cpu()
        for image in loader
    ]
    return _finite(torch.cat(batches), "image")


@torch.no_grad()
def embed_texts(model: Model, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """(N, D) float32 on the CPU, unit-norm rows in the order of `texts`; equal texts have equal rows."""
    unique = distinct(texts)
    device = next(model.towers.parameters()).device
    batches = (unique[begin : begin + batch_size] for begin in range(0, len(unique), batch_size))
    tokens = (model.tokenize(batch).to(device) for batch in batches)
    features = [model.towers.encode_text(token, normalize=True).float().cpu() for token in tokens]
    return rows(unique, _finite(torch.cat(features), "text"))(texts)


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

"""Images and texts → unit-norm embeddings, with open_clip's own preprocessing.

Shapes: N items, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.trained import TrainedModel


@dataclass(frozen=True)
class Preprocessed(Dataset[Tensor]):
    """Items as the model's input, decoded when asked for."""

    items: Sequence[Item]
    preprocess: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(self.items[index].open())


@torch.inference_mode()
def embed_images(trained: TrainedModel, items: Sequence[Item], *, batch_size: int, workers: int) -> Tensor:
    """(N, D) float32 on the CPU, unit-norm rows in the order of `items`."""
    loader = DataLoader(Preprocessed(items, trained.preprocess), batch_size=batch_size, num_workers=workers)
    device = next(trained.towers.parameters()).device
    batches = [trained.towers.encode_image(image.to(device), normalize=True).float().cpu() for image in loader]
    return _finite(torch.cat(batches), "image")


@torch.inference_mode()
def embed_texts(trained: TrainedModel, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """(N, D) float32 on the CPU, unit-norm rows in the order of `texts`; equal texts have equal rows."""
    # A text is embedded once: its place in a batch would change the last bits, and ties would depend on them.
    unique = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(unique)}
    device = next(trained.towers.parameters()).device
    batches = (unique[begin : begin + batch_size] for begin in range(0, len(unique), batch_size))
    tokens = (trained.tokenize(batch).to(device) for batch in batches)
    features = [trained.towers.encode_text(token, normalize=True).float().cpu() for token in tokens]
    return _finite(torch.cat(features), "text")[[place[text] for text in texts]]


def _finite(feature_ND: Tensor, tower: str) -> Tensor:
    # Comparisons with NaN are false, which would rank everything first.
    if not feature_ND.isfinite().all():
        raise EvaluationError(f"the {tower} tower gives embeddings that are not finite; an earlier step may be sound.")
    return feature_ND

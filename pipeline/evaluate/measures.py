"""Which evaluation sets can be measured, what texts each kind asks a model for, and how it is scored.

Shapes: N images, M texts, D = embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data_prep import manifest
from data_prep.manifest import EvaluationSet
from pipeline.evaluate import classification, retrieval, selection, sets
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item

log = logging.getLogger(__name__)

EmbedTexts = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class OpenSet:
    """A set whose items are known and can be measured.

    Attributes:
        source: name, kind and folder.
        items: its images, in order.
        texts: all that are compared with them: captions, image after image, or prompts.
    """

    source: EvaluationSet
    items: list[Item]
    texts: list[str]

    def figures(self, image_ND: Tensor, embed: EmbedTexts) -> Result:
        """Score the embeddings.

        Args:
            image_ND: unit-norm, of `items`.
            embed: texts, among `texts` → (M, D) unit-norm, on the same device.
        """
        return MEASURES[self.source.kind].figures(self, image_ND, embed)


class Measure(NamedTuple):
    """How one kind of set is measured."""

    texts: Callable[[EvaluationSet, list[Item]], list[str]]
    figures: Callable[[OpenSet, Tensor, EmbedTexts], Result]


def choose(data: Path, names: Sequence[str] | None = None) -> list[EvaluationSet]:
    """The sets of a dataset that are measured.

    Args:
        data: the dataset.
        names: of the sets; None or empty for all that there is a measure for.

    Raises:
        EvaluationError: a set that was asked for is not there, or none can be measured.
    """
    dataset = manifest.read(data)
    available = {source.name: source for source in dataset.evaluation_sets}
    if unknown := sorted(set(names or ()) - set(available)):
        raise EvaluationError(f"{data}: has no evaluation set {unknown[0]}. It has {', '.join(available) or 'none'}.")
    chosen = [available[name] for name in dict.fromkeys(names)] if names else list(available.values())
    for source in chosen:
        if source.kind not in MEASURES:
            log.info("%s: there is no measure for %s sets yet; left out.", source.name, source.kind)
    measured = [source for source in chosen if source.kind in MEASURES]
    if not measured:
        raise EvaluationError(
            f"{data}: has no evaluation set that can be measured, of {len(chosen)}. Known kinds: {', '.join(MEASURES)}."
        )
    return measured


def open_set(source: EvaluationSet) -> OpenSet:
    """Read a set's items, without their pictures, and its texts.

    Raises:
        EvaluationError: it is damaged, or its parts do not fit each other.
    """
    items = sets.read(source)
    return OpenSet(source, items, MEASURES[source.kind].texts(source, items))


def _prompts(source: EvaluationSet, items: list[Item]) -> list[str]:
    names = sets.class_names(source)
    labels = [item.label for item in items]
    if not 0 <= min(labels) <= max(labels) < len(names):
        raise EvaluationError(
            f"{source.path}: labels run from {min(labels)} to {max(labels)}, but classnames.txt has {len(names)} "
            f"names, for 0 to {len(names) - 1}. Build the dataset again."
        )
    return classification.prompts(names, sets.templates(source))


def _captions(source: EvaluationSet, items: list[Item]) -> list[str]:
    if without := [item.key for item in items if not item.captions]:
        raise EvaluationError(f"{source.path}: {len(without)} images have no caption, {without[0]} among them.")
    return [text for item in items for text in item.captions]


def _classification(opened: OpenSet, image_ND: Tensor, embed: EmbedTexts) -> Result:
    names, templates = sets.class_names(opened.source), sets.templates(opened.source)
    class_KD = classification.class_embeddings(names, templates, embed)
    return classification.measure(image_ND, class_KD, [item.label for item in opened.items])


def _retrieval(opened: OpenSet, image_ND: Tensor, embed: EmbedTexts) -> Result:
    owners = [index for index, item in enumerate(opened.items) for _ in item.captions]
    return retrieval.measure(image_ND, embed(opened.texts), owners)


def _selection(opened: OpenSet, image_ND: Tensor, embed: EmbedTexts) -> Result:
    return selection.measure(image_ND, embed(opened.texts), [len(item.captions) for item in opened.items])


MEASURES = {
    "classification": Measure(_prompts, _classification),
    "retrieval": Measure(_captions, _retrieval),
    "selection": Measure(_captions, _selection),
}

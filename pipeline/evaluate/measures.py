"""Which evaluation sets can be measured, what texts each kind asks a model for, and how it is scored.

Shapes: N images, M texts, D = embedding width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.evaluate import class_texts, classification, gap, retrieval, selection, sources
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.sources import Source

log = logging.getLogger(__name__)

EmbedTexts = Callable[[Sequence[str]], Tensor]


class Protocol(NamedTuple):
    """A published way to measure a set.

    Attributes:
        of: the set's name.
        images: how many it must have.
        captions: how many of an image's, the first ones, are used.
        folds: galleries that the images are cut into, each searched by itself.
    """

    of: str
    images: int
    captions: int
    folds: int = 1


# Karpathy and Fei-Fei 2015: the test splits, and for "1K" the mean over five parts of COCO's 5,000 images.
PROTOCOLS = {
    "coco_5k": Protocol("coco_karpathy_test", 5000, 5),
    "coco_1k": Protocol("coco_karpathy_test", 5000, 5, folds=5),
    "flickr30k_1k": Protocol("flickr30k_test", 1000, 5),
}


@dataclass(frozen=True)
class OpenSet:
    """A set whose items are known and can be measured.

    Attributes:
        source: name, kind, and where it lies.
        items: its images, in order.
        texts: all that are compared with them: captions, image after image, or prompts.
        folds: galleries that a retrieval set is cut into.
    """

    source: Source
    items: list[Item]
    texts: list[str]
    folds: int = 1

    @property
    def identity(self) -> str:
        """sha256 of what is measured on: the images, and what is said of them."""
        said = [[item.identity, item.label, item.captions] for item in self.items]
        return hashlib.sha256(json.dumps([self.source.kind, said, self.texts, self.folds]).encode()).hexdigest()

    def figures(self, image_ND: Tensor, embed: EmbedTexts) -> Result:
        """Score the embeddings.

        Args:
            image_ND: unit-norm, of `items`.
            embed: texts, among `texts` → (M, D) unit-norm, on the same device.
        """
        return MEASURES[self.source.kind].figures(self, image_ND, embed)


class Measure(NamedTuple):
    """How one kind of set is measured."""

    texts: Callable[[Source, list[Item]], list[str]]
    figures: Callable[[OpenSet, Tensor, EmbedTexts], Result]


def choose(
    data: Path, names: Sequence[str] | None = None, *, class_names: str = "", templates: str = ""
) -> list[Source]:
    """The sets of a dataset that are measured.

    Args:
        data: the dataset, or a set of others' (see sources.find).
        names: of the sets, or of PROTOCOLS; None or empty for all sets that there is a measure for.
        class_names: instead of the one set's own: a file, or a name (see class_texts).
        templates: so too.

    Raises:
        EvaluationError: a set that was asked for is not there, none can be measured, or names or templates are given
            for what is not one classification set.
    """
    available = {source.name: source for source in sources.find(data)}
    for name, protocol in PROTOCOLS.items():
        if protocol.of in available and name in (names or ()):
            available[name] = replace(available[protocol.of], name=name)
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
    return [_renamed(measured, class_names, templates)] if class_names or templates else measured


def _renamed(measured: Sequence[Source], class_names: str, templates: str) -> Source:
    if [source.kind for source in measured] != ["classification"]:
        raise EvaluationError(
            "--classnames and --templates are for one classification set, and chosen are "
            f"{', '.join(f'{source.name} ({source.kind})' for source in measured)}. Name one by --set."
        )
    classes = class_texts.class_names(class_names) if class_names else ()
    return replace(measured[0], classes=classes, prompts=class_texts.templates(templates) if templates else ())


def open_set(source: Source) -> OpenSet:
    """Read a set's items, without their pictures, and its texts.

    Raises:
        EvaluationError: it is damaged, or its parts do not fit each other.
    """
    items, protocol = source.items(), PROTOCOLS.get(source.name)
    if protocol:
        if len(items) != protocol.images:
            raise EvaluationError(
                f"{source.name} is a protocol of {protocol.images:,} images of {protocol.of}, and there are "
                f"{len(items):,}. Measure --set {protocol.of} instead, or build the whole split."
            )
        items = [replace(item, captions=item.captions[: protocol.captions]) for item in items]
    texts = MEASURES[source.kind].texts(source, items)
    return OpenSet(source, items, texts, protocol.folds if protocol else 1)


def _prompts(source: Source, items: list[Item]) -> list[str]:
    names = source.class_names()
    check_labels(source, items, names)
    return classification.prompts(names, source.templates())


def check_labels(source: Source, items: Sequence[Item], names: Sequence[str]) -> None:
    """See that each item of a classification set is of a class that has a name.

    Raises:
        EvaluationError: one is not.
    """
    labels = [item.label for item in items]
    if not 0 <= min(labels) <= max(labels) < len(names):
        raise EvaluationError(
            f"{source.path}: labels run from {min(labels)} to {max(labels)}, but {len(names)} classes have names, for "
            f"0 to {len(names) - 1}. Give each its name, in classnames.txt or by --classnames."
        )


def _captions(source: Source, items: list[Item]) -> list[str]:
    if without := [item.key for item in items if not item.captions]:
        raise EvaluationError(f"{source.path}: {len(without)} images have no caption, {without[0]} among them.")
    return [text for item in items for text in item.captions]


def _classification(opened: OpenSet, image_ND: Tensor, embed: EmbedTexts) -> Result:
    names, templates = opened.source.class_names(), opened.source.templates()
    class_KD = classification.class_embeddings(names, templates, embed)
    result = classification.measure(image_ND, class_KD, [item.label for item in opened.items], names)
    return replace(result, describe=lambda: {"templates": list(templates), **result.describe()})


def _retrieval(opened: OpenSet, image_ND: Tensor, embed: EmbedTexts) -> Result:
    owners = [index for index, item in enumerate(opened.items) for _ in item.captions]
    text_MD = embed(opened.texts)
    result = retrieval.measure(image_ND, text_MD, owners, folds=opened.folds)
    return replace(result, sampled={**result.sampled, **gap.measure(image_ND, text_MD, owners)})


def _selection(opened: OpenSet, image_ND: Tensor, embed: EmbedTexts) -> Result:
    return selection.measure(image_ND, embed(opened.texts), [len(item.captions) for item in opened.items])


MEASURES = {
    "classification": Measure(_prompts, _classification),
    "retrieval": Measure(_captions, _retrieval),
    "selection": Measure(_captions, _selection),
}

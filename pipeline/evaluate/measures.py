"""Which evaluation sets can be measured, what texts each kind asks a model for, and how it is scored.

Shapes: N images, M texts, D = embedding width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.evaluate import class_texts, classification, gap, retrieval, selection, sources, vqa, vqa_candidates
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
        texts: all that are compared with them: captions, image after image, or prompts; none where `streams`.
        folds: galleries that a retrieval set is cut into.
        candidates: of a VQA set, answer type → answers to choose from.
    """

    source: Source
    items: list[Item]
    texts: list[str]
    folds: int = 1
    candidates: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Whether its texts are too many to be held: then `figures` asks for them, block after block, on every rank."""
        return MEASURES[self.source.kind].streams

    @property
    def identity(self) -> str:
        """sha256 of what is measured on: the images, and what is said or asked of them."""
        said = [[item.identity, item.label, item.captions] for item in self.items]
        parts = [self.source.kind, said, self.texts, self.folds]
        if self.candidates:
            parts += [[item.record.get("questions") for item in self.items], dict(self.candidates)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def figures(self, image_ND: Tensor, embed: EmbedTexts) -> Result:
        """Score the embeddings.

        Args:
            image_ND: unit-norm, of `items`.
            embed: texts, among `texts` → (M, D) unit-norm, on the same device; where `streams`, any distinct texts.

        Collective where `streams`: every rank calls it.
        """
        return MEASURES[self.source.kind].figures(self, image_ND, embed)


class Measure(NamedTuple):
    """How one kind of set is measured.

    Attributes:
        texts: what a model is to embed.
        figures: the scores of what it has embedded.
        candidates: answers to choose from.
        lacking: what a set cannot be measured without, in words; empty where it has all.
        streams: see OpenSet.
    """

    texts: Callable[[Source, list[Item]], list[str]]
    figures: Callable[[OpenSet, Tensor, EmbedTexts], Result]
    candidates: Callable[[Source, list[Item]], Mapping[str, Sequence[str]]] = lambda source, items: {}
    lacking: Callable[[Source], str] = lambda source: ""
    streams: bool = False


def choose(
    data: Path,
    names: Sequence[str] | None = None,
    *,
    class_names: str = "",
    templates: str = "",
    answers: Path | None = None,
    while_training: bool = False,
) -> list[Source]:
    """The sets of a dataset that are measured.

    Args:
        data: the dataset, or a set of others' (see sources.find).
        names: of the sets, or of PROTOCOLS; None or empty for all sets that there is a measure for.
        class_names: instead of the one set's own: a file, or a name (see class_texts).
        templates: so too.
        answers: a file of candidates for VQA sets, one a line (see vqa_candidates.candidates).
        while_training: leave out what takes too long to be measured again and again.

    Raises:
        EvaluationError: a set that was asked for is not there, none can be measured, names or templates are given for
            what is not one classification set, or answers where there is no VQA set.
    """
    available = {source.name: source for source in sources.find(data)}
    for name, protocol in PROTOCOLS.items():
        if protocol.of in available and name in (names or ()):
            available[name] = replace(available[protocol.of], name=name)
    if unknown := sorted(set(names or ()) - set(available)):
        raise EvaluationError(f"{data}: has no evaluation set {unknown[0]}. It has {', '.join(available) or 'none'}.")
    chosen = [available[name] for name in dict.fromkeys(names)] if names else list(available.values())
    if answers:
        chosen = _answered(chosen, answers)
    measured = [source for source in chosen if _is_measured(source, bool(names), while_training)]
    if not measured:
        known = [kind for kind, measure in MEASURES.items() if not (while_training and measure.streams)]
        when = " while training" if while_training else ""
        raise EvaluationError(
            f"{data}: has no evaluation set that can be measured{when}, of {len(chosen)}. Known kinds: "
            f"{', '.join(known)}."
        )
    return [_renamed(measured, class_names, templates)] if class_names or templates else measured


def _is_measured(source: Source, asked_for: bool, while_training: bool) -> bool:
    """Whether a set can be; says why not, and refuses where it was asked for and lacks something."""
    if source.kind not in MEASURES:
        log.info("%s: there is no measure for %s sets yet; left out.", source.name, source.kind)
    elif while_training and MEASURES[source.kind].streams:
        log.info(
            "%s: left out while training, since a statement of each question with each candidate answer would be "
            "embedded again and again. `python -m pipeline evaluate RUN --data … --watch` measures it beside the run.",
            source.name,
        )
    elif not (problem := MEASURES[source.kind].lacking(source)):
        return True
    elif asked_for:
        raise EvaluationError(problem)
    else:
        log.info("%s: left out. %s", source.name, problem)
    return False


def _answered(chosen: Sequence[Source], answers: Path) -> list[Source]:
    if not any(source.kind == "vqa" for source in chosen):
        raise EvaluationError(
            f"--answers is for VQA sets; chosen are {', '.join(f'{one.name} ({one.kind})' for one in chosen)}."
        )
    given = vqa_candidates.read_answers(answers)
    return [replace(source, answers=given) if source.kind == "vqa" else source for source in chosen]


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
    measure = MEASURES[source.kind]
    texts, candidates = measure.texts(source, items), measure.candidates(source, items)
    return OpenSet(source, items, texts, protocol.folds if protocol else 1, candidates)


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


def _candidates(source: Source, items: list[Item]) -> vqa_candidates.Candidates:
    found = vqa_candidates.candidates(source.path, source.answers)
    asked = vqa.questions(items)
    count = vqa.statements(asked, found)
    log.info(
        "%s: %d questions, and %d statements of them with their candidate answers.", source.name, len(asked), count
    )
    return found


def _vqa(opened: OpenSet, image_ND: Tensor, embed: EmbedTexts) -> Result:
    return vqa.measure(image_ND, vqa.questions(opened.items), opened.candidates, embed)


MEASURES = {
    "classification": Measure(_prompts, _classification),
    "retrieval": Measure(_captions, _retrieval),
    "selection": Measure(_captions, _selection),
    "vqa": Measure(
        texts=lambda source, items: [],
        figures=_vqa,
        candidates=_candidates,
        lacking=lambda source: vqa_candidates.lacking(source.path, source.answers),
        streams=True,
    ),
}

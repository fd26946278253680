"""Frozen features: a linear probe and k nearest neighbours, fitted on one set's images, measured on another's.

Shapes: M train images, N test images, K classes, D = embedding width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import exchange, ranks
from pipeline import trained as loading
from pipeline.evaluate import classification, linear_probe, neighbours, sets
from pipeline.evaluate.measures import check_labels, choose
from pipeline.evaluate.pixels import transformed
from pipeline.evaluate.result import Result
from pipeline.evaluate.run import embedder_of, record, results_folder, screen, table, write, write_csv
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.sources import Source

log = logging.getLogger(__name__)

TASK = "linear_probe"
TRAIN = "train"
CHANCES = ("acc1", "acc5", "mean_per_class_recall")


@dataclass(frozen=True)
class Pair:
    """What is fitted on, and what is measured on.

    Attributes:
        name: of the test set.
        train, test: images with labels, which are places in `names`.
        names: (K,) of the classes.
    """

    name: str
    train: list[Item]
    test: list[Item]
    names: Sequence[str]

    @property
    def identity(self) -> str:
        """sha256 of the images and their labels."""
        said = [[(item.identity, item.label) for item in items] for items in (self.train, self.test)]
        return hashlib.sha256(repr([said, list(self.names)]).encode()).hexdigest()


def probe(
    source: str,
    data: Path | None = None,
    train: Path | None = None,
    test: Path | None = None,
    train_set: str = "",
    test_set: str = "",
    *,
    k: int = neighbours.NEIGHBOURS,
    step: int | None = None,
    average: bool = False,
    transform: str = "exact",
    out: Path | None = None,
) -> dict[str, Any] | None:
    """Fit a probe on a model's image embeddings; write OUT/SET.probe.json, its rows and results.csv; print a table.

    Args:
        source: a run folder, or any other model (see trained.load_any).
        data, train, test, train_set, test_set: see `find_pair`.
        k: neighbours.
        step: a run's checkpoint; None for the newest.
        average: a run's moving average of the weights.
        transform: of pixels.TRANSFORMS, how images become the model's input.
        out: where results go, and embeddings are kept; None for `results_folder`.

    Returns:
        The record, on the main rank; None on others, which are done once all is embedded.

    Raises:
        EvaluationError: there is no such pair of sets, it cannot be measured, or scikit-learn is not installed.

    Collective: every rank that a launcher started calls it.
    """
    linear_probe.check_installed()
    with ranks.inference() as (rank, world, device):
        pair = exchange.from_main(partial(find_pair, data, train, test, train_set, test_set))
        model = loading.load_any(source, step, device, average=average)
        model = replace(model, preprocess=transformed(transform, model.preprocess))
        folder = out or results_folder(model, average=average)
        embedder = embedder_of(model, folder, rank, world)
        train_MD, test_ND = embedder.images(pair.train), embedder.images(pair.test)
    if rank:
        return None
    labels = [[item.label for item in items] for items in (pair.train, pair.test)]
    result = measure(train_MD, labels[0], test_ND, labels[1], pair.names, k=k)
    found = write(folder, f"{pair.name}.probe", record(model, pair.name, pair.identity, result), result)
    write_csv(folder)
    screen().print(table([found]))
    return found


def measure(
    train_MD: Tensor,
    train_labels: Sequence[int],
    test_ND: Tensor,
    test_labels: Sequence[int],
    names: Sequence[str],
    *,
    k: int = neighbours.NEIGHBOURS,
) -> Result:
    """The figures of `classification.measure`, as lp_… of a linear probe and as knn_… of k nearest neighbours.

    Intervals are over test images, for the train images as they are. Chance is what embeddings that are all equal
    give: the answer is then always the class with the most train images.

    Args:
        train_MD: unit-norm.
        train_labels: (M,) from 0 to K - 1.
        test_ND: unit-norm.
        test_labels: (N,) so too.
        names: (K,) of the classes.
        k: neighbours.

    Raises:
        EvaluationError: there are too few train images (see linear_probe.fit).
    """
    label_M = torch.as_tensor(train_labels)
    count_NK = torch.bincount(label_M, minlength=len(names)).expand(len(test_labels), -1)
    fitted = linear_probe.fit(train_MD, label_M, len(names))
    if not fitted.converged:
        log.warning("the probe's fit was stopped after %d iterations.", linear_probe.ITERATIONS)
    found = {
        "lp": classification.of_scores(fitted.scores(test_ND), test_labels, names),
        "knn": classification.of_scores(
            neighbours.votes(test_ND, train_MD, label_M, len(names), k), test_labels, names
        ),
    }
    guessed = classification.of_scores(count_NK.split(classification.BLOCK), test_labels, names).metrics

    def describe() -> dict[str, Any]:
        about_probe = {"C": fitted.strength, "converged": fitted.converged, **found["lp"].describe()}
        about_neighbours = {"k": k, "temperature": neighbours.TEMPERATURE, **found["knn"].describe()}
        return {"train_images": len(label_M), "linear_probe": about_probe, "knn": about_neighbours}

    return Result(
        TASK,
        len(test_labels),
        {f"{way}_{name}": one for way, result in found.items() for name, one in result.sampled.items()},
        {f"{way}_{name}": guessed[name] for way in found for name in CHANCES},
        describe,
    )


def find_pair(data: Path | None, train: Path | None, test: Path | None, train_set: str, test_set: str) -> Pair:
    """The sets to fit and to measure on; classes are told by their names, which the train set gives.

    Args:
        data: one set in CLIP_benchmark's layout with `train` beside `test`; or a dataset, with the names of sets.
        train: two sets instead, each a folder of class folders, or in CLIP_benchmark's layout.
        test: the other one.
        train_set: of `data`.
        test_set: of `data`.

    Raises:
        EvaluationError: none of these, the test set has classes that the train set has not, or no image of any of its
            classes can be learned from.
    """
    if data and not train and not test and bool(train_set) == bool(test_set):
        to_test = _one(data, test_set)
        to_fit = _one(data, train_set) if train_set else _beside(to_test)
    elif train and test and not data and not train_set and not test_set:
        to_fit, to_test = _one(train), _one(test)
    else:
        raise EvaluationError(
            "what to fit on and what to measure on was not said. Give --data FOLDER, with train/ beside test/ in it; "
            "or --data DATASET with --train-set and --test-set; or --train FOLDER with --test FOLDER."
        )
    (train_items, names), (test_items, test_names) = _read(to_fit), _read(to_test)
    place = {name: label for label, name in enumerate(names)}
    if names != test_names:
        said = {test_names[item.label] for item in test_items}
        if unknown := sorted(said - set(place)):
            raise EvaluationError(
                f"{to_test.path}: its class {unknown[0]!r} is none of the {len(names)} that {to_fit.path} has. Give "
                "the same classes the same names."
            )
        test_items = [replace(item, label=place[test_names[item.label]]) for item in test_items]
    known = {item.label for item in train_items}
    unknown_items = [item for item in test_items if item.label not in known]
    if len(unknown_items) == len(test_items):
        raise EvaluationError(f"{to_fit.path}: has no image of any class that {to_test.path} has images of.")
    if unknown_items:
        log.warning(
            "%s: %d of %d images are of classes without train images, which no probe can know.",
            *(to_test.name, len(unknown_items), len(test_items)),
        )
    return Pair(to_test.name, train_items, test_items, names)


def _one(data: Path, name: str = "") -> Source:
    found = [one for one in choose(data, [name] if name else None) if one.kind == "classification"]
    if len(found) != 1:
        raise EvaluationError(
            f"{data}: looked for one classification set{f' called {name}' if name else ''}, and there are "
            f"{', '.join(one.name for one in found) or 'none'}. Name two by --train-set and --test-set."
        )
    return found[0]


def _beside(source: Source) -> Source:
    """The set's train split."""
    path = source.path / TRAIN / sets.SHARDS
    if not source.split or not path.is_file():
        raise EvaluationError(
            f"{path}: looked for train images beside the set's test images and found none. Name two sets of a dataset "
            "by --train-set and --test-set, or two folders by --train and --test."
        )
    return replace(source, split=TRAIN)


def _read(source: Source) -> tuple[list[Item], Sequence[str]]:
    """Images, and the classes' names; their numbers, where CLIP_benchmark's layout has none."""
    items = source.items()
    if source.split and not (source.path / sets.CLASS_NAMES).is_file():
        names: Sequence[str] = [str(label) for label in range(max(item.label for item in items) + 1)]
    else:
        names = source.class_names()
    check_labels(source, items, names)
    return items, names

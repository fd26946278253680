"""The figures of a set by a field of its samples, such as source or a group label, and the gap between its groups.

Shapes: G groups, R resamples.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.checkpoint_writer import lower_is_better
from pipeline.evaluate import gap
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.statistics import percentiles, resampled

log = logging.getLogger(__name__)

NONE = "(none)"
# A group with fewer images is listed, and left out of the gap, which it would decide by chance.
MIN_IMAGES = 10
# A field of numbers with more values than this is cut at its quartiles.
MAX_NUMBERS = 8
MAX_GROUPS = 100
QUARTILES = (0.25, 0.5, 0.75)


def by_field(result: Result, items: Sequence[Item], field: str) -> dict[str, Any]:
    """A set's figures for each value of a field, and how far the best group is from the worst.

    A figure is that of the whole set, over the group's images only: captions are looked for among all images, classes
    compared with all classes. What says how all embeddings lie together (gap.OF_ALL) is left out.

    The gap's interval is of the highest less the lowest group in each of the resamples of all images, whichever two
    groups these are. The highest of several groups is partly the luckiest one: gap and interval are above 0 even where
    all groups are alike, the more so the more and the smaller the groups.

    Args:
        result: of the set.
        items: its images, in order.
        field: of the samples' `json`; dots go into nested objects. `pixels`, where samples have no such field, is
            original_width × original_height.

    Returns:
        {"values": {VALUE: {"images", "metrics", "intervals"}}, "gap": {METRIC: {"best", "worst", "gap", "interval"}}}.

    Raises:
        EvaluationError: more than MAX_GROUPS groups.
    """
    label_N = np.array(labels(items, field), dtype=object)
    whole = {name: figure for name, figure in result.sampled.items() if name not in gap.OF_ALL}
    values: dict[str, Any] = {}
    drawn: dict[str, Mapping[str, Any]] = {}
    for value in sorted(set(label_N), key=_order):
        part = {name: figure.where(label_N == value) for name, figure in whole.items()}
        metrics = {name: figure.figure() for name, figure in part.items()}
        known = [name for name, found in metrics.items() if not math.isnan(found)]
        drawn[value] = resampled({name: part[name] for name in known}, result.images)
        values[value] = {
            "images": int((label_N == value).sum()),
            "metrics": {name: metrics[name] for name in known},
            "intervals": {name: percentiles(drawn[value][name]) for name in known},
        }
    return {"values": values, "gap": {name: one for name in whole if (one := _gap(name, values, drawn))}}


def labels(items: Sequence[Item], field: str) -> list[str]:
    """The group of each image, `(none)` without the field; numbers of many values as the range of their quarter.

    Raises:
        EvaluationError: more than MAX_GROUPS groups.
    """
    values = [_value(item.record, field) for item in items]
    known = [value for value in values if value is not None]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known)
    if numeric and len(set(known)) > MAX_NUMBERS:
        return _quarters(values)
    found = [NONE if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
    if len(set(found)) > MAX_GROUPS:
        raise EvaluationError(
            f"--by {field}: {len(set(found)):,} values among {len(items):,} images ({found[0]}, …), more than "
            f"{MAX_GROUPS} groups. Name a field that many images share, such as source."
        )
    return found


def say_if_absent(name: str, items: Sequence[Item], field: str) -> None:
    """Tell of a field that a set has no value of: all its images are then one group."""
    if all(_value(item.record, field) is None for item in items):
        there = {field for item in items for field, value in item.record.items() if value is not None}
        log.warning("%s: no sample has a value of %s; there are %s.", name, field, ", ".join(sorted(there)) or "none")


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row a set and field: the best group and the worst, and their gap, by the first of the set's figures."""
    found = Table(box=None)
    for name in ("set", "by", "metric", "best", "worst"):
        found.add_column(name, overflow="fold")
    for name in ("gap", "95 % interval"):
        found.add_column(name, no_wrap=True)
    for record in records:
        for field, groups in record["groups"].items():
            for metric, one in list(groups["gap"].items())[:1]:
                ends = [f"{one[end]}: {groups['values'][one[end]]['metrics'][metric]:.3f}" for end in ("best", "worst")]
                low, high = one["interval"]
                found.add_row(record["dataset"], field, metric, *ends, f"{one['gap']:.3f}", f"{low:.3f} – {high:.3f}")
    return found


def _gap(metric: str, values: Mapping[str, Any], drawn: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Between the groups that are large enough; None where there are not two."""
    figures = {
        value: group["metrics"][metric]
        for value, group in values.items()
        if group["images"] >= MIN_IMAGES and metric in group["metrics"]
    }
    if len(figures) < 2:
        return None
    ends = min(figures, key=figures.__getitem__), max(figures, key=figures.__getitem__)
    worst, best = ends[::-1] if lower_is_better(metric) else ends
    found_GR = np.stack([drawn[value][metric] for value in figures])
    # fmax and fmin pass over the groups that a resample lacks.
    spread_R = np.fmax.reduce(found_GR) - np.fmin.reduce(found_GR)
    between = abs(figures[best] - figures[worst])
    return {"best": best, "worst": worst, "gap": between, "interval": percentiles(spread_R)}


def _value(record: Mapping[str, Any], field: str) -> Any:
    found: Any = record
    for name in field.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    sides = [record.get(name) for name in ("original_width", "original_height")]
    if found is None and field == "pixels" and all(isinstance(side, int) for side in sides):
        return math.prod(sides)
    # Python reads the NaN and Infinity that its json writes.
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _quarters(values: Sequence[float | None]) -> list[str]:
    known = np.array([value for value in values if value is not None])
    edges = np.unique(np.quantile(known, QUARTILES))
    part_K = np.searchsorted(edges, known)
    names = {part: _range(known[part_K == part]) for part in set(part_K.tolist())}
    return [NONE if value is None else names[int(np.searchsorted(edges, value))] for value in values]


def _range(part: np.ndarray) -> str:
    return " – ".join(dict.fromkeys(map(_number, (part.min(), part.max()))))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6g}"


def _order(label: str) -> tuple[bool, float, str]:
    """Numbers and ranges by size, then names, and what has none last."""
    try:
        return label == NONE, float(label.split(" – ")[0]), ""
    except ValueError:
        return label == NONE, math.inf, label

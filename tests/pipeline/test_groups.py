"""Figures by group: each group's own rows, gaps of a known size, and fields of every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.evaluate import classification, groups, retrieval
from pipeline.evaluate.groups import NONE, by_field, labels
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.statistics import Sampled, intervals


def items(*records):
    return [Item(str(number), Path("0.tar"), 0, 1, record=record) for number, record in enumerate(records)]


def grouped(sizes, shares):
    """A result whose groups a, b, … are right in the given share of their images, and the images."""
    hits = [number < share * size for size, share in zip(sizes, shares, strict=True) for number in range(size)]
    names = [{"of": "abcdef"[number]} for number, size in enumerate(sizes) for _ in range(size)]
    return Result("t", len(hits), {"acc": Sampled.of(hits)}), items(*names)


def test_groups_that_differ_by_a_known_amount():
    found = by_field(*grouped([40, 50, 20], [0.5, 0.9, 0.7]), "of")
    assert {value: (one["images"], one["metrics"]["acc"]) for value, one in found["values"].items()} == {
        "a": (40, 0.5),
        "b": (50, 0.9),
        "c": (20, 0.7),
    }
    between = found["gap"]["acc"]
    assert (between["best"], between["worst"], between["gap"]) == ("b", "a", pytest.approx(0.4))
    assert between["interval"][0] < 0.4 < between["interval"][1]


def test_a_gap_between_two_groups_has_the_interval_of_their_difference():
    """Far apart, one is the best in every resample: the interval is that of a difference of two means."""
    result, images = grouped([60, 80], [0.2, 0.9])
    difference = np.sqrt(0.2 * 0.8 / 60 + 0.9 * 0.1 / 80)
    low, high = by_field(result, images, "of")["gap"]["acc"]["interval"]
    assert (low, high) == pytest.approx((0.7 - 1.96 * difference, 0.7 + 1.96 * difference), abs=0.02)


def test_a_group_has_the_figures_and_intervals_of_its_rows():
    result, images = grouped([30, 45], [0.5, 0.8])
    chosen = np.arange(75) < 30
    alone = intervals({"acc": result.sampled["acc"].where(chosen)}, 75)["acc"]
    assert by_field(result, images, "of")["values"]["a"]["intervals"]["acc"] == alone


def test_small_groups_are_listed_and_left_out_of_the_gap():
    found = by_field(*grouped([groups.MIN_IMAGES - 1, 10, 10], [0, 0.5, 0.6]), "of")
    assert found["values"]["a"]["metrics"] == {"acc": 0}
    assert (found["gap"]["acc"]["worst"], found["gap"]["acc"]["best"]) == ("b", "c")
    assert by_field(*grouped([9, 40], [0, 1]), "of")["gap"] == {}


def test_of_ranks_the_lowest_is_the_best():
    ranks = Sampled.of([1.0] * 20 + [5.0] * 20, statistic="median")
    found = by_field(Result("t", 40, {"median_rank": ranks}), items(*[{"of": "a"}] * 20, *[{"of": "b"}] * 20), "of")
    assert found["gap"]["median_rank"] == {"best": "a", "worst": "b", "gap": 4, "interval": (4, 4)}


def test_captions_are_looked_for_among_all_images():
    """Images of one group have each other's captions: it is never right, and the other always."""
    image_ND = torch.eye(40)
    text_ND = image_ND.clone()
    text_ND[20:] = text_ND[20:].roll(1, 0)
    found = by_field(
        retrieval.measure(image_ND, text_ND, range(40)),
        items(*[{"by": {"who": number < 20}} for number in range(40)]),
        "by.who",
    )
    for way in ("image", "text"):
        values = {value: one["metrics"][f"{way}_retrieval_recall@1"] for value, one in found["values"].items()}
        assert values == {"true": 1, "false": 0}
        assert found["gap"][f"{way}_retrieval_recall@1"]["gap"] == 1


def test_figures_that_a_group_has_no_rows_for_are_left_out():
    """Precision of one group's images, all of which are answered with a class; and what is no mean over images."""
    class_KD = torch.eye(3)
    result = classification.measure(F.normalize(class_KD[[0, 1, 2] * 8], dim=1), class_KD, [0, 1, 2] * 8, list("abc"))
    result = Result("t", 24, {**result.sampled, "modality_gap": result.sampled["acc1"], "few": Sampled.of([1.0])})
    found = by_field(result, items(*[{"of": "x"}] * 12, *[{}] * 12), "of")
    assert "few" in found["values"]["x"]["metrics"]
    assert "few" not in found["values"][NONE]["metrics"]
    assert "few" not in found["gap"]
    assert not any("modality_gap" in one["metrics"] for one in found["values"].values())
    assert found["values"][NONE]["metrics"]["mean_per_class_f1"] == 1


def test_fields_of_every_form():
    records = ({"a": {"b": "x"}}, {"a": {"b": None}}, {"a": 3}, {}, {"a": {"b": True}}, {"a": {"b": [1]}})
    assert labels(items(*records), "a.b") == ["x", NONE, NONE, NONE, "true", "[1]"]
    assert labels(items({"n": 2}, {"n": 10}, {"n": 2.5}), "n") == ["2", "10", "2.5"]
    assert list(by_field(Result("t", 3, {}), items({"n": 10}, {}, {"n": 9}), "n")["values"]) == ["9", "10", NONE]


def test_many_numbers_are_cut_at_their_quartiles():
    found = labels(items(*[{"n": number} for number in range(20)], {}, {"n": float("nan")}), "n")
    assert found == ["0 – 4"] * 5 + ["5 – 9"] * 5 + ["10 – 14"] * 5 + ["15 – 19"] * 5 + [NONE, NONE]
    skewed = labels(items(*[{"n": 1}] * 30, *[{"n": number} for number in range(2, 12)]), "n")
    assert skewed == ["1"] * 30 + ["2 – 11"] * 10


def test_pixels_are_those_of_the_original():
    sizes = [{"original_width": 10 * number, "original_height": 20, "width": 1, "height": 1} for number in range(1, 5)]
    assert labels(items(*sizes), "pixels") == ["200", "400", "600", "800"]
    assert labels(items({**sizes[0], "pixels": 7}, {}), "pixels") == ["7", NONE]


def test_a_field_that_names_each_image_is_refused():
    with pytest.raises(EvaluationError, match="--by image_id: 101 values among 101 images"):
        labels(items(*[{"image_id": f"coco:{number}"} for number in range(101)]), "image_id")


def test_a_field_that_is_not_there_is_told_of(caplog):
    groups.say_if_absent("pairs_test", items({"source": "coco", "license": None}), "licence")
    assert "pairs_test: no sample has a value of licence; there are source." in caplog.text
    caplog.clear()
    groups.say_if_absent("pairs_test", items({}, {"licence": 0}), "licence")
    assert not caplog.text

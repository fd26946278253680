"""Comparing two models: the same images, and a difference that is real only where it is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.evaluate.compare import compare
from pipeline.evaluate.result import Result, read_rows, write_rows
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.statistics import Sampled

IMAGES = 200


def results(folder, hits, name="pairs_test", data="same"):
    """A folder with the results of one set, as `evaluate` leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    result = Result("t", IMAGES, {"acc": Sampled.of(hits), "rank": Sampled.of(2 - hits, statistic="median")})
    write_rows(folder / f"{name}.parquet", result.sampled)
    record = {"dataset": name, "images": IMAGES, "metrics": result.metrics, "data": data}
    (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def hits():
    return (np.random.default_rng(0).random(IMAGES) < 0.5).astype(float)


def test_rows_are_kept_as_they_are(tmp_path):
    rows = {
        "acc": Sampled.of([1.0, 0.5, 0.0], images=[0, 0, 1], weights=[1, 2, 3], groups=[0, 1, 1]),
        "rank": Sampled.of([3.0, 1.0], statistic="median"),
    }
    write_rows(tmp_path / "rows.parquet", rows)
    found = read_rows(tmp_path / "rows.parquet")
    assert list(found) == list(rows)
    for name, one in rows.items():
        assert found[name].figure() == one.figure()
        assert found[name].statistic == one.statistic
        for column in ("values", "images", "weights", "groups"):
            np.testing.assert_array_equal(getattr(found[name], column), getattr(one, column))


def test_a_small_difference_on_the_same_images_is_real_and_luck_is_not(tmp_path, hits):
    better = hits.copy()
    better[np.flatnonzero(hits == 0)[:8]] = 1
    first = results(tmp_path / "a", hits)
    found = {one.metric: one for one in compare(first, results(tmp_path / "b", better))}
    assert found["acc"].difference == pytest.approx(0.04)
    assert found["acc"].real
    other = (np.random.default_rng(1).random(IMAGES) < 0.5).astype(float)
    assert not compare(first, results(tmp_path / "c", other))[0].real
    same = compare(first, first)
    assert all(one.interval == (0, 0) and not one.real for one in same)


def test_a_run_stands_for_its_newest_results(tmp_path, hits):
    results(tmp_path / "run/eval/step-00000020", hits * 0)
    results(tmp_path / "run/eval/step-00000100", hits)
    results(tmp_path / "run/eval/step-00000100-average", hits * 0)
    assert compare(tmp_path / "run", results(tmp_path / "b", hits))[0].values[0] == hits.mean()


def test_what_cannot_be_compared_says_why(tmp_path, hits):
    first = results(tmp_path / "a", hits)
    with pytest.raises(EvaluationError, match="no results are here"):
        compare(first, tmp_path / "none")
    with pytest.raises(EvaluationError, match="no set in common: pairs_test; other_test"):
        compare(first, results(tmp_path / "b", hits, name="other_test"))
    with pytest.raises(EvaluationError, match="not the same set"):
        compare(first, results(tmp_path / "c", hits, data="other"))

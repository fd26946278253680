"""Bootstrap intervals: they cover what they should, repeat, and take images for what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate import statistics
from pipeline.evaluate.statistics import Sampled, group_intervals, intervals, percentiles, resampled, tie_ranges


def interval(values, images=None, seed=0, **options):
    figure = Sampled.of(values, images=images, **options)
    count = len(values) if images is None else 1 + max(images)
    return intervals({"it": figure}, count, seed=seed)["it"]


def test_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    random = np.random.default_rng(0)
    found = [interval(random.random(80) < 0.3, seed=trial) for trial in range(150)]
    assert 0.88 <= np.mean([low <= 0.3 <= high for low, high in found]) <= 0.99


def test_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).random(2000)
    low, high = interval(values)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_agrees_with_scipy():
    from scipy import stats

    values = np.random.default_rng(4).random(60) ** 3
    for statistic, of in (("mean", np.mean), ("median", np.median)):
        theirs = stats.bootstrap((values,), of, method="percentile", n_resamples=4000, random_state=0)
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        assert interval(values, statistic=statistic) == pytest.approx(theirs.confidence_interval, abs=0.1 * width)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).random(50)
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values, seed=2)


def test_equal_values_and_a_single_one_have_no_width():
    assert interval([0.25] * 9) == (0.25, 0.25)
    assert interval([1.0]) == (1.0, 1.0)


def test_weights_divide():
    """Values that are a fixed share of their weights: whichever images are drawn, the share is the same."""
    assert interval([1, 2, 5], weights=[2, 4, 10]) == (0.5, 0.5)
    assert Sampled.of([5, 0, 3], weights=[5, 5, 5]).figure() == 8 / 15


def test_captions_of_one_image_are_drawn_together():
    """Five captions that agree carry the information of one."""
    hits = np.random.default_rng(3).random(60) < 0.5
    clustered = interval(np.repeat(hits, 5), images=np.repeat(np.arange(60), 5))
    independent = interval(np.repeat(hits, 5))
    assert clustered[1] - clustered[0] > 1.8 * (independent[1] - independent[0])


def test_groups_count_alike_whatever_their_size():
    values, groups = [1.0] * 90 + [0.0] * 30, [0] * 90 + [2] * 30
    assert Sampled.of(values, groups=groups).figure() == 0.5
    assert interval(values, groups=groups) == (0.5, 0.5)
    assert interval(values)[0] > 0.6


def test_a_group_that_a_resample_lacks_is_left_out():
    """One image a group: a resample holds some of the groups, some twice."""
    low, high = interval([1.0, 0.0, 1.0, 0.0], groups=[0, 1, 2, 3])
    assert 0 <= low < 0.5 < high <= 1


def test_each_group_has_the_interval_that_it_has_alone():
    random = np.random.default_rng(5)
    values, groups = random.random(200), random.integers(0, 3, 200)
    figure = Sampled.of(values, groups=groups)
    alone = [intervals({"it": figure.where(groups == group)}, 200)["it"] for group in range(3)]
    assert group_intervals(figure, 200) == [pytest.approx(one) for one in alone]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_the_median_is_that_of_the_rows_as_often_as_their_image_was_drawn(rows, counts):
    images, values = [image for image, _ in rows], [value for _, value in rows]
    found = Sampled.of(values, images=images, statistic="median").estimator(5)(np.array(counts, dtype=float))
    drawn = [value for image, value in rows for _ in range(counts[image])]
    assert found == (np.median(drawn) if drawn else pytest.approx(np.nan, nan_ok=True))


def test_two_models_are_drawn_alike():
    """A model that is right wherever the other is, and on two images more, is better in (nearly) every resample."""
    worse = np.random.default_rng(6).random(100) < 0.5
    better = worse.copy()
    better[np.flatnonzero(~worse)[:8]] = True
    one, other = (resampled({"it": Sampled.of(hits)}, 100)["it"] for hits in (worse, better))
    low, high = percentiles(other - one)
    assert 0 < low < 0.08 < high
    apart = percentiles(resampled({"it": Sampled.of(better)}, 100, seed=1)["it"] - one)
    assert apart[0] < 0 < apart[1]


def test_ties_lost_and_ties_won():
    """Two images; of the first a third of a hit and a whole one, of the second a half."""
    rows = [1 / 3, 1, 0.5, 0]
    figures = {
        "plain": Sampled.of(rows, images=[0, 0, 1, 1]),
        "by class": Sampled.of(rows, groups=[0, 1, 1, 1]),
        "without ties": Sampled.of([1, 0, 1]),
    }
    assert tie_ranges(figures) == {"plain": (1 / 4, 3 / 4), "by class": ((0 + 1 / 3) / 2, (1 + 2 / 3) / 2)}

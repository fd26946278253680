"""Bootstrap intervals: they cover what they should, repeat, and take images for what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate.statistics import interval, interval_over_groups


def test_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [interval(random.random(80) < 0.3, seed=trial) for trial in range(150)]
    assert 0.88 <= np.mean([low <= 0.3 <= high for low, high in intervals]) <= 0.99


def test_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).random(2000)
    low, high = interval(values)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).random(50)
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values, seed=2)


def test_equal_values_and_a_single_one_have_no_width():
    assert interval([0.25] * 9) == (0.25, 0.25)
    assert interval([1.0]) == (1.0, 1.0)


def test_weights_are_the_captions_of_an_image():
    """Values that are a fixed share of their weights: whichever images are drawn, the share is the same."""
    assert interval([1, 2, 5], [2, 4, 10]) == (0.5, 0.5)
    low, high = interval([5, 0, 3], [5, 5, 5])
    assert low <= 8 / 15 <= high


def test_clusters_are_wider_than_independent_captions():
    """Five captions that agree carry the information of one."""
    hits = np.random.default_rng(3).random(60) < 0.5
    clustered = interval(hits * 5.0, np.full(60, 5.0))
    independent = interval(np.repeat(hits, 5))
    assert clustered[1] - clustered[0] > 1.8 * (independent[1] - independent[0])


def test_groups_count_alike_whatever_their_size():
    values, groups = [1.0] * 90 + [0.0] * 30, [0] * 90 + [2] * 30
    assert interval_over_groups(values, groups) == (0.5, 0.5)
    assert interval(values)[0] > 0.6


def test_a_group_that_a_resample_lacks_is_left_out():
    """One image a group: a resample holds some of the groups, some twice."""
    values, groups = [1.0, 0.0, 1.0, 0.0], [0, 1, 2, 3]
    low, high = interval_over_groups(values, groups)
    assert 0 <= low < 0.5 < high <= 1

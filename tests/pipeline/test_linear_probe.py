"""The linear probe: what scikit-learn fits, with a strength that a search over all of them would find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from pipeline.evaluate import linear_probe
from pipeline.evaluate.linear_probe import STRENGTHS, fit, held_out, peak
from pipeline.evaluate.sets import EvaluationError


def clusters(classes, images, spread, width=6, seed=0):
    """Unit-norm features around a direction for each class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    center_KD = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    label_M = torch.arange(images) % classes
    feature_MD = center_KD[label_M] + spread * torch.randn(images, width, generator=generator)
    return F.normalize(feature_MD, dim=1), label_M


def logits(probe, feature_ND):
    return torch.cat(list(probe.scores(feature_ND)))


@pytest.mark.parametrize("classes", [2, 5])
def test_separable_clusters_are_told_apart(classes):
    probe = fit(*clusters(classes, 60, 0.05), classes)
    image_ND, label_N = clusters(classes, 40, 0.05, seed=1)
    assert torch.equal(logits(probe, image_ND).argmax(dim=1), label_N)


@pytest.mark.parametrize("classes", [2, 4])
def test_equals_a_direct_fit(classes, monkeypatch):
    """Of all strengths, that which is best on the fifth; then scikit-learn's own probabilities."""
    feature_MD, label_M = clusters(classes, 203, 1.5)
    probe = fit(feature_MD, label_M, classes)
    held_M = held_out(label_M.numpy(), seed=0)
    assert held_M.sum() == 40

    def accuracy(strength):
        model = LogisticRegression(C=strength, max_iter=1000).fit(feature_MD[~held_M].double(), label_M[~held_M])
        right = model.score(feature_MD[held_M].double(), label_M[held_M])
        log_BK = model.predict_log_proba(feature_MD[held_M].double())
        return right, log_BK[np.arange(40), label_M[held_M]].sum()

    tried = {number: accuracy(STRENGTHS[number]) for number in range(0, 97, 16)}
    best = max(tried, key=tried.get)
    assert accuracy(probe.strength) >= max(tried.values())
    assert abs(np.log10(probe.strength) - np.log10(STRENGTHS[best])) < 2
    model = LogisticRegression(C=probe.strength, max_iter=1000).fit(feature_MD.double(), label_M)
    monkeypatch.setattr(linear_probe, "BLOCK", 50)
    found = logits(probe, feature_MD).softmax(dim=1)
    np.testing.assert_allclose(found, model.predict_proba(feature_MD.double()), atol=1e-12)
    assert probe.converged


def test_a_class_without_train_images_is_never_answered():
    feature_MD, label_M = clusters(3, 60, 0.1)
    probe = fit(feature_MD, 2 * label_M, 6)
    found = logits(probe, feature_MD)
    assert torch.equal(found.argmax(dim=1), 2 * label_M)
    assert found[:, [1, 3, 5]].eq(-torch.inf).all()


@pytest.mark.parametrize("labels", [[0] * 20, [0, 1, 0, 1], [0] * 4 + [1]])
def test_too_few_images_are_refused(labels):
    label_M = torch.tensor(labels)
    with pytest.raises(EvaluationError, match=r"needs images of two classes and a fifth of them"):
        fit(torch.eye(20)[: len(labels)], label_M, 2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 3))
def test_a_fifth_is_held_out_of_every_class(labels, seed):
    label_M = np.array(labels)
    held_M = held_out(label_M, seed)
    assert held_M.sum() == len(labels) // 5
    for label in set(labels):
        assert abs(held_M[label_M == label].sum() - (label_M == label).sum() / 5) < 1


@given(st.integers(0, 96), st.floats(0.1, 5))
def test_the_search_finds_a_peak_in_fifteen_steps(place, slope):
    tried = []

    def value(number):
        tried.append(number)
        return -slope * abs(number - place)

    assert peak(value, 97, 16) == place
    assert len(tried) == len(set(tried)) <= 15


def test_strengths_are_eight_a_decade():
    assert STRENGTHS[[0, 8, 48, 96]] == pytest.approx([1e-6, 1e-5, 1, 1e6])


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(linear_probe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install '\.\[probe\]'"):
        linear_probe.check_installed()

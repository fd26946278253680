"""The right caption is the first; it must beat the others, and a tie is no victory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.evaluate import selection


def measure(scores):
    """Figures of lists of scores, an image each: there is one axis, so that a caption's coordinate is its score."""
    texts = torch.tensor([score for row in scores for score in row])[:, None]
    return selection.measure(torch.ones(len(scores), 1), texts, [len(row) for row in scores])


def test_the_first_caption_must_beat_the_others():
    found = measure([[0.9, 0.1], [0.2, 0.8, 0.1], [0.5, 0.4, 0.3, 0.2]])
    assert found.metrics["acc"] == pytest.approx(2 / 3)
    assert found.chance["acc"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_a_tie_counts_its_share():
    found = measure([[0.5, 0.5], [0.5, 0.5, 0.5], [0.4, 0.5, 0.4], [0.5, 0.4, 0.4]])
    assert found.metrics["acc"] == pytest.approx((1 / 2 + 1 / 3 + 0 + 1) / 4)


def test_each_image_is_asked_about_its_own_captions_only():
    image = torch.eye(2)
    text = torch.tensor([[0.6, 1.0], [0.5, 0.0], [1.0, 0.6], [0.0, 0.5]])
    assert selection.measure(image, text, [2, 2]).metrics["acc"] == 1


def test_a_collapsed_model_scores_chance():
    image, text = F.normalize(torch.randn(2, 65, generator=torch.Generator().manual_seed(3)), dim=1)
    counts = [2, 3, 7, 33]
    found = selection.measure(image.repeat(len(counts), 1), text.repeat(sum(counts), 1), counts)
    assert found.metrics == pytest.approx(found.chance)


def test_an_image_with_no_wrong_caption_says_nothing():
    assert measure([[0.1]]).chance["acc"] == measure([[0.1]]).metrics["acc"] == 1

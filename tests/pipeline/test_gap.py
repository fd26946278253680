"""Modality gap, alignment and uniformity: their definitions, computed plainly, and intervals of the right width."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.evaluate import gap
from pipeline.evaluate.statistics import intervals

CAPTIONS = (1, 3, 2)


def clusters(images, apart, spread=0.3, width=6):
    """Unit-norm images around one pole, one to three captions of each around another, `apart` radians away."""
    random = torch.Generator().manual_seed(images)
    owners = [image for image in range(images) for _ in range(CAPTIONS[image % 3])]
    poles = torch.zeros(2, width)
    poles[0, 0], poles[1, 0], poles[1, 1] = 1, math.cos(apart), math.sin(apart)

    def around(pole, count):
        return F.normalize(pole + spread * torch.randn(count, width, generator=random), dim=1)

    return around(poles[0], images), around(poles[1], len(owners)), owners


def values(*embeddings):
    return {name: one.figure() for name, one in gap.measure(*embeddings).items()}


@pytest.mark.parametrize("apart", [0.0, 0.5, math.pi / 2, math.pi])
def test_the_gap_of_two_points_is_their_distance(apart):
    found = values(*clusters(12, apart, spread=0))
    chord = 2 * math.sin(apart / 2)
    assert found["modality_gap"] == pytest.approx(chord, abs=1e-6)
    assert found["alignment"] == pytest.approx(chord**2, abs=1e-6)
    assert found["image_uniformity"] == found["text_uniformity"] == pytest.approx(0, abs=1e-6)


def test_it_is_what_the_papers_define():
    image_ND, text_MD, owners = clusters(40, 1.0)
    found = values(image_ND, text_MD, owners)
    first = [owners.index(image) for image in range(40)]
    assert found["modality_gap"] == pytest.approx(float((image_ND.mean(0) - text_MD.mean(0)).norm()), abs=1e-6)
    assert found["alignment"] == pytest.approx(float((image_ND[owners] - text_MD).norm(dim=1).pow(2).mean()), abs=1e-6)
    for name, rows in (("image_uniformity", image_ND), ("text_uniformity", text_MD[first])):
        # Wang and Isola's own lines
        assert found[name] == pytest.approx(float(torch.pdist(rows).pow(2).mul(-2).exp().mean().log()), abs=1e-5)


def test_blocks_make_no_difference(monkeypatch):
    embeddings = clusters(40, 1.0)
    whole = values(*embeddings)
    monkeypatch.setattr(gap, "BLOCK", 7)
    assert values(*embeddings) == pytest.approx(whole, abs=1e-7)


def test_intervals_are_those_of_a_bootstrap_of_the_whole_definition():
    """Images drawn with their captions, means and pairs taken anew; a pair of an image with its copy is none."""
    image_ND, text_MD, owners = (np.asarray(part) for part in clusters(150, 1.0))
    random, drawn = np.random.default_rng(1), {"modality_gap": [], "image_uniformity": []}
    kernel_NN = np.exp(4 * (image_ND @ image_ND.T - 1))
    for _ in range(800):
        count_N = np.bincount(random.integers(150, size=150), minlength=150)
        means = (np.average(rows, axis=0, weights=w) for rows, w in ((image_ND, count_N), (text_MD, count_N[owners])))
        drawn["modality_gap"].append(np.linalg.norm(np.subtract(*means)))
        pairs_NN = np.outer(count_N, count_N) * (1 - np.eye(150))
        drawn["image_uniformity"].append(math.log((pairs_NN * kernel_NN).sum() / pairs_NN.sum()))
    found = intervals(gap.measure(torch.tensor(image_ND), torch.tensor(text_MD), owners), 150)
    for name, values_R in drawn.items():
        low, high = np.percentile(values_R, [2.5, 97.5])
        assert found[name] == pytest.approx((low, high), abs=0.2 * (high - low))


def test_one_image_has_no_uniformity_and_equal_embeddings_have_no_gap():
    image_ND, text_MD, owners = clusters(1, 1.0)
    assert set(gap.measure(image_ND, text_MD, owners)) == {"modality_gap", "alignment"}
    same = F.normalize(torch.ones(4, 3), dim=1)
    assert values(same, same, range(4)) == pytest.approx(dict.fromkeys(values(same, same, range(4)), 0), abs=1e-6)

"""Nearest neighbours against one that looks at each pair by itself; and what ties share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate import neighbours
from pipeline.evaluate.neighbours import votes


def brute_force(image_ND, train_MD, label_M, classes, k):
    """Each vote counted by hand; there are no ties."""
    found = torch.zeros(len(image_ND), classes, dtype=torch.float64)
    for number, image_D in enumerate(image_ND.double()):
        pairs = [
            (float(image_D @ train_D), int(label)) for train_D, label in zip(train_MD.double(), label_M, strict=True)
        ]
        for similarity, label in sorted(pairs, reverse=True)[:k]:
            found[number, label] += math.exp((similarity - 1) / 0.07)
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 45), st.integers(0, 9), st.sampled_from([1, 100, 10**6]))
def test_equals_brute_force_in_blocks_of_any_size(train, classes, k, seed, elements):
    generator = torch.Generator().manual_seed(seed)
    image_ND = F.normalize(torch.randn(7, 5, generator=generator), dim=1)
    train_MD = F.normalize(torch.randn(train, 5, generator=generator), dim=1)
    label_M = torch.randint(0, classes, (train,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "ELEMENTS", elements)
        blocks = list(votes(image_ND, train_MD, label_M, classes, k))
    assert len(blocks) == -(-7 // max(1, elements // train))
    torch.testing.assert_close(
        torch.cat(blocks).double(), brute_force(image_ND, train_MD, label_M, classes, k), rtol=1e-5, atol=1e-12
    )


def test_separable_clusters_are_told_apart():
    train_MD = F.normalize(torch.eye(4).repeat(5, 1) + 0.01 * torch.arange(20)[:, None] / 20, dim=1)
    (found,) = votes(torch.eye(4), train_MD, torch.arange(20) % 4, 4, k=5)
    assert found.argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert found.count_nonzero(dim=1).tolist() == [1, 1, 1, 1]


def test_those_that_are_equally_far_share_the_places_that_are_left():
    """One is nearest; three more are equal, for two places: two thirds of a vote each."""
    near, far = [1.0, 0.0], [0.0, 1.0]
    train_MD = torch.tensor([far, near, far, far])
    (found,) = votes(torch.tensor([near]), train_MD, torch.tensor([0, 1, 1, 2]), 3, k=3)
    one = math.exp(-1 / 0.07)
    torch.testing.assert_close(found.double(), torch.tensor([[2 * one / 3, 1 + 2 * one / 3, 2 * one / 3]]).double())


def test_the_order_of_the_train_set_decides_nothing():
    generator = torch.Generator().manual_seed(0)
    train_MD = F.normalize(torch.randn(6, 3, generator=generator), dim=1).repeat(5, 1)  # each of five labels
    label_M, order = torch.arange(30) // 6, torch.randperm(30, generator=generator)
    image_ND = F.normalize(torch.randn(9, 3, generator=generator), dim=1)
    (first,), (second,) = (
        votes(image_ND, train_MD, label_M, 5, 7),
        votes(image_ND, train_MD[order], label_M[order], 5, 7),
    )
    assert torch.equal(first, second)
    assert torch.equal(first, first[:, :1].expand(-1, 5))

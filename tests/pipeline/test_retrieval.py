"""Recall against hand-written matrices, an enumeration of every way to break ties, and CLIP_benchmark's own formula."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate import retrieval
from pipeline.evaluate.ties import hit_share, scores


def measure(score_NM, owners):
    """Recalls of a matrix of scores: images are the axes, so that a caption's coordinates are its scores."""
    score_NM = torch.tensor(score_NM, dtype=torch.float32)
    return retrieval.measure(torch.eye(len(score_NM)), score_NM.T.contiguous(), owners).metrics


def embeddings(generator, counts, width=6):
    owners = torch.arange(len(counts)).repeat_interleave(counts)
    image = F.normalize(torch.randn(len(counts), width, generator=generator), dim=1)
    text = F.normalize(torch.randn(len(owners), width, generator=generator) + image[owners], dim=1)
    return image, text, owners


def test_one_caption_an_image():
    found = measure([[0.9, 0.1, 0.5], [0.8, 0.7, 0.4], [0.2, 0.3, 0.6]], [0, 1, 2])
    # By column: captions 0, 1 and 2 find their images. By row: image 1 is nearer to caption 0 than to its own.
    assert found["image_retrieval_recall@1"] == 1
    assert found["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert found["text_retrieval_recall@5"] == 1


def test_any_caption_of_the_image_is_a_hit():
    """Image 0 has three captions, and its last is what it finds; for images, each caption counts by itself."""
    found = measure([[0.1, 0.2, 0.9, 0.3], [0.5, 0.1, 0.2, 0.4]], [0, 0, 0, 1])
    assert found["text_retrieval_recall@1"] == 1 / 2
    assert found["image_retrieval_recall@1"] == 3 / 4


def test_own_captions_do_not_push_each_other_out():
    """Eleven captions of its own above it: the twelfth is not looked for, the first is found."""
    score = [[0.5 + 0.01 * number for number in range(12)] + [0.4], [0.0] * 12 + [0.3]]
    found = measure(score, [0] * 12 + [1])
    assert found["text_retrieval_recall@1"] == 1


@pytest.mark.parametrize("captions", [1, 5, 7])
def test_a_single_image_is_always_found(captions):
    found = retrieval.measure(torch.eye(3)[:1], F.normalize(torch.ones(captions, 3), dim=1), [0] * captions)
    assert set(found.metrics.values()) == set(found.chance.values()) == {1.0}
    assert set(found.intervals.values()) == {(1.0, 1.0)}


def test_a_tie_for_the_first_place_counts_a_half():
    found = measure([[0.5, 0.5], [0.1, 0.5]], [0, 1])
    assert found["text_retrieval_recall@1"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["image_retrieval_recall@1"] == pytest.approx((1 + 1 / 2) / 2)


@pytest.mark.parametrize("width", [7, 33, 128])
@pytest.mark.parametrize("images", [5, 36, 1100])
def test_a_collapsed_model_scores_chance(images, width):
    """All embeddings equal: not 1 for the order of a tensor, not 0, and not what a matrix product's rounding gives."""
    generator = torch.Generator().manual_seed(width)
    image = F.normalize(torch.randn(1, width, generator=generator), dim=1).repeat(images, 1)
    text = F.normalize(torch.randn(1, width, generator=generator), dim=1).repeat(images * 3, 1)
    assert len(scores(image, text).unique()) == 1
    found = retrieval.measure(image, text, [number // 3 for number in range(images * 3)])
    assert {name: found.metrics[name] for name in found.chance} == pytest.approx(found.chance, abs=1e-9)


def test_chance_is_what_random_embeddings_score():
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(40).repeat_interleave(5)
    drawn: dict[str, list[float]] = {}
    for _ in range(60):
        image, text = (F.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (40, 200))
        found = retrieval.measure(image, text, owners.tolist())
        for name, value in found.metrics.items():
            drawn.setdefault(name, []).append(value)
    for name, chance in found.chance.items():
        near = 0.5 if name.endswith("rank") else 0.02
        assert sum(drawn[name]) / len(drawn[name]) == pytest.approx(chance, abs=near), name


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_ties_are_shared_as_if_broken_by_lot(data):
    """Few distinct scores, so many ties: the mean over every order of the keys, each then sorted stably."""
    keys = data.draw(st.integers(1, 5))
    score = data.draw(st.lists(st.integers(0, 2), min_size=keys, max_size=keys))
    right = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys).filter(any))
    owner_K = torch.tensor([0 if own else 1 for own in right])
    key_KD = torch.tensor(score, dtype=torch.float32)[:, None]
    standing = retrieval.standing(torch.ones(1, 1), key_KD, torch.tensor([0]), owner_K)
    for k in range(1, keys + 2):
        orders = list(itertools.permutations(range(keys)))
        tops = (sorted(order, key=lambda key: -score[key])[:k] for order in orders)
        expected = sum(any(right[key] for key in top) for top in tops) / len(orders)
        assert float(hit_share(*standing, k)) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(images=st.integers(1, 30), seed=st.integers(0, 999), block=st.integers(1, 40))
def test_equals_clip_benchmark(images, seed, block):
    """Without ties, in blocks of any size, with any number of captions: CLIP_benchmark's recall_at_k > 0, averaged."""
    generator = torch.Generator().manual_seed(seed)
    image, text, owners = embeddings(generator, torch.randint(1, 8, (images,), generator=generator))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "SCORES", block * images)
        found = retrieval.measure(image, text, owners.tolist()).metrics
    score_MN = text @ image.T
    positive_MN = torch.zeros_like(score_MN, dtype=torch.bool)
    positive_MN[torch.arange(len(owners)), owners] = True
    for k in retrieval.CUTOFFS:
        for name, score, positive in (("image", score_MN, positive_MN), ("text", score_MN.T, positive_MN.T)):
            top = torch.topk(score, min(k, score.shape[1]), dim=1).indices
            expected = positive.gather(1, top).any(dim=1).float().mean()
            assert found[f"{name}_retrieval_recall@{k}"] == pytest.approx(float(expected), abs=1e-6)


def test_an_interval_draws_images_and_not_captions():
    """All captions of an image stand or fall together here, so the interval is that of ten images, not of 50 texts."""
    owners = torch.arange(10).repeat_interleave(5)
    axes = torch.eye(10)
    towards = torch.where(owners < 5, owners, (owners + 1) % 10)
    found = retrieval.measure(axes, axes[towards], owners.tolist())
    low, high = found.intervals["image_retrieval_recall@1"]
    assert found.metrics["image_retrieval_recall@1"] == 0.5
    assert high - low > 0.5


def test_folds_are_galleries_of_their_own():
    """COCO's 1K protocol: the mean of five searches; ranks within their gallery."""
    generator = torch.Generator().manual_seed(3)
    image, text, owners = embeddings(generator, torch.randint(1, 4, (40,), generator=generator))
    found = retrieval.measure(image, text, owners.tolist(), folds=5)
    parts = []
    for fold in range(5):
        of_fold = owners // 8 == fold
        parts.append(retrieval.measure(image[8 * fold :][:8], text[of_fold], (owners[of_fold] - 8 * fold).tolist()))
    for name, value in found.metrics.items():
        if "recall" in name:
            assert value == pytest.approx(sum(part.metrics[name] for part in parts) / 5)
            assert found.chance[name] == pytest.approx(sum(part.chance[name] for part in parts) / 5)
        else:
            ranks = [rank for part in parts for rank in part.sampled[name].values]
            assert value == sorted(ranks)[len(ranks) // 2] or len(ranks) % 2 == 0
    assert found.images == 40


def test_the_median_rank_counts_from_one():
    found = measure([[0.9, 0.1, 0.5], [0.8, 0.7, 0.4], [0.2, 0.3, 0.6]], [0, 1, 2])
    assert found["image_retrieval_median_rank"] == 1
    # Caption 0 finds its image last of three, caption 1 second, caption 2 first.
    found = measure([[0.1, 0.4, 0.0], [0.9, 0.3, 0.1], [0.5, 0.1, 0.2]], [0, 1, 2])
    assert found["image_retrieval_median_rank"] == 2

"""Figures against hand-written matrices, a brute-force count, and what a model that knows nothing must score."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.manifest import EvaluationSet
from pipeline.evaluate import classification, retrieval, selection, sets
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.statistics import interval


def test_retrieval_by_hand():
    """Three images on the axes. Image 0 has a caption at it and one at image 1; image 2's is nearest to image 1."""
    axes = torch.eye(3)
    captions = torch.stack([axes[0], axes[1], axes[1] * 0.9 + axes[0] * 0.1, axes[1] * 0.8 + axes[2] * 0.2])
    found = retrieval.measure(axes, captions, [0, 0, 1, 2]).metrics
    # Captions 0 and 2 find their image first, 1 and 3 do not.
    assert found["image_retrieval_recall@1"] == 2 / 4
    # Image 0 is nearest to its first caption; image 1 to a caption of image 0; image 2 to its own.
    assert found["text_retrieval_recall@1"] == 2 / 3
    assert found["text_retrieval_recall@5"] == 1


@settings(max_examples=60, deadline=None)
@given(images=st.integers(1, 30), seed=st.integers(0, 999), block=st.integers(1, 40))
def test_retrieval_equals_a_full_sort(images, seed, block):
    """Blocks, any number of captions an image: the same recalls as sorting the whole matrix."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 8, (images,), generator=generator)
    owners = torch.arange(images).repeat_interleave(counts)
    image = F.normalize(torch.randn(images, 6, generator=generator), dim=1)
    text = F.normalize(torch.randn(len(owners), 6, generator=generator) + image[owners], dim=1)
    original, retrieval.BLOCK = retrieval.BLOCK, block
    try:
        found = retrieval.measure(image, text, owners.tolist()).metrics
    finally:
        retrieval.BLOCK = original
    score = text.double() @ image.double().T
    for k in retrieval.CUTOFFS:
        top = score.argsort(dim=1, descending=True)[:, :k]
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx((top == owners[:, None]).any(1).double().mean())
        top = owners[score.T.argsort(dim=1, descending=True)[:, :k]]
        hits = (top == torch.arange(images)[:, None]).any(1).double().mean()
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(hits)


def test_equal_embeddings_earn_nothing():
    same = F.normalize(torch.ones(50, 4), dim=1)
    found = retrieval.measure(same, same, list(range(50))).metrics
    assert set(found.values()) == {0.0}
    assert selection.measure(same[:10], same[:20], [2] * 10).metrics["acc"] == pytest.approx(0.5)
    classes = classification.measure(same, same[:10], [number % 10 for number in range(50)]).metrics
    assert classes["acc1"] == pytest.approx(0.1)
    assert classes["acc5"] == pytest.approx(0.5)


def test_retrieval_chance_is_what_random_embeddings_score():
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(40).repeat_interleave(5)
    scores = {}
    for _ in range(60):
        image, text = (F.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (40, 200))
        found = retrieval.measure(image, text, owners.tolist())
        for name, value in found.metrics.items():
            scores.setdefault(name, []).append(value)
    for name, values in scores.items():
        assert np.mean(values) == pytest.approx(found.chance[name], abs=0.02), name


def test_classification_by_hand():
    """Two images of class 0, one found; one image of class 2, found; none of class 1."""
    axes = torch.eye(3)
    images = torch.stack([axes[0], axes[1], axes[2]])
    found = classification.measure(images, axes, [0, 0, 2]).metrics
    assert found["acc1"] == pytest.approx(2 / 3)
    assert found["acc5"] == 1
    assert found["mean_per_class_recall"] == pytest.approx((0.5 + 1) / 2)


def test_a_class_is_the_mean_of_its_prompts():
    table = {"a x": [1.0, 0.0], "the x": [0.0, 1.0], "a y": [-1.0, 0.0], "the y": [-1.0, 0.0]}

    def embed(texts):
        return torch.tensor([table[text] for text in texts])

    found = classification.class_embeddings(["x", "y"], ["a {c}", "the {c}"], embed)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))


def test_selection_wants_the_first_caption():
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    found = selection.measure(image, text, [2, 3])
    assert found.metrics["acc"] == 0.5  # the second image's right caption is at the first image
    assert found.chance["acc"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        low, high = interval(random.random(80) < 0.3, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_an_interval_of_a_weighted_mean_holds_it():
    low, high = interval([5, 0, 3], [5, 5, 5])
    assert low <= 8 / 15 <= high


def write_set(root, members, shards="1\n"):
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text(shards)
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return EvaluationSet("mine", "retrieval", root, 1)


def picture():
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_sets_are_read_as_clip_benchmark_lays_them_out(tmp_path):
    members = [("s0000000.png", picture()), ("s0000000.txt", b"one\ntwo"), ("s0000001.png", picture())]
    items = sets.read(write_set(tmp_path, members))
    assert [(item.key, item.captions) for item in items] == [("s0000000", ("one", "two")), ("s0000001", ())]
    assert items[0].open().mode == "RGB"


def test_sets_that_cannot_be_measured_say_why(tmp_path):
    with pytest.raises(EvaluationError, match="holds no image"):
        sets.read(write_set(tmp_path / "a", []))
    with pytest.raises(EvaluationError, match="cannot be read"):
        sets.read(write_set(tmp_path / "b", [("s0.png", picture())], shards="2\n"))
    source = write_set(tmp_path / "c", [])
    (source.path / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(EvaluationError, match=r"lacks \{c\}"):
        sets.templates(source)

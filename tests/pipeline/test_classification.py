"""Zero-shot accuracy against hand-written scores, ties, and classes that have no images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.evaluate import classification

NAMES = [f"class {number}" for number in range(1000)]


def measure(score_NK, labels):
    """Figures of a matrix of scores: classes are the axes, so that an image's coordinates are its scores."""
    score_NK = torch.as_tensor(score_NK, dtype=torch.float32)
    return classification.measure(score_NK, torch.eye(score_NK.shape[1]), labels, NAMES[: score_NK.shape[1]])


def test_by_hand():
    """Seven classes: image 0 is right at once, image 1 is third, image 2 is sixth."""
    descending = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    found = measure([descending] * 3, [0, 2, 5])
    assert found.metrics["acc1"] == pytest.approx(1 / 3)
    assert found.metrics["acc5"] == pytest.approx(2 / 3)
    assert found.chance == pytest.approx({"acc1": 1 / 7, "acc5": 5 / 7, "mean_per_class_recall": 1 / 7})


def test_recall_is_over_the_classes_that_have_images():
    """Class 0: one of two found. Class 2: one of one. Class 1 has no image: no recall, though it can be answered."""
    found = measure([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 0, 2])
    assert found.metrics["acc1"] == pytest.approx(2 / 3)
    assert found.metrics["mean_per_class_recall"] == pytest.approx((1 / 2 + 1) / 2)
    classes = found.describe()["classes"]
    assert [(one["images"], one["recall"]) for one in classes] == [(2, 0.5), (0, None), (1, 1.0)]
    assert classes[1]["precision"] == 0
    assert found.metrics["acc5"] == found.chance["acc5"] == 1  # three classes: all are among the first five


def test_a_tie_counts_its_share():
    found = measure([[0.5, 0.5, 0.5, 0.1], [0.9, 0.5, 0.5, 0.1]], [1, 1])
    assert found.metrics["acc1"] == pytest.approx((1 / 3 + 0) / 2)


@pytest.mark.parametrize("classes", [3, 36, 1000])
def test_a_collapsed_model_scores_chance(classes):
    image, text = F.normalize(torch.randn(2, 33, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = [number % classes for number in range(2 * classes)]
    found = classification.measure(image.repeat(2 * classes, 1), text.repeat(classes, 1), labels, NAMES[:classes])
    assert {name: found.metrics[name] for name in found.chance} == pytest.approx(found.chance, abs=1e-9)
    assert found.intervals["acc1"] == pytest.approx((1 / classes, 1 / classes))


def test_a_single_image():
    found = measure([[0.1, 0.9]], [1])
    assert found.metrics["acc1"] == found.metrics["mean_per_class_recall"] == 1
    assert found.intervals["mean_per_class_recall"] == (1.0, 1.0)


def test_equals_sorting_in_blocks_of_any_size(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(203, 8, generator=generator), dim=1)
    text = F.normalize(torch.randn(12, 8, generator=generator), dim=1)
    label_N = torch.randint(0, 12, (203,), generator=generator)
    monkeypatch.setattr(classification, "BLOCK", 50)
    found = classification.measure(image, text, label_N.tolist(), NAMES[:12]).metrics
    first = (image @ text.T).argsort(dim=1, descending=True)
    assert found["acc1"] == pytest.approx(float((first[:, 0] == label_N).double().mean()))
    assert found["acc5"] == pytest.approx(float((first[:, :5] == label_N[:, None]).any(dim=1).double().mean()))
    recalls = [float((first[label_N == k, 0] == k).double().mean()) for k in label_N.unique()]
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(recalls))


def test_a_class_is_the_normalised_mean_of_its_prompts():
    table = {"a x": [1.0, 0.0], "the x": [0.0, 1.0], "a y": [-1.0, 0.0], "the y": [-1.0, 0.0]}
    asked = []

    def embed(prompts):
        asked.extend(prompts)
        return torch.tensor([table[prompt] for prompt in prompts])

    found = classification.class_embeddings(["x", "y"], ["a {c}", "the {c}"], embed)
    assert asked == list(table)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))


def test_each_class_is_scored_as_scikit_learn_scores_it():
    from sklearn import metrics

    generator = torch.Generator().manual_seed(5)
    score_NK = torch.rand(300, 6, generator=generator)
    score_NK[:, 4] -= 2  # never answered
    label_N = torch.randint(0, 5, (300,), generator=generator)  # class 5 has no images
    found, first_N = measure(score_NK, label_N.tolist()), score_NK.argmax(dim=1)
    expected = metrics.precision_recall_fscore_support(label_N, first_N, labels=range(6), zero_division=0)
    classes = found.describe()["classes"]
    for name, value_K in zip(("precision", "recall", "f1"), expected, strict=False):
        assert [one[name] or 0 for one in classes] == pytest.approx(value_K.tolist())
    matrix = np.zeros((6, 6), dtype=int)
    for label, answered, count in found.describe()["confusion"]:
        matrix[label, answered] = count
    assert (matrix == metrics.confusion_matrix(label_N, first_N, labels=range(6))).all()
    assert found.metrics["mean_per_class_f1"] == pytest.approx(expected[2].mean())
    low, high = classes[0]["intervals"]["f1"]
    assert low < classes[0]["f1"] < high

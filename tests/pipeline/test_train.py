"""What the loop is made of: the learning rate, the length of a run, and what is no negative."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline import begin, config
from pipeline.config import OptimConfig, TrainConfig
from pipeline.data.plan import Plan, Share
from pipeline.train import learning_rate, no_negatives


def rates(total, **changes):
    optim = OptimConfig(lr=1.0, **{"warmup_steps": 4, **changes})
    return [learning_rate(step, optim, total) for step in range(total)]


def test_warm_up_is_linear_and_a_cosine_ends_near_zero():
    found = rates(24, schedule="cosine")
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:] == [pytest.approx((1 + math.cos(math.pi * done / 20)) / 2) for done in range(20)]


def test_wsd_holds_and_then_falls_to_zero_over_its_share():
    found = rates(20, schedule="wsd", decay_share=0.25)
    assert found[3:16] == [1.0] * 13
    assert found[15:] == [pytest.approx(value) for value in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert set(rates(20, schedule="constant")[3:]) == {1.0}


def plan(samples=100, batch=30, **changes):
    return Plan([Share("a", [samples // 4] * 4)], seed=0, global_batch=batch, **changes)


@pytest.mark.parametrize(
    ("length", "tail", "steps"),
    [
        ({"steps": 7}, "drop", 7),
        ({"samples": 61}, "drop", 3),
        ({"epochs": 2}, "drop", 6),
        ({"epochs": 2.5}, "pad", 10),
        ({"epochs": 3}, "wrap", 10),
        ({"epochs": 0.01}, "drop", 1),
    ],
)
def test_a_run_is_as_long_as_steps_passes_or_pairs_say(length, tail, steps):
    assert begin.length(TrainConfig(batch_size=30, **length), plan(tail=tail)) == steps


@pytest.mark.parametrize("length", [{}, {"steps": 3, "epochs": 1}])
def test_a_length_is_given_once(length):
    with pytest.raises(ValueError, match="train needs one of steps, epochs, samples"):
        TrainConfig(batch_size=30, **length)


def test_a_length_on_the_command_line_replaces_the_recipes(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("model: {name: ViT-B-32}\ntrain: {epochs: 3, batch_size: 8}\n")
    assert config.load(str(path), ["train.steps=20"]).train.steps == 20


def test_photos_and_texts_that_occur_twice_are_no_negatives():
    photo_B, token_BL = torch.tensor([7, 8, 7, 9]), torch.tensor([[1, 2], [3, 4], [5, 6], [3, 4]])
    assert no_negatives(photo_B, token_BL, "pair") is None
    assert no_negatives(photo_B, token_BL, "image").tolist() == [[7], [8], [7], [9]]
    photo, text = no_negatives(photo_B, token_BL, "image_and_text").T
    assert photo.tolist() == [7, 8, 7, 9]
    assert [(a == b).item() for a, b in ((text[1], text[3]), (text[0], text[1]))] == [True, False]


def test_targets_shared_among_equal_texts_would_change_nothing():
    """Why equal texts are masked: targets spread over them (UniCL) give pair targets' value and gradients exactly."""
    generator = torch.Generator().manual_seed(0)
    image, word = (
        F.normalize(torch.randn(size, 8, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
        for size in (12, 5)
    )
    which = torch.randint(0, 5, (12,), generator=generator)
    logits = 10 * image @ word[which].T
    own = torch.arange(12)
    pair = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    spread = (which[:, None] == which).double()
    spread /= spread.sum(dim=1, keepdim=True)
    shared = F.cross_entropy(logits, spread) + F.cross_entropy(logits.T, spread)
    torch.testing.assert_close(pair, shared, rtol=1e-12, atol=0)
    for found, expected in zip(
        torch.autograd.grad(pair, (image, word), retain_graph=True),
        torch.autograd.grad(shared, (image, word)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

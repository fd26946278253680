"""The loss against closed forms, plain autograd, open_clip's own, and itself over several ranks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.plan import rank_bounds
from pipeline.loss.info_nce import info_nce
from tests.processes import run_ranks


def plain(image_BD, text_BD, scale):
    """The definition, with the whole matrix of logits."""
    logit_BB = scale * image_BD @ text_BD.T
    target_B = torch.arange(len(logit_BB))
    return (F.cross_entropy(logit_BB, target_B) + F.cross_entropy(logit_BB.T, target_B)) / 2


def pairs(batch, width, seed, dtype=torch.float64):
    """Unit vectors (leaves that want gradients) and a scale."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(batch, width, generator=generator, dtype=dtype), dim=1).requires_grad_()
        for _ in range(2)
    )
    return image, text, torch.tensor(14.3, dtype=dtype, requires_grad=True)


def value_and_grads(loss_function, inputs, **options):
    loss = loss_function(*inputs, **options)
    return loss, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_equal_embeddings_cost_log_batch(batch):
    """Uniform logits carry no information, whatever the temperature."""
    same = F.normalize(torch.ones(batch, 8), dim=1)
    for scale in (1.0, 14.0, 100.0):
        assert info_nce(same, same, torch.tensor(scale)).item() == pytest.approx(math.log(batch), abs=1e-5)


def test_perfect_pairs_at_a_high_scale_cost_nothing():
    axes = torch.eye(16)
    assert info_nce(axes, axes, torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 33), width=st.integers(1, 9), tile=st.integers(1, 40), seed=st.integers(0, 99))
def test_value_and_gradients_equal_plain_autograd(batch, width, tile, seed):
    inputs = pairs(batch, width, seed)
    for found, expected in zip(
        value_and_grads(info_nce, inputs, tile=tile), value_and_grads(plain, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_agrees_with_open_clip():
    from open_clip.loss import ClipLoss

    inputs = pairs(48, 32, seed=1, dtype=torch.float32)
    for found, expected in zip(
        value_and_grads(info_nce, inputs, tile=16), value_and_grads(ClipLoss(), inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_features_are_compared_in_float32():
    image, text, scale = pairs(32, 16, seed=2, dtype=torch.float32)
    low = info_nce(image.bfloat16(), text.bfloat16(), scale)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, info_nce(image.bfloat16().float(), text.bfloat16().float(), scale))


def one_rank(rank, world, batch):
    """This rank's share of the loss and of all gradients, over a linear pair of towers."""
    bounds = rank_bounds(batch, world)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    own = slice(bounds[rank], bounds[rank + 1])
    image, text, scale = pairs(batch, 12, seed=5)
    tower = torch.eye(12, dtype=torch.float64).requires_grad_()
    features = [F.normalize(side[own].detach() @ tower, dim=1) for side in (image, text)]
    loss = info_nce(*features, scale, sizes=sizes, tile=5)
    return loss.item(), *[grad.numpy() for grad in torch.autograd.grad(loss, (tower, scale))]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_sum_to_the_whole_with_uneven_batches(world):
    """17 pairs divide neither by 2 nor by 3."""
    whole = one_rank(0, 1, 17)
    shares = run_ranks(world, one_rank, 17)
    for name, share, expected in zip(("loss", "tower", "scale"), zip(*shares, strict=True), whole, strict=True):
        assert sum(share) == pytest.approx(expected, rel=1e-10, abs=1e-12), name

"""The sigmoid loss against its definition, open_clip's own, and itself over several ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.plan import rank_bounds
from pipeline.loss.sigmoid import sigmoid
from tests.pipeline.test_info_nce import pairs, value_and_grads
from tests.processes import run_ranks


def inputs(batch, width, seed, dtype=torch.float64):
    return *pairs(batch, width, seed, dtype), torch.tensor(-10.0, dtype=dtype, requires_grad=True)


def plain(image_BD, text_BD, scale, bias, key_BK=None):
    logit_BB = scale * image_BD @ text_BD.T + bias
    own_BB = torch.eye(len(logit_BB), dtype=torch.bool)
    loss_BB = -F.logsigmoid(torch.where(own_BB, logit_BB, -logit_BB))
    if key_BK is not None:
        loss_BB = loss_BB.masked_fill((key_BK[:, None] == key_BK).any(dim=-1) & ~own_BB, 0)
    return loss_BB.sum() / len(loss_BB)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 33), tile=st.integers(1, 40), seed=st.integers(0, 99), kinds=st.integers(0, 2))
def test_value_and_gradients_equal_plain_autograd(batch, tile, seed, kinds):
    given_ = inputs(batch, 8, seed)
    keys = torch.randint(0, 12, (batch, kinds), generator=torch.Generator().manual_seed(seed)) if kinds else None
    found = value_and_grads(sigmoid, given_, key_BK=keys, tile=tile)
    for one, expected in zip(found, value_and_grads(plain, given_, key_BK=keys), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)


def test_agrees_with_open_clip():
    from open_clip.loss import SigLipLoss

    given_ = inputs(48, 32, seed=1)
    for found, expected in zip(
        value_and_grads(sigmoid, given_, tile=16), value_and_grads(SigLipLoss(), given_), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def one_rank(rank, world, batch):
    """This rank's share of the loss and of all gradients, over a linear pair of towers."""
    bounds = rank_bounds(batch, world)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    own = slice(bounds[rank], bounds[rank + 1])
    image, text, scale, bias = inputs(batch, 12, seed=5)
    tower = torch.eye(12, dtype=torch.float64).requires_grad_()
    features = [F.normalize(side[own].detach() @ tower, dim=1) for side in (image, text)]
    keys = torch.randint(0, 9, (batch, 2), generator=torch.Generator().manual_seed(1))[own]
    loss = sigmoid(*features, scale, bias, key_BK=keys, sizes=sizes, tile=5)
    return loss.item(), *[grad.numpy() for grad in torch.autograd.grad(loss, (tower, scale, bias))]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_sum_to_the_whole_with_uneven_batches(world):
    whole = one_rank(0, 1, 17)
    shares = run_ranks(world, one_rank, 17)
    for name, share, expected in zip(("loss", "tower", "scale", "bias"), zip(*shares, strict=True), whole, strict=True):
        assert sum(share) == pytest.approx(expected, rel=1e-10, abs=1e-12), name

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
from pipeline.loss.tiles import text_key
from tests.processes import run_ranks


def plain(image_BD, text_BD, scale, *, key_BK=None, decoupled=False):
    """The definition, with the whole matrix of logits."""
    logit_BB = scale * image_BD @ text_BD.T
    own_BB = torch.eye(len(logit_BB), dtype=torch.bool)
    gone_BB = own_BB & decoupled
    if key_BK is not None:
        gone_BB = gone_BB | ((key_BK[:, None] == key_BK).any(dim=-1) & ~own_BB)
    kept_BB = logit_BB.masked_fill(gone_BB, -torch.inf)
    losses_B = [kept_BB.logsumexp(dim=dim) - logit_BB.diagonal() for dim in (1, 0)]
    return sum(torch.where(loss_B.isinf(), 0, loss_B).mean() for loss_B in losses_B) / 2


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


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 33),
    width=st.integers(1, 9),
    tile=st.integers(1, 40),
    seed=st.integers(0, 99),
    decoupled=st.booleans(),
    kinds=st.integers(0, 2),
)
def test_value_and_gradients_equal_plain_autograd(batch, width, tile, seed, decoupled, kinds):
    inputs = pairs(batch, width, seed)
    keys = torch.randint(0, 12, (batch, kinds), generator=torch.Generator().manual_seed(seed)) if kinds else None
    form = {"key_BK": keys, "decoupled": decoupled}
    found = value_and_grads(info_nce, inputs, tile=tile, **form)
    for one, expected in zip(found, value_and_grads(plain, inputs, **form), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_batch_of_one_photo_has_no_negatives_and_costs_nothing(decoupled):
    inputs = pairs(6, 4, seed=3)
    keys = torch.zeros(6, 1, dtype=torch.int64)
    loss, *grads = value_and_grads(info_nce, inputs, key_BK=keys, decoupled=decoupled)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


def test_a_repeated_pair_costs_as_much_as_the_batch_without_it():
    """Twice the same photo and caption: each copy meets the other pairs only, as if it were alone."""
    image, text, scale = pairs(9, 8, seed=4)
    once = plain(image, text, scale)
    twice = [torch.cat([side, side]) for side in (image, text)]
    keys = torch.arange(9).repeat(2)[:, None]
    # Each column and row now has every negative twice.
    doubled = [
        torch.log1p(2 * torch.expm1(loss_B)).mean()
        for loss_B in ((scale * a @ b.T).log_softmax(dim=1).diagonal().neg() for a, b in ((image, text), (text, image)))
    ]
    assert once < sum(doubled) / 2
    torch.testing.assert_close(info_nce(*twice, scale, key_BK=keys, tile=4), sum(doubled) / 2, rtol=1e-12, atol=1e-12)


def relative_error(grads, exact):
    off, whole = (
        torch.cat([value.double().flatten() for value in values]).norm()
        for values in ([a - b for a, b in zip(grads, exact, strict=True)], exact)
    )
    return (off / whole).item()


def by_margins(image_BD, text_BD, scale):
    """The definition with the pair's own logit apart: where it outweighs the rest, 1 - p is lost in rounding."""
    logit_BB = scale * image_BD @ text_BD.T
    own_BB = torch.eye(len(logit_BB), dtype=torch.bool)
    rest_BB = logit_BB.masked_fill(own_BB, -torch.inf)
    margins = torch.stack([rest_BB.logsumexp(dim=dim) - logit_BB.diagonal() for dim in (0, 1)])
    return torch.logaddexp(margins, torch.zeros_like(margins)).mean()


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
@pytest.mark.parametrize("noise", [None, 1.0, 0.3])
def test_float32_gradients_are_as_good_as_float32_allows(scale, noise):
    """Random unit vectors, and texts that lie as near their images as trained ones do."""
    from open_clip.loss import ClipLoss

    generator = torch.Generator().manual_seed(0)
    image, other = (F.normalize(torch.randn(512, 256, generator=generator), dim=1) for _ in range(2))
    text = other if noise is None else F.normalize(image + noise * other, dim=1)
    single = [image.requires_grad_(), text.requires_grad_()]
    wide = [side.detach().double().requires_grad_() for side in single]
    exact = torch.autograd.grad(by_margins(*wide, torch.tensor(scale).double()), wide)
    ours, theirs = (
        relative_error(torch.autograd.grad(loss(*single, torch.tensor(scale)), single), exact)
        for loss in (info_nce, ClipLoss())
    )
    assert ours <= 1e-6 if scale < 100 else ours <= 2e-5
    assert ours <= max(theirs, 1e-6)
    if noise and scale == 100.0:
        assert theirs > 0.3  # what ours is spared


def test_under_autocast_products_are_of_bfloat16_and_sums_of_float32():
    image, text, scale = pairs(300, 64, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *grads = value_and_grads(info_nce, (image, text, scale), tile=128)
    rounded = [side.detach().bfloat16().float().requires_grad_() for side in (image, text)]
    expected, *expected_grads = value_and_grads(info_nce, (*rounded, scale))
    assert {value.dtype for value in (loss, *grads)} == {torch.float32}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert loss != info_nce(image, text, scale)
    assert 1e-5 < relative_error(grads, [grad.double() for grad in expected_grads]) < 1e-2


def test_text_keys_tell_texts_apart():
    tokens = torch.tensor([[5, 6, 0], [6, 5, 0], [5, 6, 0], [0, 5, 6], [5, 6, 7]])
    first, *others = text_key(tokens).tolist()
    assert [other == first for other in others] == [False, True, False, False]


def one_rank(rank, world, batch, keyed=False, decoupled=False):
    """This rank's share of the loss and of all gradients, over a linear pair of towers."""
    bounds = rank_bounds(batch, world)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    own = slice(bounds[rank], bounds[rank + 1])
    image, text, scale = pairs(batch, 12, seed=5)
    tower = torch.eye(12, dtype=torch.float64).requires_grad_()
    features = [F.normalize(side[own].detach() @ tower, dim=1) for side in (image, text)]
    keys = torch.randint(0, 9, (batch, 2), generator=torch.Generator().manual_seed(1))[own]
    loss = info_nce(*features, scale, key_BK=keys if keyed else None, decoupled=decoupled, sizes=sizes, tile=5)
    return loss.item(), *[grad.numpy() for grad in torch.autograd.grad(loss, (tower, scale))]


@pytest.mark.parametrize(("world", "keyed", "decoupled"), [(2, False, False), (3, True, False), (5, True, True)])
def test_ranks_sum_to_the_whole_with_uneven_batches(world, keyed, decoupled):
    """17 pairs divide by none of 2, 3 and 5."""
    whole = one_rank(0, 1, 17, keyed, decoupled)
    shares = run_ranks(world, one_rank, 17, keyed, decoupled)
    for name, share, expected in zip(("loss", "tower", "scale"), zip(*shares, strict=True), whole, strict=True):
        assert sum(share) == pytest.approx(expected, rel=1e-10, abs=1e-12), name

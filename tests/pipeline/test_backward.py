"""Gradient caching: a batch in parts gives the loss and the gradients of the whole batch."""

from __future__ import annotations

import functools
import itertools
import os

import open_clip
import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from pipeline.backward import forward_backward, parts_of
from pipeline.data.plan import rank_bounds
from pipeline.loss.info_nce import info_nce
from pipeline.loss.sigmoid import sigmoid
from tests.processes import run_ranks

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 6, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}


SEED = 7


def made(batch, bias=None, dropout=0.0):
    """(towers, images, tokens), the same at each call"""
    torch.manual_seed(0)
    vision = {**CONFIG["vision_cfg"], "patch_dropout": dropout}
    towers = open_clip.CLIP(**{**CONFIG, "vision_cfg": vision}, init_logit_bias=bias).double()
    towers.train()
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (batch, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return towers, image, torch.randint(1, 50, (batch, 6), generator=generator)


def gradients(rank, world, batch, micro, loss=info_nce, bias=None, dropout=0.0):
    """(this rank's share of the loss, every parameter's gradient after the exchange)"""
    towers, image, token = made(batch, bias, dropout)
    bounds = rank_bounds(batch, world)
    sizes = [end - first for first, end in itertools.pairwise(bounds)]
    own = slice(bounds[rank], bounds[rank + 1])
    if world > 1:  # what a launcher says, and Accelerator reads
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests of this process want another one
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    share = forward_backward(
        accelerator,
        torch.nn.parallel.DistributedDataParallel(towers) if world > 1 else towers,
        image[own],
        token[own],
        functools.partial(loss, sizes=sizes, tile=5),
        prepare=lambda image: image.double() / 255,
        parts=parts_of(sizes, micro),
        seed=SEED,
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not share.requires_grad
    return share.item(), {name: value.grad.numpy() for name, value in towers.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            torch.from_numpy(grad), torch.from_numpy(expected[name]), rtol=1e-10, atol=1e-12, msg=name
        )


@pytest.mark.parametrize(("loss", "bias"), [(info_nce, None), (sigmoid, -5.0)])
@pytest.mark.parametrize("micro", [1, 4, 5, 13])
def test_parts_give_the_gradient_of_the_whole(micro, loss, bias):
    value, expected = gradients(0, 1, 13, None, loss, bias)
    found_value, found = gradients(0, 1, 13, micro, loss, bias)
    assert found_value == pytest.approx(value, rel=1e-12)
    assert_equal(found, expected)


def test_both_passes_drop_the_same_patches():
    """As if each part went through the towers once, by autograd, with the patches that its own seed drops."""
    value, found = gradients(0, 1, 8, 3, dropout=0.5)
    towers, image, token = made(8, dropout=0.5)
    parts = []
    for number, (some, words) in enumerate(zip(image.split(3), token.split(3), strict=True)):
        torch.manual_seed(SEED + number)
        parts.append(towers(some.double() / 255, words))
    features = [torch.cat(side) for side in list(zip(*parts, strict=True))[:2]]
    expected = info_nce(*features, towers.logit_scale.exp(), sizes=[8], tile=5)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert_equal(found, {name: parameter.grad.numpy() for name, parameter in towers.named_parameters()})
    assert gradients(0, 1, 8, 3)[0] != value


@pytest.mark.parametrize(
    ("sizes", "micro", "parts"),
    [([4, 5], None, 1), ([4, 5], 5, 1), ([4, 5], 4, 2), ([5, 4], 2, 3), ([4, 5], 1, 4), ([1, 1], 1, 1), ([13], 4, 4)],
)
def test_ranks_have_as_many_parts_and_none_is_empty(sizes, micro, parts):
    assert parts_of(sizes, micro) == parts
    assert all(-(-size // parts) <= max(micro or size, 2) for size in sizes)


@pytest.mark.parametrize(("world", "micro"), [(2, None), (3, 2), (5, 3)])
def test_ranks_give_the_gradient_of_one(world, micro):
    """13 pairs divide by none of 2, 3 and 5."""
    value, expected = gradients(0, 1, 13, None)
    shares = run_ranks(world, gradients, 13, micro)
    assert sum(share for share, _ in shares) == pytest.approx(value, rel=1e-10)
    for _, found in shares:
        assert_equal(found, expected)

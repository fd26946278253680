"""One step's loss and gradients, with all of a rank's pairs at once or a few at a time.

Shapes: B = pairs on this rank, D = embedding width, C = 3 channels, S = image size, L = context length.

A contrastive loss needs every pair's features, while its gradient by one pair's weights needs that pair's activations
alone. So where there are several parts, features are made first without activations, the loss gives its gradient by
them, and each part goes through the towers again to carry that gradient on to the weights (Gao et al. 2021, "Scaling
deep contrastive learning batch size under memory limited setup"). The result is the unsplit one, for a second forward
pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

# (image_BD, text_BD, scale[, bias]) → (): this rank's share of the loss.
Contrast = Callable[..., Tensor]


def parts_of(sizes: Sequence[int], micro_batch: int | None) -> int:
    """Into how many parts every rank cuts its pairs: as many on each, since towers gather weights in each part.

    Args:
        sizes: B of every rank; they differ by one at the most.
        micro_batch: pairs of a part at the most, two where ranks with one pair less would have an empty part; None for
            all.
    """
    return min(-(-max(sizes) // micro_batch), min(sizes)) if micro_batch else 1


def forward_backward(
    accelerator: Accelerator,
    towers: Any,
    image_BCSS: Tensor,
    token_BL: Tensor,
    contrast: Contrast,
    *,
    prepare: Callable[[Tensor], Tensor],
    parts: int,
    seed: int,
) -> Tensor:
    """Add this step's gradients to the towers' parameters, summed over ranks.

    Args:
        accelerator: whose `prepare` made `towers`.
        towers: (image, text) → (image_BD, text_BD, scale[, bias]); DDP's, over several ranks.
        image_BCSS: uint8, on the device.
        token_BL: int64, on the device.
        contrast: the loss of this rank's pairs, whose gradients want to be summed over ranks.
        prepare: uint8 → the towers' input.
        parts: that go through the towers one after the other (see parts_of); 1 for all pairs at once.
        seed: of the random numbers inside the towers (dropout, patch dropout), so that none of their state needs
            saving; each part has its own.

    Returns:
        () this rank's share of the loss, detached.

    Collective: every rank calls it, with as many parts.
    """
    world = accelerator.num_processes  # the loss wants gradients summed, DDP takes their mean

    def embedded() -> Iterator[tuple[Tensor, ...]]:
        cut = zip(image_BCSS.tensor_split(parts), token_BL.tensor_split(parts), strict=True)
        for number, (image, token) in enumerate(cut):
            _seed(image.device, seed + number)
            with accelerator.autocast():
                features = towers(prepare(image), token)
            yield features

    if parts == 1:
        (features,) = embedded()
        with accelerator.autocast():
            loss = contrast(*features)
        accelerator.backward(loss * world)
        return loss.detach()

    with torch.no_grad():
        made = list(embedded())
    whole = [torch.cat(side).requires_grad_() for side in list(zip(*made, strict=True))[:2]]
    temperature = [value.detach().requires_grad_() for value in made[0][2:]]
    with accelerator.autocast():
        loss = contrast(*whole, *temperature)
    grads = torch.autograd.grad(loss * world, [*whole, *temperature])
    sides = zip(*(grad.tensor_split(parts) for grad in grads[:2]), strict=True)
    last = parts - 1
    with contextlib.ExitStack() as unsynced:
        unsynced.enter_context(accelerator.no_sync(towers))
        again = embedded()
        for number, side in enumerate(sides):
            if number == last:
                unsynced.close()  # DDP's forward pass looks whether gradients will be exchanged
            image, text, *own_temperature = next(again)
            terms = [(feature * grad).sum() for feature, grad in zip((image, text), side, strict=True)]
            if number == last:
                terms += [value * grad for value, grad in zip(own_temperature, grads[2:], strict=True)]
            accelerator.backward(torch.stack(terms).sum())
    return loss.detach()


def _seed(device: torch.device, seed: int) -> None:
    """torch.manual_seed for the CPU and this device alone: for devices that are not there it takes a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)

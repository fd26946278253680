"""The moving average of the weights."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pipeline.average import WeightAverage
from pipeline.model import ModelError
from tests.pipeline.towers import (
    PLAIN,
    built,
    copied,
    equal,
    kinds,
)


@kinds("vit", "resnet")
def test_the_average_is_the_closed_form(config):
    towers, decay = built(config), 0.9
    weights, average = [copied(towers)], WeightAverage(towers, decay)
    for step in range(1, 4):
        for tensor in towers.state_dict().values():
            tensor.add_(torch.full_like(tensor, step))
        weights.append(copied(towers))
        average.update(towers)
    factors = [decay**3, (1 - decay) * decay**2, (1 - decay) * decay, 1 - decay]
    parameters, found = dict(towers.named_parameters()), average.state_dict()
    assert list(found) == list(towers.state_dict())
    for name, tensor in found.items():
        expected = sum(factor * weight[name].double() for factor, weight in zip(factors, weights, strict=True))
        expected = expected if name in parameters else weights[-1][name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)


@kinds("vit", "resnet")
def test_in_place_of_the_weights_it_leaves_them_as_they_were(config):
    towers = built(config)
    towers.visual.register_parameter("tied", towers.logit_scale)
    average = WeightAverage(towers, 0.5)
    for tensor in towers.state_dict().values():
        tensor.add_(torch.full_like(tensor, 3))
    average.update(towers)
    weights, averaged = copied(towers), {name: tensor.clone() for name, tensor in average.state_dict().items()}
    assert not equal(weights, averaged)
    with contextlib.suppress(ZeroDivisionError), average.in_place_of(towers):
        assert equal(copied(towers), averaged)
        raise ZeroDivisionError
    assert equal(copied(towers), weights)
    assert equal(average.state_dict(), averaged)


def test_an_average_goes_on_where_it_was_saved_and_equal_weights_leave_it():
    towers = built(PLAIN)
    average = WeightAverage(towers, 0.999)
    average.update(towers)
    assert equal(average.state_dict(), copied(towers))
    state = {name: tensor + 1 for name, tensor in towers.state_dict().items()}
    average.load_state_dict(state)
    assert equal(average.state_dict(), state)
    with pytest.raises(ModelError, match="lacks"):
        average.load_state_dict({})

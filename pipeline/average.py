"""A moving average of the weights (EMA), kept beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.model import Towers
from pipeline.pretrained import check_same


class WeightAverage:
    """Moving average of the parameters, where they lie: a ← decay · a + (1 - decay) · w; buffers are copied."""

    def __init__(self, towers: Towers, decay: float) -> None:
        self.decay = decay
        self._tensors = {name: tensor.detach().clone() for name, tensor in towers.state_dict().items()}
        self._parameters = [name for name, _ in towers.named_parameters(remove_duplicate=False)]

    @torch.no_grad()
    def update(self, towers: Towers) -> None:
        """Take in the weights after a step; nothing waits for the device."""
        now = towers.state_dict()
        averages, weights = ([tensors[name] for name in self._parameters] for tensors in (self._tensors, now))
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for name in now.keys() - set(self._parameters):
            self._tensors[name].copy_(now[name])

    @contextlib.contextmanager
    def in_place_of(self, towers: Towers) -> Iterator[None]:
        """Meanwhile the towers have the average, and this their weights; afterwards each has its own, to the bit."""
        names = list(self._tensors)
        self._exchange(towers, names)
        try:
            yield
        finally:
            self._exchange(towers, names[::-1])  # backwards: tied weights have several names

    @torch.no_grad()
    def _exchange(self, towers: Towers, names: Sequence[str]) -> None:
        now = towers.state_dict()
        for name in names:
            own = now[name].clone()
            now[name].copy_(self._tensors[name])
            self._tensors[name].copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by open_clip's names; the tensors themselves, not copies."""
        return dict(self._tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved average, or raise ModelError: other names or shapes."""
        check_same(self._tensors, state, "the saved average of the weights")
        for name, tensor in state.items():
            self._tensors[name].copy_(tensor)

"""What autograd keeps of the towers, measured on tensors without content.

The towers run on fake tensors, which have shapes and types but no numbers, at two batch sizes; what is kept between the
passes, and the most that is alive beside it in both, are lines in the number of pairs. Test: a run over real tensors
keeps the same bytes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import model
from pipeline.blank import blank_copy
from pipeline.model import Towers

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Pairs of the two measurements: so many that what does not grow with them has no part in the peak.
SIZES = 128, 256


class Line(NamedTuple):
    """Bytes by the number of pairs."""

    fixed: float
    per_pair: float

    def at(self, pairs: int) -> float:
        return self.fixed + self.per_pair * pairs


class Activations(NamedTuple):
    """What the towers need beside their weights and gradients.

    Attributes:
        kept: by autograd between the forward and the backward pass; weights' copies in low precision are in it.
        passing: the most that is alive beside that at any time, such as a block that is being recomputed.
    """

    kept: Line
    passing: Line


def activations(towers: Towers, context_length: int, *, precision: str, device: str) -> Activations:
    """Measured on fake tensors; nothing is allocated, and the towers stay as they are.

    A backward pass on a CUDA device needs one to be there, even without content. So what a forward pass keeps is
    measured as on `device`, what passes as on a CPU.
    """
    kept: list[float] = []
    passing: list[float] = []
    for pairs in SIZES:
        here = run_fake(towers, pairs, context_length, precision=precision, device="cpu")
        passing.append(here.peak - here.kept)
        there = here if device == "cpu" else None
        there = there or run_fake(towers, pairs, context_length, precision=precision, device=device, backward=False)
        kept.append(there.kept)
    return Activations(_line(kept), _line(passing))


def _line(found: list[float]) -> Line:
    (first, second), (low, high) = SIZES, found
    per_pair = (high - low) / (second - first)
    return Line(max(0.0, low - per_pair * first), per_pair)


class Run(NamedTuple):
    """Bytes of one run through the towers: kept for the backward pass, and the most alive, weights aside."""

    kept: float
    peak: float


def run_fake(
    towers: Towers, pairs: int, context_length: int, *, precision: str, device: str, backward: bool = True
) -> Run:
    """One forward and backward pass on fake tensors of a device."""
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        return run(_blank(towers, device, precision), pairs, context_length, precision=precision, backward=backward)


def run(towers: Towers, pairs: int, context_length: int, *, precision: str, backward: bool = True) -> Run:
    """One forward and backward pass, in training mode and with gradients in place, over tensors of any kind."""
    first = next(towers.parameters())
    device, dtype = first.device, first.dtype
    for parameter in towers.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    grads = [parameter.grad for parameter in towers.parameters()]
    held = {_key(value) for value in (*towers.parameters(), *towers.buffers(), *grads) if value is not None}
    kept, alive = _Kept(held), Alive(held)
    attention = _fused_attention() if device.type == "cuda" else contextlib.nullcontext()
    with torch.enable_grad(), alive, attention, _Unmasked():
        image_BCHW = torch.zeros(pairs, 3, *model.image_size(towers), dtype=dtype, device=device)
        token_BL = torch.zeros(pairs, context_length, dtype=torch.long, device=device)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack), autocast(device.type, precision):
            image_BD, text_BD, *_ = towers(image_BCHW, token_BL)
        del image_BCHW
        found = kept.bytes()
        if backward:
            total = image_BD.sum() + text_BD.sum()
            del image_BD, text_BD
            total.backward()
    return Run(found, alive.most)


def _blank(towers: Towers, device: str, precision: str) -> Towers:
    """A copy in training mode whose weights are fake tensors of that device."""

    def make(tensor: Tensor) -> Tensor:
        wide = torch.float64 if precision == "fp64" and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wide, device=device)

    return blank_copy(towers, make)


@contextlib.contextmanager
def autocast(device: str, precision: str) -> Iterator[None]:
    """torch.autocast, which for itself refuses a device that is not there."""
    if precision not in LOW:
        yield
        return
    former = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, LOW[precision])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, former[0])
        torch.set_autocast_dtype(device, former[1])


def _key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, as long as one of them is alive."""
    return tensor.untyped_storage()._cdata


class _Saved:
    """A tensor that autograd keeps; gone with the graph that asked for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Kept:
    """Hooks that see what autograd keeps, `held` aside."""

    def __init__(self, held: set[int]) -> None:
        self._held, self._saved = held, weakref.WeakSet[_Saved]()

    def pack(self, tensor: Tensor) -> _Saved:
        self._saved.add(saved := _Saved(tensor))
        return saved

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        return saved.tensor

    def bytes(self) -> int:
        """Of distinct memory."""
        found = {_key(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in self._saved}
        return sum(size for key, size in found.items() if key not in self._held)


class Alive(TorchDispatchMode):
    """Counts the memory that operations make and that is still referred to, `held` aside."""

    def __init__(self, held: set[int]) -> None:
        super().__init__()
        self._known, self._now, self.most = set(held), 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class _Unmasked(TorchFunctionMode):
    """Takes all rows where a mask picks some: how many those are is not known of a mask without content.

    (open_clip's Hugging Face towers leave one token out that way, from an output that nothing here uses.)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = args[0], tuple(slice(None) if _is_mask(index) else index for index in args[1])
        return func(*args, **(kwargs or {}))


def _is_mask(index: object) -> bool:
    return isinstance(index, FakeTensor) and index.dtype == torch.bool


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention that keeps no scores, as a CUDA device has it (flash or memory-efficient), and none here can choose."""
    functional, name = vars(F), "scaled_dot_product_attention"
    former, functional[name] = functional[name], _efficient_attention
    try:
        yield
    finally:
        functional[name] = former


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (side.to(torch.get_autocast_dtype("cuda")) for side in (query, key, value))
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal
    )[0]

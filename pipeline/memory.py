"""What a rank's device memory goes to: measured on tensors without content, before any device is asked for.

Weights, gradients and the optimizer are counted. Activations are measured: the towers run on fake tensors, which have
shapes and types but no numbers, at two batch sizes; what autograd keeps, and the most that is alive beside it in both
passes, are lines in the number of pairs. The loss follows from its tiles.

Left out: the allocator's fragmentation (some per cent), cuDNN's and cuBLAS's workspaces, the CUDA context (half a
gigabyte), NCCL's buffers, evaluation, what torch.compile saves, and with fsdp2 the layer that is gathered just now. DDP
has no copy of the gradients beside its buckets, as they are views of them (gradient_as_bucket_view). Gradients are
counted in full beside all activations: over several ranks they are; on one they come as activations go, so that the
sum is too high by the smaller of the two at most.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import model
from pipeline.loss.tiles import CPU_TILE, TILE
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


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: parameters and buffers.
        gradients: of what is trained.
        optimizer: AdamW's two moments.
        average: the moving average of the weights.
        batches: the batch in use, and the next one.
        features: those of all of the rank's pairs and their gradients, which a micro-batch wants kept.
        activations: of the towers.
        loss: the most that it needs, features of all ranks included.
        pairs: of this rank.
        micro_batch: pairs that go through the towers at a time; None for all.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    batches: float
    features: float
    activations: Activations
    loss: float
    pairs: int
    micro_batch: int | None

    @property
    def at_a_time(self) -> int:
        """Pairs in the towers."""
        return min(self.micro_batch or self.pairs, self.pairs)

    def parts(self) -> dict[str, float]:
        """What takes memory → bytes; the last three are not all at their peak together."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer (AdamW's two moments)": self.optimizer,
            "average of the weights": self.average,
            "input batches, uint8": self.batches,
            "features of all micro-batches": self.features if self.at_a_time < self.pairs else 0.0,
            "activations that are kept": self.activations.kept.at(self.at_a_time),
            "activations that pass": self.activations.passing.at(self.at_a_time),
            "loss": self.loss,
        }

    @property
    def peak(self) -> float:
        """The most at a time: the loss is computed beside all activations, or between two passes over micro-batches."""
        *always, kept, passing, loss = self.parts().values()
        return sum(always) + (max(kept + passing, loss) if self.at_a_time < self.pairs else kept + max(passing, loss))

    def largest_micro_batch(self, capacity: float) -> int:
        """Pairs at a time that fit into so many bytes: all of the rank's, or fewer; 0 where not even one does."""

        def fits(pairs: int) -> bool:
            return dataclasses.replace(self, micro_batch=pairs).peak <= capacity

        if fits(self.pairs):
            return self.pairs
        low, high = 0, self.pairs
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def of_towers(
    towers: Towers,
    *,
    width: int,
    context_length: int,
    precision: str,
    pairs: int,
    world: int = 1,
    micro_batch: int | None = None,
    average: bool = False,
    sharded: bool = False,
    tile: int | None = None,
    device: str = "cuda",
) -> Memory:
    """The memory of a rank.

    Args:
        towers: as they will be trained, locked and with activation checkpointing or not; they may be on `meta`.
        width: of the embeddings.
        context_length: tokens of a text.
        precision: fp32, bf16, fp16 or fp64.
        pairs: of this rank.
        world: ranks.
        micro_batch: pairs that go through the towers at a time; None for all.
        average: whether a moving average of the weights is kept.
        sharded: whether weights, gradients and optimizer are cut over ranks (FSDP2).
        tile: of the loss; None for the device's default.
        device: the type of the device to be trained on, cuda or cpu; it need not be there.
    """
    size = 8 if precision == "fp64" else 4
    share = world if sharded else 1
    weights = sum(value.numel() * size for value in (*towers.parameters(), *towers.buffers())) / share
    gradients = sum(value.numel() * size for value in towers.parameters() if value.requires_grad) / share
    height, across = model.image_size(towers)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=2 * gradients,
        average=weights if average else 0.0,
        batches=2 * pairs * (3 * height * across + 8 * context_length),
        features=2 * 2 * pairs * width * size,
        activations=activations(towers, context_length, precision=precision, device=device),
        loss=loss_bytes(pairs, pairs * world, width, precision=precision, tile=tile, device=device),
        pairs=pairs,
        micro_batch=micro_batch,
    )


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
    image_BCHW = torch.zeros(pairs, 3, *model.image_size(towers), dtype=dtype, device=device)
    token_BL = torch.zeros(pairs, context_length, dtype=torch.long, device=device)
    grads = [parameter.grad for parameter in towers.parameters()]
    held = {_key(value) for value in (*towers.parameters(), *towers.buffers(), *grads) if value is not None}
    kept, alive = _Kept(held), _Alive(held)
    attention = _fused_attention() if device.type == "cuda" else contextlib.nullcontext()
    with torch.enable_grad(), alive, attention, _Unmasked():
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack), _autocast(device.type, precision):
            image_BD, text_BD, *_ = towers(image_BCHW, token_BL)
        del image_BCHW
        found = kept.bytes()
        if backward:
            total = image_BD.sum() + text_BD.sum()
            del image_BD, text_BD
            total.backward()
    return Run(found, alive.most)


def loss_bytes(pairs: int, every: int, width: int, *, precision: str, tile: int | None, device: str) -> float:
    """What pipeline.loss needs at its peak, in the backward pass.

    Args:
        pairs: of this rank.
        every: pairs of all ranks.
        width: of the embeddings.
        precision: fp32, bf16, fp16 or fp64.
        tile: rows and columns of logits at a time; None for the device's default.
        device: cuda or cpu.
    """
    wide, low = 8 if precision == "fp64" else 4, 2 if precision == "bf16" else 0
    tile = tile or (CPU_TILE if device == "cpu" else TILE)
    rows, columns = min(pairs, tile), min(every, tile)
    gathered = 2 * every * width * (low or wide) if every > pairs else 0
    own = 2 * pairs * width * low
    pulls = 2 * pairs * width * wide + rows * width * wide
    # A tile's logits and weights; in bfloat16 the weights' copy too, which a CPU widens again.
    logits = rows * columns * (2 * wide + (low + (wide if device == "cpu" else 0) if low else 0))
    return gathered + own + pulls + logits


def open_clip_loss_bytes(pairs: int, every: int, width: int, *, precision: str) -> float:
    """What open_clip's ClipLoss (local_loss, gather_with_grad) needs in its forward pass, features of all included."""
    with FakeTensorMode(), torch.enable_grad():
        image_BD, text_BD = (torch.zeros(pairs, width, device="cuda", requires_grad=True) for _ in range(2))
        scale, alive = torch.ones((), device="cuda", requires_grad=True), _Alive(set())
        with alive, _autocast("cuda", precision):
            sides = [(image_BD, text_BD), (text_BD, image_BD)]
            gathered = [other.new_zeros(every, width) if every > pairs else other for _, other in sides]
            label_B = torch.arange(pairs, device="cuda")
            logits = [scale * own @ other.T for (own, _), other in zip(sides, gathered, strict=True)]
            total = sum(F.cross_entropy(logit_BN, label_B) for logit_BN in logits)
        del total
    return alive.most


def _blank(towers: Towers, device: str, precision: str) -> Towers:
    """A copy in training mode whose weights are fake tensors of that device."""
    memo: dict[int, Any] = {}
    for tensor in (*towers.parameters(), *towers.buffers()):
        wide = torch.float64 if precision == "fp64" and tensor.is_floating_point() else tensor.dtype
        blank = torch.empty(tensor.shape, dtype=wide, device=device)
        # deepcopy takes a tensor that it finds in its memo instead of copying one.
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return copy.deepcopy(towers, memo).train()


@contextlib.contextmanager
def _autocast(device: str, precision: str) -> Iterator[None]:
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


class _Alive(TorchDispatchMode):
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
    former, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _efficient_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = former


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

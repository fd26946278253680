"""What a rank's device memory goes to, which part of it dominates, and how many pairs at a time fit.

Weights, gradients and the optimizer are counted, activations measured (pipeline.activations), and the loss follows from
its tiles.

Left out: the allocator's fragmentation (some per cent), cuDNN's and cuBLAS's workspaces, the CUDA context (half a
gigabyte), NCCL's buffers, evaluation, what torch.compile saves, and with fsdp2 the layer that is gathered just now. DDP
has no copy of the gradients beside its buckets, as they are views of them (gradient_as_bucket_view). Gradients are
counted in full beside all activations: over several ranks they are; on one they come as activations go, so that the
sum is too high by the smaller of the two at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Group, RenderableType
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import begin, model
from pipeline.activations import Activations, Alive, activations, autocast
from pipeline.config import Recipe
from pipeline.loss.tiles import CPU_TILE, TILE
from pipeline.model import ModelError, Towers

# GB of common devices.
GPUS = 24.0, 40.0, 80.0


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
    own, side = 2 * pairs * width * low, pairs * width * wide
    # A tile's logits and weights; in bfloat16 the weights' copy too, which a CPU widens again.
    logits = rows * columns * (2 * wide + (low + (wide if device == "cpu" else 0) if low else 0))
    # Sums of both sides grow while there are tiles; then gradients are made of them.
    return gathered + own + max(2 * side + rows * width * wide + logits, 5 * side)


def open_clip_loss_bytes(pairs: int, every: int, width: int, *, precision: str) -> float:
    """What open_clip's ClipLoss (local_loss, gather_with_grad) needs in its forward pass, features of all included."""
    with FakeTensorMode(), torch.enable_grad():
        image_BD, text_BD = (torch.zeros(pairs, width, device="cuda", requires_grad=True) for _ in range(2))
        scale, alive = torch.ones((), device="cuda", requires_grad=True), Alive(set())
        with alive, autocast("cuda", precision):
            sides = [(image_BD, text_BD), (text_BD, image_BD)]
            gathered = [other.new_zeros(every, width) if every > pairs else other for _, other in sides]
            label_B = torch.arange(pairs, device="cuda")
            logits = [scale * own @ other.T for (own, _), other in zip(sides, gathered, strict=True)]
            total = sum(F.cross_entropy(logit_BN, label_B) for logit_BN in logits)
        del total
    return alive.most


def of_recipe(recipe: Recipe, world: int, model_cfg: dict[str, Any] | None = None) -> Memory:
    """The memory of one of `world` ranks; `model_cfg` where it is not the recipe's own (of a run that has begun).

    Raises:
        ModelError: a model that cannot be built, or not be trained as the recipe says.
    """
    model_cfg = model_cfg or model.model_cfg(recipe.model.name, recipe.model.config)
    device = "cpu" if recipe.train.device == "cpu" else "cuda"
    return of_towers(
        towers_without_numbers(recipe, model_cfg),
        width=int(model_cfg["embed_dim"]),
        context_length=int(model_cfg["text_cfg"].get("context_length", 77)),
        precision=recipe.train.precision,
        pairs=-(-recipe.train.batch_size // world),
        world=world,
        micro_batch=recipe.train.micro_batch_size,
        average=recipe.optim.ema is not None,
        sharded=recipe.train.sharding == "fsdp2",
        tile=recipe.loss.tile,
        device=device,
    )


def towers_without_numbers(recipe: Recipe, model_cfg: dict[str, Any]) -> Towers:
    """The recipe's towers on `meta`, at once; on the CPU where they compute as they are built.

    Raises:
        ModelError: as begin.make_towers.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return begin.make_towers(recipe, model_cfg, pretrained=False)
        except ModelError as error:
            if not isinstance(error.__cause__, (RuntimeError, NotImplementedError)):
                raise
            return begin.make_towers(recipe, model_cfg, pretrained=False)


def report(recipe: Recipe, world: int, gpu_gb: Sequence[float] = ()) -> RenderableType:
    """Tables of what takes memory on a rank, and of how many pairs at a time fit.

    Args:
        recipe: the run's.
        world: ranks.
        gpu_gb: 10⁹ bytes of devices to look at; none for this machine's GPU, or some common ones.

    Raises:
        ModelError: as of_recipe.
    """
    switch = recipe.model.activation_checkpointing
    by_switch: dict[bool, Memory | None] = {switch: (memory := of_recipe(recipe, world)), not switch: None}
    changed = recipe.model.model_copy(update={"activation_checkpointing": not switch})
    with contextlib.suppress(ModelError):  # towers that cannot do it
        by_switch[not switch] = of_recipe(recipe.model_copy(update={"model": changed}), world)

    parts = Table(f"a rank of {world}, {memory.at_a_time} of {memory.pairs} pairs at a time", box=None)
    parts.add_column("GB", justify="right")
    parts.add_column("of the peak", justify="right")
    for name, size in memory.parts().items():
        parts.add_row(name, f"{size / 1e9:.3g}", f"{size / memory.peak:.0%}")
    parts.add_row("at the peak", f"{memory.peak / 1e9:.3g}", "", style="bold")
    largest = max(memory.parts(), key=lambda name: memory.parts()[name])
    width = int(model.model_cfg(recipe.model.name, recipe.model.config)["embed_dim"])
    theirs = open_clip_loss_bytes(memory.pairs, memory.pairs * world, width, precision=recipe.train.precision)

    fit = Table("GPU, GB", "largest micro-batch that fits", "with activation checkpointing", box=None)
    for size in gpu_gb or this_gpu_gb() or GPUS:
        found = [by_switch[value] for value in (False, True)]
        fit.add_row(f"{size:g}", *(_largest(one, size * 1e9) for one in found))
    kept, passing = (line.per_pair / 1e6 for line in memory.activations)
    return Group(
        parts,
        f"\nMost goes to: {largest}. A pair more at a time takes {kept:.1f} MB, and {passing:.1f} MB in passing.",
        f"open_clip's loss would take {theirs / 1e9:.3g} GB at least (local_loss, gather_with_grad).\n",
        fit,
    )


def this_gpu_gb() -> list[float]:
    """10⁹ bytes of this machine's GPU, if it has one."""
    return [torch.cuda.get_device_properties(0).total_memory / 1e9] if torch.cuda.is_available() else []


def _largest(memory: Memory | None, capacity: float) -> str:
    if memory is None:
        return "not with these towers"
    pairs = memory.largest_micro_batch(capacity)
    return "not one pair" if not pairs else f"all {pairs}" if pairs == memory.pairs else str(pairs)

"""Checkpoints of sharded training (FSDP2): each rank writes its part, and the whole is published or nothing is.

RUN/checkpoints/step-00001000/ shard-….safetensors (one a rank)  state.json  CHECKSUMS.json (last)

torch.distributed.checkpoint writes and reads them, in its safetensors form: its own form has a pickle in it, which may
run code when it is read. Any number of ranks reads what any other has written, and so does training whose weights are
whole, and the other way round: the optimizer's groups are saved as those of a model that was never cut.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline import checkpoint as checkpoints
from pipeline import exchange
from pipeline.checkpoint import AVERAGE as EMA
from pipeline.checkpoint import STATE, Checkpoint, CheckpointError, folder_name
from pipeline.checkpoint_writer import Writer

# What is in the shards, by the first part of its name, and in state.json where it is no tensor.
MODEL, AVERAGE, OPTIMIZER, GROUPS = "model.", "average.", "optimizer.", "optimizer_groups"


def save_sharded(
    run: Path,
    step: int,
    towers: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    writer: Writer | None,
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model whose weights are cut over ranks, and point LATEST to it; the rest is as for whole checkpoints.

    Where one rank cannot write its part, nothing is published.

    Args:
        run: the run folder, one for all ranks.
        step: optimizer steps done.
        towers: after fully_shard.
        optimizer: of their parameters.
        state: as in Checkpoint; rank 0's counts.
        writer: the main rank's, which sees to the best, to old checkpoints and to the copy; None on the others.
        average: the moving average of the weights, cut as they are.

    Raises:
        TrainingError: a rank could not write, on every rank.

    Collective: every rank calls it.
    """
    tensors, groups = _content(towers, optimizer, average)
    groups = _uncut(groups, tensors)
    folder = exchange.from_main(lambda: checkpoints.new_folder(run, step))
    try:
        exchange.together(lambda: _write(tensors, folder))
        exchange.from_main(lambda: _publish(folder, {"step": step, **state, GROUPS: groups}))
    except BaseException:
        if _is_main():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    exchange.from_main(lambda: _tell(writer, step) if writer else None)
    return folder


def _tell(writer: Writer, step: int) -> None:
    writer.wait()  # it may be at work on the checkpoint that the run went on from
    writer.published(step)


def _publish(folder: Path, state: dict[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    checkpoints.finish(folder, sorted(path.name for path in folder.iterdir()))


def load_sharded(
    run: Path,
    step: int,
    towers: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    average: Mapping[str, Tensor] | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Bring a sharded checkpoint into a model, its optimizer and the average of its weights, in place.

    Args:
        run: the run folder.
        step: the checkpoint's.
        towers: after fully_shard.
        optimizer: of their parameters.
        average: the moving average of the weights, cut as they are; the weights themselves where none was saved.
        verify: hash its files first; false where that has just been done.

    Returns:
        The `state` that was saved.

    Raises:
        CheckpointError: a file is missing or its hash differs, or what is saved is of another model; on every rank.
            (One that was saved whole will do.)

    Collective: every rank calls it.
    """
    folder = run / "checkpoints" / folder_name(step)
    state = exchange.from_main(lambda: _state(folder, verify))
    sharded = state.pop(GROUPS, None) is not None
    averaged = exchange.from_main(
        lambda: any(name.startswith(AVERAGE) for name in _metadata(folder)) if sharded else (folder / EMA).exists()
    )
    tensors, groups = _content(towers, optimizer, average if averaged else None)
    if sharded:
        exchange.together(lambda: _read(tensors, folder, no_dist=False))
    else:
        exchange.together(lambda: _cut(checkpoints.load(run, step), tensors, _uncut(groups, tensors)))
    weights: dict[str, Any] = dict(_under(MODEL, tensors))
    set_model_state_dict(towers, weights)
    set_optimizer_state_dict(towers, optimizer, {"state": _moments(tensors), "param_groups": groups})
    if average and not averaged:
        for name, tensor in average.items():
            tensor.copy_(tensors[f"{MODEL}{name}"])
    return state


def join(folder: Path) -> Checkpoint:
    """A sharded checkpoint as one that was never cut, in this machine's memory; of verified files, by this process.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with checkpoints.reading(folder):
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        groups = _groups(state)
        tensors = {
            name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in _metadata(folder).items()
        }
        _read(tensors, folder, no_dist=True)
        # torch numbers parameters in the order of its groups.
        numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
        optimizer = {
            "state": {numbers[name]: moments for name, moments in _moments(tensors).items()},
            "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
        }
    return Checkpoint(state["step"], _under(MODEL, tensors), optimizer, state, _under(AVERAGE, tensors) or None)


def _content(
    towers: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """All tensors by what they are, and the optimizer's groups, their parameters by name."""
    saved: dict[str, Any] = dict(get_optimizer_state_dict(towers, optimizer))
    weights: dict[str, Any] = get_model_state_dict(towers)
    tensors: dict[str, Tensor] = {f"{MODEL}{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"{AVERAGE}{name}": tensor for name, tensor in (average or {}).items()}
    for name, moments in saved["state"].items():
        tensors |= {f"{OPTIMIZER}{name}.{key}": tensor for key, tensor in moments.items()}
    return tensors, saved["param_groups"]


def _uncut(groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The optimizer's groups without sharding.apart's division: those of one name together, in the model's order."""
    order = {name: number for number, name in enumerate(_under(MODEL, tensors))}
    found: dict[Any, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        whole = found.setdefault(group.get("name", number), {**group, "params": []})
        whole["params"] = sorted([*whole["params"], *group["params"]], key=order.__getitem__)
    return list(found.values())


def _cut(saved: Checkpoint, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Copy this rank's parts of a checkpoint that was saved whole.

    Raises:
        CheckpointError: it is of another model.
    """
    names = [name for group in groups for name in group["params"]]
    whole = {f"{MODEL}{name}": tensor for name, tensor in saved.model.items()}
    whole |= {f"{AVERAGE}{name}": tensor for name, tensor in (saved.average or {}).items()}
    for number, moments in saved.optimizer["state"].items():
        whole |= {f"{OPTIMIZER}{names[number]}.{key}": tensor for key, tensor in moments.items()}
    for name, part in tensors.items():
        if name not in whole or whole[name].shape != part.shape:
            raise CheckpointError(f"step {saved.step}: is of another model ({name} is missing, or of another shape).")
        if isinstance(part, DTensor):
            place = part.device_mesh, part.placements
            part.copy_(distribute_tensor(whole[name].to(part.device), *place, src_data_rank=None))
        else:
            part.copy_(whole[name])


def _metadata(folder: Path) -> dict[str, Any]:
    """What is known of each saved tensor, by its name."""
    with checkpoints.reading(folder):
        return dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _moments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameter name → the optimizer's tensors of it, by what they are."""
    found: dict[str, Any] = {}
    for place, tensor in _under(OPTIMIZER, tensors).items():
        name, _, key = place.rpartition(".")
        found.setdefault(name, {})[key] = tensor
    return found


def _groups(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The optimizer's groups, taken out of a saved state."""
    groups: list[dict[str, Any]] = state.pop(GROUPS)
    # JSON knows no tuples.
    return [{key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in groups]


def _state(folder: Path, verify: bool) -> dict[str, Any]:
    if verify:
        checkpoints.verify(folder)
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # no Exception: it would pass by whatever tells the other ranks
        raise OSError(f"{folder}: could not be written ({_first(error)}).") from error


def _read(tensors: dict[str, Tensor], folder: Path, *, no_dist: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: cannot be read, or is of another model ({_first(error)}).") from error


def _first(error: CheckpointException) -> str:
    """What the first of the failing ranks met."""
    rank, (met, _) = next(iter(sorted(error.failures.items())))
    return f"rank {rank}: {type(met).__name__}: {met}"


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0

"""Checkpoints of sharded training: equal to those of one process, whatever the number of ranks, or not there."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline import checkpoint as checkpoints
from pipeline import checkpoint_sharded
from pipeline.checkpoint import CheckpointError
from pipeline.checkpoint_copy import fetch_copy
from pipeline.checkpoint_sharded import load_sharded, save_sharded
from pipeline.checkpoint_writer import Writer
from pipeline.failure import TrainingError
from tests.processes import run_ranks

STEPS = 3
STATE = {"stream": {"epoch": 1}, "metrics": {"loss": 0.5}}


class Tiny(nn.Module):
    """Widths that no number of ranks divides, a scalar apart from the layers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.arange(3.0))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * self.second(self.first(value).relu()) + self.mean


def make(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": decayed}], lr=0.01, betas=(0.9, 0.98))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same batch on every rank, so that one process computes the same."""
    for step in steps:
        value = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(value).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model: nn.Module, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    return model


def average_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() / 2 for name, tensor in model.state_dict().items()}


def writer_of(rank: int, run: Path, **options: str) -> Writer | None:
    return Writer(run, keep=2, **options) if rank == 0 else None


def save(rank: int, world: int, run: Path) -> None:
    model = shard(make(), world)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(STEPS))
    save_sharded(run, STEPS, model, optimizer, STATE, writer=writer_of(rank, run), average=average_of(model))


def resume(rank: int, world: int, run: Path) -> dict[str, list]:
    """Load into a model that began otherwise, train on, and give its full weights."""
    model = shard(make(seed=1), world)
    optimizer = optimizer_of(model)
    average = average_of(model)
    state = load_sharded(run, STEPS, model, optimizer, average=average)
    assert state == {"step": STEPS, **STATE}
    halves = {name: tensor.detach() / 2 for name, tensor in model.state_dict().items()}
    for name, tensor in average.items():
        assert torch.equal(full(tensor), full(halves[name]))
    train(model, optimizer, range(STEPS, 2 * STEPS))
    return {name: full(tensor).tolist() for name, tensor in model.state_dict().items()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose two ranks have saved step 3."""
    root = tmp_path_factory.mktemp("run")
    run_ranks(2, save, root)
    return root


def straight(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(steps))
    return model, optimizer


def test_joined_it_is_what_one_process_would_have_saved(run):
    model, optimizer = straight(STEPS)
    for found in (checkpoints.load(run, STEPS), checkpoints.load_newest(run)):
        assert found.step == STEPS
        assert found.state == {"step": STEPS, **STATE}
        torch.testing.assert_close(found.model, dict(model.state_dict()))
        torch.testing.assert_close(found.average, average_of(model))
        expected = optimizer.state_dict()
        assert found.optimizer["param_groups"] == expected["param_groups"]
        torch.testing.assert_close(found.optimizer["state"], expected["state"])
    averaged = checkpoints.load(run, STEPS, weights_only=True, average=True)
    torch.testing.assert_close(averaged.model, average_of(model))
    assert averaged.optimizer == {}


def test_no_file_of_it_is_a_pickle(run):
    names = json.loads((run / "checkpoints/step-00000003/CHECKSUMS.json").read_text())
    assert sorted({Path(name).suffix for name in names}) == [".json", ".safetensors"]
    assert len(names) == 3
    assert sorted(path.name for path in (run / "checkpoints/step-00000003").iterdir()) == sorted(
        [*names, "CHECKSUMS.json"]
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_goes_on_from_it(run, world):
    model, _ = straight(2 * STEPS)
    for found in run_ranks(world, resume, run):
        weights = {name: torch.tensor(values) for name, values in found.items()}
        torch.testing.assert_close(weights, dict(model.state_dict()))


def test_one_process_goes_on_from_it(run):
    saved = checkpoints.load_newest(run)
    model = make(seed=1)
    optimizer = optimizer_of(model)
    model.load_state_dict(saved.model)
    optimizer.load_state_dict(saved.optimizer)
    train(model, optimizer, range(STEPS, 2 * STEPS))
    torch.testing.assert_close(dict(model.state_dict()), dict(straight(2 * STEPS)[0].state_dict()))


def save_five(rank: int, world: int, run: Path, copy: str) -> None:
    model = shard(make(), world)
    optimizer = optimizer_of(model)
    writer = writer_of(rank, run, keep_best="loss", copy_to=copy)
    with writer or contextlib.nullcontext():
        for step, loss in enumerate((0.5, 0.2, 0.4, 0.3, 0.6), 1):
            train(model, optimizer, range(step - 1, step))
            save_sharded(run, step, model, optimizer, {"metrics": {"loss": loss}}, writer=writer)


def test_the_best_is_kept_and_copied_with_the_newest(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run_ranks(2, save_five, run, str(copy))
    for root in (run / "checkpoints", copy):
        assert checkpoints.steps_in(root) == [5, 4, 2]
        assert ((root / "LATEST").read_text(), (root / "BEST").read_text()) == ("step-00000005", "step-00000002")
    shutil.rmtree(run)
    assert fetch_copy(run, str(copy)) == 5
    assert checkpoints.steps(run) == [5, 2]
    torch.testing.assert_close(checkpoints.load(run, 5).model, dict(straight(5)[0].state_dict()))


def save_with_one_failing(rank: int, world: int, run: Path, failing: int, where: str) -> str:
    """Save step 3; then, with a full disk on one rank, step 6."""
    model = shard(make(), world)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(STEPS))
    save_sharded(run, STEPS, model, optimizer, STATE, writer=writer_of(rank, run))
    if rank == failing:

        def full_disk(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        target, name = {
            "shard": (checkpoint_sharded.HuggingFaceStorageWriter, "write_data"),
            "before": (checkpoint_sharded, "save"),
            "publish": (checkpoints, "sync"),
        }[where]
        setattr(target, name, full_disk)
    if where == "before":  # the others would wait in torch's own collectives for a rank that has left
        checkpoint_sharded.save = checkpoint_sharded.save if rank == failing else lambda *_, **__: None
    train(model, optimizer, range(STEPS, 2 * STEPS))
    try:
        save_sharded(run, 2 * STEPS, model, optimizer, STATE, writer=writer_of(rank, run))
    except TrainingError as error:
        return str(error)
    return "published"


@pytest.mark.parametrize(("failing", "where"), [(0, "shard"), (1, "shard"), (1, "before"), (0, "publish")])
def test_where_one_rank_cannot_write_nothing_is_published(tmp_path, failing, where):
    told = run_ranks(2, save_with_one_failing, tmp_path, failing, where)
    assert all("No space left on device" in message for message in told)
    assert checkpoints.load_newest(tmp_path).step == STEPS
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000003"]
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-00000003"


def load_another(rank: int, world: int, run: Path) -> str:
    model = make()
    model.second = nn.Linear(7, 4)
    shard(model, world)
    try:
        load_sharded(run, STEPS, model, optimizer_of(model))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_another_model_is_refused(run):
    for told in run_ranks(2, load_another, run):
        assert "step-00000003: cannot be read, or is of another model" in told


def test_a_damaged_shard_is_told_of(tmp_path):
    run_ranks(2, save, tmp_path)
    path = next((tmp_path / "checkpoints" / "step-00000003").glob("shard-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path.name}: its sha256"):
        checkpoints.load(tmp_path, STEPS)
    with pytest.raises(AssertionError, match="its sha256 is not the one"):
        run_ranks(2, resume, tmp_path)

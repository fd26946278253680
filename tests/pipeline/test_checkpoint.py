"""Checkpoints: whole or not there, whatever happens to their files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint import Checkpoint, CheckpointError

FILES = ("model.safetensors", "optimizer.pt", "ema.safetensors", "state.json", "CHECKSUMS.json")


def make(
    step: int, metrics: dict[str, float | None] | None = None, *, size: int = 3, average: bool = True
) -> Checkpoint:
    """A checkpoint whose weights, their average and the optimizer's state tell its step."""
    weight = torch.nn.Parameter(torch.full((size, 2), float(step)))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.full_like(weight, float(step))
    optimizer.step()
    with torch.no_grad():
        weight.fill_(step)
    mean = {"weight": torch.full((size, 2), step / 2)} if average else None
    state = {"stream": {"epoch": 1}, "metrics": metrics or {}}
    return Checkpoint(step, {"weight": weight}, optimizer.state_dict(), state, mean)


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish a checkpoint and remove old ones, as a Writer does; its folder."""
    folder = checkpoints.publish(run, checkpoint)
    checkpoints.purge(run, keep, known={checkpoint.step: True})
    return folder


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    """Equal to the bit."""
    assert one.step == other.step
    assert torch.equal(one.model["weight"], other.model["weight"])
    assert torch.equal(one.average["weight"], other.average["weight"])
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(one.optimizer["state"][0][name], other.optimizer["state"][0][name])
    assert one.optimizer["param_groups"] == other.optimizer["param_groups"]
    assert other.state == {"step": other.step, **one.state}


def test_what_is_saved_is_loaded(tmp_path):
    saved = make(5)
    folder = save(tmp_path, saved, keep=2)
    loaded = checkpoints.load_newest(tmp_path)
    assert_same(saved, loaded)
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == folder.name == "step-00000005"


def test_the_average_may_be_loaded_in_place_of_the_weights(tmp_path):
    save(tmp_path, make(4), keep=2)
    weights = checkpoints.load(tmp_path, 4, weights_only=True)
    assert (float(weights.model["weight"][0, 0]), weights.optimizer, weights.average) == (4.0, {}, None)
    assert float(checkpoints.load(tmp_path, 4, weights_only=True, average=True).model["weight"][0, 0]) == 2.0


def test_an_average_that_was_not_kept_is_refused(tmp_path):
    save(tmp_path, make(4, average=False), keep=2)
    assert checkpoints.load(tmp_path, 4).average is None
    with pytest.raises(CheckpointError, match=r"optim\.ema was off"):
        checkpoints.load(tmp_path, 4, average=True)


def test_an_empty_run_has_none(tmp_path):
    assert checkpoints.load_newest(tmp_path) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog, name, damage):
    save(tmp_path, make(1), keep=3)
    path = save(tmp_path, make(2), keep=3) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    assert checkpoints.load_newest(tmp_path).step == 1
    if not (name == "CHECKSUMS.json" and damage == "missing"):  # then it never was a checkpoint
        assert "step-00000002" in caplog.text


@pytest.mark.parametrize("listed", ["{}", "[]", "null", '{"state.json": "0"}', '{"../LATEST": "0"}'])
def test_checksums_that_do_not_list_the_files_are_damaged(tmp_path, listed):
    """An empty table has nothing in it that could fail."""
    folder = save(tmp_path, make(1), keep=2)
    (folder / "CHECKSUMS.json").write_text(listed)
    with pytest.raises(CheckpointError):
        checkpoints.load(tmp_path, 1)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (save(tmp_path, make(step), keep=3) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 2"):
        checkpoints.load_newest(tmp_path)


def test_a_leftover_partial_folder_is_replaced(tmp_path):
    partial = tmp_path / "checkpoints" / "step-00000003"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps(tmp_path) == []
    save(tmp_path, make(3), keep=2)
    assert checkpoints.load_newest(tmp_path).step == 3


def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    for step in range(1, 6):
        save(tmp_path, make(step), keep=1)
    assert checkpoints.steps(tmp_path) == [5, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000005"]


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path, caplog):
    """Two that can be loaded stay, else one more fault would end the run."""
    for step in (1, 2, 3):
        folder = save(tmp_path, make(step), keep=3)
    (folder / "optimizer.pt").write_bytes(b"")
    save(tmp_path, make(4), keep=2)
    assert checkpoints.steps(tmp_path) == [4, 3, 2]
    assert "step-00000003" in caplog.text
    save(tmp_path, make(5), keep=2)
    assert checkpoints.steps(tmp_path) == [5, 4]


def test_what_killed_runs_left_is_cleared_away(tmp_path):
    partial = tmp_path / "checkpoints" / "step-00000009"
    partial.mkdir(parents=True)
    (partial / "optimizer.pt").write_bytes(b"half")
    other = tmp_path / "checkpoints" / "step-of-mine"
    other.mkdir()
    save(tmp_path, make(1), keep=2)
    assert not partial.exists()
    assert other.exists()


def test_what_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save(tmp_path, make(step), keep=2)

    def busy(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", busy)
    save(tmp_path, make(3), keep=2)
    assert checkpoints.steps(tmp_path) == [3, 2]
    assert "step-00000001: the old checkpoint cannot be removed" in caplog.text


@pytest.mark.parametrize("failing", FILES)
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch, failing):
    save(tmp_path, make(1), keep=2)
    real = checkpoints.sync

    def sync(path):
        if path.name.startswith(failing) and "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(checkpoints, "sync", sync)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, make(2), keep=2)
    assert checkpoints.load_newest(tmp_path).step == 1
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-00000001"
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()  # it would take room


class Touch:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_not_executed(tmp_path):
    folder = save(tmp_path, make(1), keep=2)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Touch(tmp_path / "pwned")))
    sums = {name: checkpoints.sha256(folder / name) for name in FILES[:-1]}
    checkpoints.write_atomically(folder / "CHECKSUMS.json", str(sums).replace("'", '"'))
    with pytest.raises(CheckpointError, match="none of 1"):
        checkpoints.load_newest(tmp_path)
    assert not (tmp_path / "pwned").exists()

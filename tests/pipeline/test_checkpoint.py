"""Checkpoints: whole or not there, whatever happens to their files."""

from __future__ import annotations

import pickle

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint import Checkpoint, CheckpointError


def make(step: int) -> Checkpoint:
    weight = torch.nn.Parameter(torch.full((3, 2), float(step)))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return Checkpoint(step, {"weight": weight}, optimizer.state_dict(), {"stream": {"epoch": 1}})


def test_what_is_saved_is_loaded(tmp_path):
    saved = make(5)
    folder = checkpoints.save(tmp_path, saved, keep=2)
    loaded = checkpoints.load_newest(tmp_path)
    assert loaded.step == 5
    assert torch.equal(loaded.model["weight"], saved.model["weight"])
    torch.testing.assert_close(loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"])
    assert loaded.state["stream"] == {"epoch": 1}
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == folder.name == "step-00000005"


def test_an_empty_run_has_none(tmp_path):
    assert checkpoints.load_newest(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "CHECKSUMS.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog, name, damage):
    checkpoints.save(tmp_path, make(1), keep=3)
    path = checkpoints.save(tmp_path, make(2), keep=3) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    assert checkpoints.load_newest(tmp_path).step == 1
    if not (name == "CHECKSUMS.json" and damage == "missing"):  # then it never was a checkpoint
        assert "step-00000002" in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (checkpoints.save(tmp_path, make(step), keep=3) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 2"):
        checkpoints.load_newest(tmp_path)


def test_a_leftover_partial_folder_is_replaced(tmp_path):
    partial = tmp_path / "checkpoints" / "step-00000003"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps(tmp_path) == []
    checkpoints.save(tmp_path, make(3), keep=2)
    assert checkpoints.load_newest(tmp_path).step == 3


def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    for step in range(1, 6):
        checkpoints.save(tmp_path, make(step), keep=1)
    assert checkpoints.steps(tmp_path) == [5, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("failing", ["model.safetensors", "optimizer.pt", "state.json", "CHECKSUMS.json"])
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch, failing):
    checkpoints.save(tmp_path, make(1), keep=2)
    real = checkpoints._sync

    def sync(path):
        if path.name.startswith(failing) and "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(checkpoints, "_sync", sync)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, make(2), keep=2)
    assert checkpoints.load_newest(tmp_path).step == 1
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-00000001"


class Touch:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_not_executed(tmp_path):
    folder = checkpoints.save(tmp_path, make(1), keep=2)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Touch(tmp_path / "pwned")))
    sums = {name: checkpoints._sha256(folder / name) for name in ("model.safetensors", "optimizer.pt", "state.json")}
    checkpoints.write_atomically(folder / "CHECKSUMS.json", str(sums).replace("'", '"'))
    with pytest.raises(CheckpointError, match="none of 1"):
        checkpoints.load_newest(tmp_path)
    assert not (tmp_path / "pwned").exists()

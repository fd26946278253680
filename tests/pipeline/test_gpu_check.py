"""The checks for a GPU, run small on a CPU: each finds what it is for."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pipeline import gpu_check, gpu_paths, ranks
from pipeline.__main__ import main
from pipeline.failure import TrainingError
from pipeline.generated import write_pictures
from pipeline.gpu_bench import SIZES, Bench, Skipped

DIRECT = ["multiply", "loss", "memory and speed", "found_inf", "fsdp2", "loader"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-check")
    write_pictures(folder / "data", SIZES["cpu"].pictures, SIZES["cpu"].pixels)
    accelerator = ranks.start(processes=None, cpu=True, precision="bf16", timeout_s=60)
    yield Bench(accelerator.device, SIZES["cpu"], folder, accelerator)
    accelerator.state._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", DIRECT)
def test_what_lies_below_the_trainer_is_checked(bench, name):
    assert gpu_paths.CHECKS[name](bench)


def test_a_loss_that_is_off_is_found(bench, monkeypatch):
    right = gpu_paths.info_nce
    monkeypatch.setattr(gpu_paths, "info_nce", lambda *features: 1.001 * right(*features))
    with pytest.raises(TrainingError, match="off"):
        gpu_paths.loses_at_size(bench)


def test_sums_in_bfloat16_are_found(bench, monkeypatch):
    monkeypatch.setattr(gpu_paths, "multiply", lambda left, right: (left @ right).float())
    with pytest.raises(TrainingError, match="rounded"):
        gpu_paths.multiplies(bench)


def test_a_step_that_is_not_undone_is_found(bench, monkeypatch):
    class Deaf(torch.optim.AdamW):
        def step(self, *args):
            self.found_inf = None
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Deaf)
    with pytest.raises(TrainingError, match="was to be skipped"):
        gpu_paths.undoes_steps(bench)


def test_a_loss_that_does_not_fall_is_found():
    lines = [{"loss": 3.0, "skipped": 0, "samples_per_s": 1.0, "memory_mb": 1.0}] * 20
    with pytest.raises(TrainingError, match=r"3\.000 to 3\.000"):
        gpu_paths._fallen(lines)


def test_one_that_fails_hides_no_other(monkeypatch, tmp_path, capsys):
    def fails(bench: Bench) -> dict:
        raise RuntimeError("CUDA error: something")

    def skips(bench: Bench) -> dict:
        raise Skipped("none here")

    checks = {"one": fails, "two": lambda bench: {"figure": 1.5}, "three": skips}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    out = tmp_path / "found.json"
    assert main(["gpu-check", "--device", "cpu", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert found["torch"] == torch.__version__
    assert found["checks"]["one"]["error"] == "RuntimeError: CUDA error: something"
    assert found["checks"]["two"]["figures"] == {"figure": 1.5}
    assert found["checks"]["three"]["skipped"] == "none here"
    assert [result["ok"] for result in found["checks"].values()] == [False, True, True]
    assert "failed" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_told_and_the_rest_is_written(monkeypatch, tmp_path):
    out, found = tmp_path / "found.json", []

    def looks(bench: Bench) -> dict:
        found.append(json.loads(out.read_text())["checks"])
        object.__setattr__(bench, "end", 0.0)  # as if this check had taken all of the time
        return {}

    def never(bench: Bench) -> dict:
        raise AssertionError

    monkeypatch.setattr(gpu_check, "CHECKS", {"one": lambda bench: {"figure": 1.5}, "two": looks, "three": never})
    assert main(["gpu-check", "--device", "cpu", "--out", str(out)]) == 1
    assert found[0]["one"]["figures"] == {"figure": 1.5}
    last = json.loads(out.read_text())["checks"]
    assert last["two"]["ok"]
    assert last["three"] == {"ok": False, "skipped": "570 s are over", "seconds": 0.0}


def test_a_run_of_the_trainer_ends_with_the_time_that_there_is(bench):
    with pytest.raises(subprocess.TimeoutExpired):
        dataclasses.replace(bench, end=time.monotonic() + 0.1).train("late")


def test_without_a_device_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check", "--out", str(tmp_path / "found.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert main(["gpu-check", "--device", "tpu", "--out", str(tmp_path / "found.json")]) == 2
    assert not Path(tmp_path / "found.json").exists()


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUDGET_S", 3600)  # others may be at work here
    out = tmp_path / "found.json"
    assert main(["gpu-check", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["checks"]
    assert {name for name, result in found.items() if "skipped" in result} == {"train fp16", "resume fp16"}
    assert found["resume"]["figures"] == {"steps_bitwise_equal": 20}

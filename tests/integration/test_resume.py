"""A run that is killed and started again is the run that was never killed: same samples, same losses."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from pipeline.tracking import read_metrics
from tests.processes import kill_at_step, train

EXACT = ("step", "epoch", "samples_seen", "loss", "logit_scale", "lr", "grad_norm", "batch_sha256")


def history(run):
    return [{name: line[name] for name in EXACT} for line in read_metrics(run)]


def weights(run, step=15):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """15 undisturbed steps: two epochs of seven and one step more."""
    import yaml

    from tests.conftest import RECIPE

    folder = tmp_path_factory.mktemp("straight")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert train([str(folder / "recipe.yaml"), str(folder / "run"), "--data", str(dataset)]) == 0
    return folder / "run"


@pytest.fixture
def command(dataset, recipe, tmp_path):
    run = tmp_path / "run"
    return [str(recipe()), str(run), "--data", str(dataset)], run


def test_kill_9_three_times_in_a_row(straight, command):
    """Before the first checkpoint, within the first epoch, and just after the second begins."""
    arguments, run = command
    for step in (2, 6, 9):
        assert kill_at_step(arguments, run, step) == -signal.SIGKILL
    assert train(arguments) == 0
    assert history(run) == history(straight)
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(run)[name], tensor), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_asks_to_be_run_again(straight, command, number):
    arguments, run = command
    assert kill_at_step(arguments, run, 6, number) == 75
    verdict = json.loads((run / "exit.json").read_text())
    assert (verdict["status"], verdict["code"]) == ("requeue", 75)
    assert verdict["step"] == read_metrics(run)[-1]["step"] >= 6
    assert train(arguments) == 0
    assert history(run) == history(straight)
    assert json.loads((run / "exit.json").read_text())["status"] == "done"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_loader_processes_may_change(straight, command, workers):
    arguments, run = command
    kill_at_step(arguments, run, 9)  # the checkpoint of step 4 is whole before that of step 8 is begun
    assert train([*arguments, f"data.workers={workers}"]) == 0
    assert history(run) == history(straight)


def test_a_run_that_comes_back_from_its_copy_has_all_of_its_history(straight, command, tmp_path):
    arguments, run = command
    arguments = [*arguments, f"checkpoint.copy_to={tmp_path / 'copy'}"]
    assert kill_at_step(arguments, run, 6, signal.SIGTERM) == 75
    with (tmp_path / "copy" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99}\n{"step":')  # as where it was copied later than the checkpoint
    shutil.rmtree(run)
    assert train(arguments) == 0
    assert history(run) == history(straight)


def test_a_longer_run_goes_on_from_a_finished_one(command):
    arguments, run = command
    constant = [*arguments, "optim.schedule=constant"]
    assert train([*constant, "train.steps=6"]) == 0
    assert train([*constant, "train.steps=10"]) == 0
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 11))


def test_a_damaged_newest_checkpoint_costs_its_steps_only(straight, command):
    arguments, run = command
    kill_at_step(arguments, run, 9)
    newest = sorted((run / "checkpoints").glob("step-*/model.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert train(arguments) == 0
    assert history(run) == history(straight)


def test_other_settings_or_data_are_refused(command, dataset, tmp_path):
    arguments, run = command

    def refusal(setting):
        assert train([*arguments, setting]) == 2
        verdict = json.loads((run / "exit.json").read_text())
        assert verdict["status"] == "failed"
        return verdict["reason"]

    kill_at_step(arguments, run, 9)  # the checkpoint of step 4 is whole before that of step 8 is begun
    assert "seed: 3 -> 4" in refusal("seed=4")
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    shard = sorted((other / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    assert shard.name in refusal(f"data.datasets={other}")

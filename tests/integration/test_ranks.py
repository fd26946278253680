"""Several processes give the batches, losses and weights of one, and refuse to be fewer than asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint as checkpoints
from pipeline.tracking import read_metrics
from tests.processes import train


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The same six steps at world sizes 1, 2 and 3; ten pairs do not divide by three."""
    import yaml

    from tests.conftest import RECIPE

    folder = tmp_path_factory.mktemp("ranks")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for world in (1, 2, 3):
        arguments = [str(folder / "recipe.yaml"), str(folder / str(world)), "--data", str(dataset)]
        assert train([*arguments, "train.steps=6", f"train.processes={world}"], world=world) == 0
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_losses_and_gradients_equal_one_process(runs, world):
    one, several = read_metrics(runs / "1"), read_metrics(runs / str(world))
    assert [line["batch_sha256"] for line in one] == [line["batch_sha256"] for line in several]
    assert several[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert several[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for before, after in zip(one, several, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    final = [load_file(runs / name / "checkpoints/step-00000006/model.safetensors") for name in ("1", str(world))]
    for name, tensor in final[0].items():
        torch.testing.assert_close(final[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_may_go_on_with_another_number_of_ranks(runs, dataset):
    arguments = [str(runs / "recipe.yaml"), str(runs / "2"), "--data", str(dataset)]
    assert train([*arguments, "train.steps=8", "train.processes=3"], world=3) == 0
    assert train([str(runs / "recipe.yaml"), str(runs / "1"), "--data", str(dataset), "train.steps=8"]) == 0
    hashes = [[line["batch_sha256"] for line in read_metrics(runs / name)] for name in ("1", "2")]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 8


def test_fewer_processes_than_asked_for_are_refused(recipe, dataset, tmp_path):
    arguments = [str(recipe()), str(tmp_path / "run"), "--data", str(dataset)]
    assert train([*arguments, "train.processes=2"]) == 2
    verdict = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert verdict["code"] == 2
    assert "train.processes = 2, but 1 are running" in verdict["reason"]


def test_a_launcher_that_starts_only_one_process_is_noticed(recipe, dataset, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    trainer = ["pipeline", "train", str(recipe()), str(tmp_path / "run"), "--data", str(dataset)]
    done = subprocess.run([*launcher, *trainer], capture_output=True, text=True, env={**os.environ})
    assert done.returncode != 0
    assert "started a single process" in done.stderr


@pytest.mark.slow
def test_accelerate_launches_two_processes(recipe, dataset, tmp_path, runs):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    trainer = ["pipeline", "train", str(recipe()), str(tmp_path / "run"), "--data", str(dataset)]
    done = subprocess.run(
        [*launcher, *trainer, "train.steps=2", "train.processes=2"], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [line["batch_sha256"] for line in read_metrics(runs / "1")[:2]]
    assert [line["batch_sha256"] for line in read_metrics(tmp_path / "run")] == expected


def test_launch_submit_runs_two_processes_and_keeps_the_exit_code(recipe, dataset, tmp_path, runs):
    from launch.__main__ import main

    command = ["submit", "--recipe", str(recipe()), "--data", str(dataset), "--run", str(tmp_path / "run")]
    assert main([*command, "--processes", "2", "train.steps=2"]) == 0
    expected = [line["batch_sha256"] for line in read_metrics(runs / "2")[:2]]
    assert [line["batch_sha256"] for line in read_metrics(tmp_path / "run")] == expected
    assert main([*command, "--processes", "2", "seed=9"]) == 2


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, ["train.sharding=fsdp2"]),
        (3, ["train.sharding=fsdp2", "optim.ema=0.9"]),
        (5, ["train.micro_batch_size=1"]),
        (3, ["train.micro_batch_size=3"]),
        (3, ["train.micro_batch_size=3", "train.sharding=fsdp2"]),
    ],
)
def test_losses_of_several_ranks_are_those_of_one_in_float64(dataset, recipe, tmp_path, world, settings):
    """Weights on each rank or cut over all, batches whole or in parts; 10 pairs divide by 5 only, so
    that of three ranks one has 4 and two have 3."""
    arguments = ["--data", str(dataset), "train.steps=6", "train.precision=fp64"]
    assert train([str(recipe()), str(tmp_path / "one"), *arguments]) == 0
    assert train([str(recipe()), str(tmp_path / "several"), *arguments, *settings], world=world) == 0
    one, several = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "several")
    for name in ("loss", "grad_norm", "logit_scale"):
        found, expected = ([line[name] for line in lines] for lines in (several, one))
        assert found == pytest.approx(expected, rel=1e-10), name


def test_a_sharded_run_goes_on_to_the_bit_and_loads_whole(dataset, recipe, tmp_path):
    from pipeline import trained

    settings = ["--data", str(dataset), "train.sharding=fsdp2", "optim.ema=0.9"]
    histories = []
    for name, lengths in (("straight", (8,)), ("resumed", (3, 8))):
        for steps in lengths:
            changes = [f"train.steps={steps}", "optim.schedule=constant"]
            assert train([str(recipe()), str(tmp_path / name), *settings, *changes], world=2) == 0
        histories.append([(line["loss"], line["batch_sha256"]) for line in read_metrics(tmp_path / name)])
    assert histories[0] == histories[1]
    whole = [trained.load(tmp_path / name).towers.state_dict() for name in ("straight", "resumed")]
    for name, tensor in whole[0].items():
        assert torch.equal(whole[1][name], tensor), name


def slow_copy(rank):
    from pipeline import checkpoint_copy

    inner = checkpoint_copy._put

    def put(*places):
        time.sleep(2)
        inner(*places)

    checkpoint_copy._put = put


@pytest.mark.slow
def test_a_copy_that_takes_longer_than_ranks_wait_for_each_other_fails_no_run(dataset, recipe, tmp_path):
    """Seven files at two seconds each, where a rank waits for five; then again, into a copy of a run that is done."""
    path, copies = recipe(train={"steps": 2, "timeout_s": 5}), (tmp_path / "copy", tmp_path / "another")
    arguments = [str(path), str(tmp_path / "run"), "--data", str(dataset)]
    assert train([*arguments, f"checkpoint.copy_to={copies[0]}"], world=2, before=slow_copy) == 0
    assert train([*arguments, f"checkpoint.copy_to={copies[1]}"]) == 0
    assert [checkpoints.steps_in(copy) for copy in copies] == [[2], [2]]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, "fsdp2"), (1, "fsdp2")),
        ((1, "fsdp2"), (2, "fsdp2")),
        ((2, "ddp"), (2, "fsdp2")),
        ((2, "fsdp2"), (2, "ddp")),
    ],
)
def test_weights_may_be_cut_and_whole_by_turns(dataset, recipe, tmp_path, first, then):
    """By the number of ranks, or because the change is accepted: moments and average are those of each parameter."""
    arguments = [str(recipe(optim={"schedule": "constant", "ema": 0.8})), "--data", str(dataset)]
    arguments += ["train.precision=fp64", "train.accept_changes=true"]
    one, run = str(tmp_path / "one"), str(tmp_path / "run")
    assert train([arguments[0], one, *arguments[1:], "train.steps=8"]) == 0
    for (world, sharding), steps in ((first, 4), (then, 8)):
        settings = [f"train.sharding={sharding}", f"train.steps={steps}"]
        assert train([arguments[0], run, *arguments[1:], *settings], world=world) == 0
    for name in ("loss", "grad_norm", "logit_scale"):
        found, expected = ([line[name] for line in read_metrics(tmp_path / run)] for run in ("run", "one"))
        assert found == pytest.approx(expected, rel=1e-9), name
    last = [checkpoints.load(tmp_path / run, 8) for run in ("run", "one")]
    for name, tensor in last[1].average.items():
        torch.testing.assert_close(last[0].average[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
    torch.testing.assert_close(last[0].optimizer["state"], last[1].optimizer["state"], rtol=1e-6, atol=1e-10)


def test_a_sharded_run_keeps_its_best_checkpoint_and_comes_back_from_its_copy(dataset, recipe, tmp_path):
    path = recipe(optim={"schedule": "constant", "warmup_steps": 0}, checkpoint={"every_steps": 1, "keep": 2})
    run, copy = tmp_path / "run", tmp_path / "copy"
    arguments = [str(path), str(run), "--data", str(dataset), "train.sharding=fsdp2"]
    arguments += ["checkpoint.keep_best=loss", f"checkpoint.copy_to={copy}"]
    assert train([*arguments, "train.steps=4"], world=2) == 0
    before = read_metrics(run)
    shutil.rmtree(run)
    assert train([*arguments, "train.steps=8"], world=2) == 0
    after = read_metrics(run)
    assert [line["step"] for line in after] == list(range(1, 9))
    assert after[:4] == before
    best = min(range(8), key=lambda step: (after[step]["loss"], -step)) + 1
    assert sorted(checkpoints.steps(run)) == sorted({7, 8, best})
    assert (copy / "BEST").read_text() == f"step-{best:08d}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_towers_give_the_losses_and_names_of_plain_ones(dataset, recipe, tmp_path):
    for name in ("false", "true"):
        arguments = [str(recipe()), str(tmp_path / name), "--data", str(dataset), "train.steps=6"]
        assert train([*arguments, f"train.compile={name}"], wait_s=500) == 0
    plain, compiled = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("false", "true"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    file = "checkpoints/step-00000006/model.safetensors"
    assert load_file(tmp_path / "true" / file).keys() == load_file(tmp_path / "false" / file).keys()

"""What goes wrong while a run is running: gradients that are not finite, forced temperatures, signals, lost ranks."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from data_prep import manifest
from data_prep.record import DataError
from pipeline import checkpoint, ranks
from pipeline.failure import TrainingError
from pipeline.tracking import read_metrics
from tests.pipeline.test_during import write_set
from tests.processes import finish, free_port, last_step, start_trainer, train

# What an operator waits for at the most.
PATIENCE_S = 60


@pytest.fixture
def command(dataset, recipe, tmp_path):
    """(arguments, run) of eight steps that are saved one by one."""
    run = tmp_path / "run"
    path = recipe(train={"steps": 8, "max_skipped": 3}, checkpoint={"every_steps": 1, "keep": 99})
    return [str(path), str(run), "--data", str(dataset)], run


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def each_step(do):
    """Call do(step, towers, options) before each forward pass of the trainer, steps counted from 1."""
    from pipeline import train as module

    inner, steps = module.forward_backward, iter(range(1, 1000))

    def wrapped(accelerator, towers, *args, **options):
        do(next(steps), towers, options)
        return inner(accelerator, towers, *args, **options)

    module.forward_backward = wrapped


def nan_pixels(broken, rank):
    """On rank 1, the images of some steps are not numbers."""

    def do(step, towers, options):
        if rank == 1 and step in broken:
            prepare = options["prepare"]
            options["prepare"] = lambda image: prepare(image) * torch.nan

    each_step(do)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(command):
    arguments, run = command
    assert train(arguments, world=2, before=functools.partial(nan_pixels, {3, 4})) == 0
    lines = read_metrics(run)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False, False, False]
    before, after, later = weights(run, 2), weights(run, 4), weights(run, 5)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert any(not torch.equal(later[name], tensor) for name, tensor in before.items())
    optimizer = torch.load(run / "checkpoints/step-00000008/optimizer.pt", weights_only=True)
    assert {float(state["step"]) for state in optimizer["state"].values()} == {6.0}


def test_many_such_steps_in_a_row_end_the_run_with_the_last_checkpoint_intact(command):
    arguments, run = command
    assert train(arguments, world=2, before=functools.partial(nan_pixels, {4, 5, 6, 7, 8})) == 1
    verdict = json.loads((run / "exit.json").read_text())
    assert verdict["status"] == "failed"
    assert "not finite 3 times in a row" in verdict["reason"]
    for name, tensor in weights(run, 3).items():
        assert tensor.isfinite().all(), name


def force_scale(rank):
    def do(step, towers, options):
        if step == 3:
            with torch.no_grad():
                towers.logit_scale.fill_(20.0)

    each_step(do)


def test_a_scale_that_was_forced_high_is_back_within_its_clamp_after_the_step(command):
    arguments, run = command
    assert train(arguments, before=force_scale) == 0
    lines = read_metrics(run)
    assert lines[2]["logit_scale"] == pytest.approx(100, rel=1e-5)
    assert all(1 <= line["logit_scale"] <= 100.001 for line in lines)
    assert lines[-1]["clamp_share"] > 0


def signal_in_evaluation(rank):
    from pipeline.evaluate.during import Evaluators

    inner = Evaluators.measure

    def measure(self, *args):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return inner(self, *args)

    Evaluators.measure = measure


def signal_in_save(rank):
    from pipeline import checkpoint_writer

    inner = checkpoint_writer.Writer.save

    def save(self, checkpoint):
        inner(self, checkpoint)
        if checkpoint.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoint_writer.Writer.save = save


def signal_in_warmup(rank):
    each_step(lambda step, towers, options: os.kill(os.getpid(), signal.SIGTERM) if (rank, step) == (1, 1) else None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A dataset of one retrieval set, six images."""
    root = tmp_path_factory.mktemp("measured")
    write_set(root / "eval" / "small_test", "retrieval", 6)
    split = {"kind": "retrieval", "samples": 6, "shards": 1, "captions": 0, "bytes": 1}
    manifest.write(root, {"name": "small", "splits": {"small_test": split}, "counts": {}}, [], [])
    return root


def test_a_signal_within_an_evaluation_ends_the_run_after_it(command, measured):
    arguments, run = command
    arguments += [f"evaluate.data={measured}", "evaluate.every_steps=2", "checkpoint.every_steps=8"]
    assert train(arguments, world=2, before=signal_in_evaluation) == 75
    assert json.loads((run / "exit.json").read_text())["step"] in (3, 4)
    assert train(arguments, world=2) == 0
    figures = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in figures] == [2, 4, 6, 8]
    assert {"small_test/image_retrieval_recall@1", "small_test/loss"} <= set(figures[0])


def signal_in_step_2(rank):
    each_step(lambda step, towers, options: os.kill(os.getpid(), signal.SIGTERM) if (rank, step) == (1, 2) else None)


def test_a_stop_is_saved_before_anything_is_measured_and_that_is_made_up_for(command, measured):
    arguments, run = command
    arguments += [f"evaluate.data={measured}", "evaluate.every_steps=1", "checkpoint.every_steps=8"]
    assert train(arguments, world=2, before=signal_in_step_2) == 75
    stopped = json.loads((run / "exit.json").read_text())["step"]
    for steps in (range(1, stopped), range(1, 9), range(1, 9)):  # stopped, gone on, and asked once more when done
        figures = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        assert [line["step"] for line in figures] == list(steps)
        assert train(arguments, world=2) == 0


def test_the_best_checkpoint_is_kept_beside_the_newest(command, measured):
    arguments, run = command
    figure = "small_test/loss"
    arguments += [f"evaluate.data={measured}", "evaluate.every_steps=1", f"checkpoint.keep_best={figure}"]
    assert train([*arguments, "checkpoint.keep=2"]) == 0
    figures = [json.loads(line)[figure] for line in (run / "evaluations.jsonl").read_text().splitlines()]
    best = 1 + min(range(8), key=lambda step: (figures[step], -step))
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{step:08d}" for step in (7, 8, best)})
    assert (run / "checkpoints" / "BEST").read_text() == f"step-{best:08d}"


@pytest.mark.parametrize("before", [signal_in_save, signal_in_warmup])
def test_a_signal_to_one_rank_saves_one_agreed_step_and_the_run_goes_on(command, before):
    arguments, run = command
    arguments += ["checkpoint.every_steps=3"]
    assert train(arguments, world=2, before=before) == 75
    stopped = json.loads((run / "exit.json").read_text())
    assert stopped["status"] == "requeue"
    assert stopped["step"] == len(read_metrics(run)) < 8
    assert train(arguments, world=2) == 0
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 9))


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(command):
    arguments, run = command
    arguments += ["train.steps=40", "checkpoint.every_steps=3"]
    port = free_port()
    ranks = [start_trainer(arguments, rank=rank, world=2, port=port) for rank in range(2)]
    while last_step(run) < 5:
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.002)
    ranks[1].kill()
    began = time.monotonic()
    assert finish(ranks[0]) == 75
    assert time.monotonic() - began < PATIENCE_S
    verdict, saved = json.loads((run / "exit.json").read_text()), max(checkpoint.steps(run))
    assert (verdict["status"], verdict["code"], verdict["rank"], verdict["step"]) == ("requeue", 75, 0, saved)
    assert "rank 0 of 2 lost others" in verdict["reason"]
    seen = read_metrics(run)
    assert train(arguments, world=2) == 0
    again = read_metrics(run)
    assert [line["step"] for line in again] == list(range(1, 41))
    for name in ("batch_sha256", "loss"):
        assert [line[name] for line in again][: len(seen)] == [line[name] for line in seen]


def mistaken(error, rank):
    """At step 3 rank 1 meets an error of its own, while the others wait for it."""

    def do(step, towers, options):
        if (rank, step) == (1, 3):
            raise error("the key hidden-in-the-environment does not fit")

    each_step(do)


@pytest.mark.parametrize(("error", "code"), [(DataError, 2), (TrainingError, 1), (KeyError, 1)])
def test_where_a_rank_fails_the_others_end_with_its_code_and_it_alone_is_heard(command, monkeypatch, error, code):
    arguments, run = command
    monkeypatch.setenv("SOME_TOKEN", "hidden-in-the-environment")
    port = free_port()
    started = [
        start_trainer(arguments, rank=rank, world=3, port=port, before=functools.partial(mistaken, error))
        for rank in range(3)
    ]
    assert [finish(process) for process in started] == [code] * 3
    verdict = json.loads((run / "exit.json").read_text())
    assert (verdict["status"], verdict["code"], verdict["rank"]) == ("failed", code, 1)
    assert "the key $SOME_TOKEN does not fit" in verdict["reason"]
    assert ("pipeline/train.py:" in verdict["reason"]) == (error is KeyError)


def slow(rank):
    """Rank 1 stands still for longer than the others wait."""
    each_step(lambda step, towers, options: time.sleep(7) if (rank, step) == (1, 3) else None)


def test_a_rank_that_does_not_answer_in_time_ends_the_run_which_may_go_on(command):
    arguments, run = command
    assert train([*arguments, "train.timeout_s=2"], world=2, before=slow) == 75
    verdict = json.loads((run / "exit.json").read_text())
    assert verdict["status"] == "requeue"
    assert "rank 0 of 2 lost others" in verdict["reason"]
    assert "Timed out waiting 2000ms" in verdict["reason"]
    assert train(arguments, world=2) == 0


def started_as_programs(arguments, world):
    """`python -m pipeline train …` for each rank, started as a launcher starts them."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    words = [sys.executable, "-m", "pipeline", "train", *arguments]
    return [
        subprocess.Popen(words, env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


@pytest.mark.slow
def test_a_rank_whose_peer_stands_still_leaves_with_its_own_code(command):
    """Not with SIGABRT, which torch's threads give a program that ends while they wait."""
    arguments, run = command
    first, second = started_as_programs([*arguments, "train.steps=100000", "train.timeout_s=5"], 2)
    while last_step(run) < 3:
        assert first.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGSTOP)
    assert first.wait(PATIENCE_S) == 75
    second.kill()
    second.wait()


def signal_before_step_1(moment, rank):
    """SIGUSR1 to rank 1 while it is being started, twice; and a third one while it leaves."""
    if rank != 1:
        return
    from pipeline import begin, ending, ranks

    module, name = {"meeting": (ranks, "_meet"), "building": (begin, "make_towers")}[moment]
    inner, ended = getattr(module, name), ending.ended

    def signalled(do, *args, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        return do(*args, **options)

    setattr(module, name, functools.partial(signalled, inner))
    ending.ended = functools.partial(signalled, ended)


@pytest.mark.parametrize("moment", ["meeting", "building"])
def test_a_signal_before_the_first_step_ends_the_run_before_it(command, measured, moment):
    arguments, run = command
    arguments += [f"evaluate.data={measured}", "evaluate.every_steps=4"]
    assert train([*arguments, "train.steps=4"], world=2) == 0
    trained, figures = (run / "metrics.jsonl").read_bytes(), (run / "evaluations.jsonl").read_bytes()
    arguments += ["train.accept_changes=true"]
    port, before = free_port(), functools.partial(signal_before_step_1, moment)
    started = [start_trainer(arguments, rank=rank, world=2, port=port, before=before) for rank in range(2)]
    assert [finish(process) for process in started] == [75, 75]
    verdict = json.loads((run / "exit.json").read_text())
    assert (verdict["status"], verdict["step"]) == ("requeue", 4)
    assert (run / "metrics.jsonl").read_bytes() == trained
    assert (run / "evaluations.jsonl").read_bytes() == figures
    assert train(arguments, world=2) == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_to_all_processes_of_all_ranks_again_and_again_save_once(command, number):
    """As SLURM sends them: to each process of a step, loader processes too."""
    arguments, run = command
    arguments += ["train.steps=100000", "checkpoint.every_steps=100000", "data.workers=2"]
    port = free_port()
    started = [start_trainer(arguments, rank=rank, world=2, port=port) for rank in range(2)]
    while last_step(run) < 5:
        assert all(process.is_alive() for process in started)
        time.sleep(0.002)
    while any(process.is_alive() for process in started):
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for one in (parent, *parent.children(recursive=True)):
                    one.send_signal(number)
        time.sleep(0.02)
    assert [finish(process) for process in started] == [75, 75]
    verdict = json.loads((run / "exit.json").read_text())
    assert (verdict["status"], verdict["step"]) == ("requeue", last_step(run))
    assert len(checkpoint.steps(run)) == 1


def silent_master(told, rank):
    from pipeline import ranks

    ranks.log.addHandler(logging.FileHandler(told))
    ranks.PATIENCE_S = 1
    os.environ["MASTER_PORT"] = str(free_port())


def test_a_wrong_master_port_is_told_of_and_then_refused(command, tmp_path):
    arguments, run = command
    told = tmp_path / "told"
    before = functools.partial(silent_master, told)
    assert finish(start_trainer([*arguments, "train.timeout_s=5"], rank=1, world=2, before=before)) == 2
    assert ranks.PATIENCE_S < 60
    assert "rank 1 of 2: the ranks have not met at 127.0.0.1:" in told.read_text()
    assert "Waiting, for 5 s at the most" in told.read_text()
    reason = json.loads((run / "exit.json").read_text())["reason"]
    assert "rank 1 of 2: the ranks have not met at 127.0.0.1:" in reason
    assert "MASTER_ADDR" in reason


@pytest.fixture
def taken():
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_is_named_with_who_has_it(command, taken):
    arguments, run = command
    assert finish(start_trainer(arguments, rank=0, world=2, port=taken)) == 2
    reason = json.loads((run / "exit.json").read_text())["reason"]
    assert f"rank 0 of 2: port {taken} of {socket.gethostname()} (MASTER_PORT) is in use, by" in reason
    assert f"process {os.getpid()}. Set another MASTER_PORT" in reason


def unknown_master(rank):
    os.environ["MASTER_ADDR"] = "nowhere.invalid"


def test_a_master_that_has_no_address_is_refused_at_once(command):
    arguments, run = command
    assert finish(start_trainer(arguments, rank=1, world=2, before=unknown_master)) == 2
    assert "nowhere.invalid" in json.loads((run / "exit.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("setting", "variable", "said"),
    [
        ("train.precision=fp16", {}, "needs a GPU"),
        ("train.steps=8", {"ACCELERATE_USE_FSDP": "true"}, "train.sharding=fsdp2"),
    ],
)
def test_what_this_machine_or_the_launcher_cannot_give_is_refused(command, monkeypatch, setting, variable, said):
    arguments, run = command
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert train([*arguments, setting]) == 2
    assert said in json.loads((run / "exit.json").read_text())["reason"]


def test_a_launchers_accumulation_does_not_divide_gradients(command, monkeypatch):
    arguments, run = command
    assert train([*arguments, "train.steps=1"]) == 0
    expected = read_metrics(run)[0]["grad_norm"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    shutil.rmtree(run)
    assert train([*arguments, "train.steps=1"]) == 0
    assert read_metrics(run)[0]["grad_norm"] == expected


@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision=bf16", "loss.positives=image_and_text"],
        ["loss.kind=sigmoid", "loss.positives=image", "loss.init_scale=10"],
        ["loss.kind=decoupled", "model.activation_checkpointing=true", "model.patch_dropout=0.5"],
        ["model.lock_image=true", "model.unlocked_image_groups=1", "optim.layer_decay=0.8", "loss.learn_scale=false"],
    ],
)
def test_settings_train_and_go_on_to_the_bit(command, settings):
    """What each is worth is tested elsewhere; here, that all of its state is in a checkpoint."""
    arguments, run = command
    arguments += [*settings, "optim.schedule=constant", "optim.ema=0.9"]
    assert train(arguments) == 0
    straight = read_metrics(run)
    assert straight[-1]["loss"] < straight[0]["loss"]
    for step in range(4, 9):
        (run / "checkpoints" / f"step-{step:08d}" / "CHECKSUMS.json").unlink()
    assert train(arguments) == 0
    for name in ("loss", "logit_scale", "grad_norm"):
        assert [line[name] for line in read_metrics(run)] == [line[name] for line in straight], name
    assert (run / "checkpoints/step-00000008/ema.safetensors").is_file()


def scaled(rank):
    """fp16's scaler of losses, on a CPU, that grows every third step."""
    from pipeline import ranks

    inner = ranks.start

    def start(**options):
        accelerator = inner(**options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4, growth_interval=3)
        return accelerator

    ranks.start = start


def test_the_scale_of_float16_losses_is_in_a_checkpoint(command):
    arguments, run = command
    arguments += ["optim.schedule=constant", "optim.clip_norm=null"]
    newest = run / "checkpoints" / "step-00000008"
    assert train(arguments, before=scaled) == 0
    straight, state = read_metrics(run), json.loads((newest / "state.json").read_text())
    assert (state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) == (16, 2)
    for step in range(5, 9):
        (run / "checkpoints" / f"step-{step:08d}" / "CHECKSUMS.json").unlink()
    assert train(arguments, before=scaled) == 0
    assert json.loads((newest / "state.json").read_text())["scaler"] == state["scaler"]
    for name in ("loss", "grad_norm"):  # that of the scaled loss: without float16, nobody takes the scale out
        assert [line[name] for line in read_metrics(run)] == [line[name] for line in straight], name

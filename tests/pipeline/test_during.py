"""Evaluation beside training: the figures of `pipeline evaluate`, on any number of ranks, and of every checkpoint."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from data_prep import manifest
from data_prep.record import DataError
from pipeline import checkpoint as checkpoints
from pipeline import trained as loading
from pipeline.__main__ import main
from pipeline.checkpoint import Checkpoint
from pipeline.evaluate import during, measures, statistics, watch
from pipeline.evaluate.during import Budget, Evaluators, held_out_loss
from pipeline.evaluate.embed import embed_images, embed_texts
from pipeline.evaluate.run import evaluate
from pipeline.evaluate.sets import EvaluationError
from pipeline.failure import TrainingError
from pipeline.loss.info_nce import info_nce
from tests.pipeline.test_report import write_run
from tests.processes import CONTEXT, finish, run_ranks

# name → (kind, images); with batches of five: five batches, three, one, and fewer images than there are ranks.
SETS = {
    "pairs_test": ("retrieval", 23),
    "colors_test": ("classification", 12),
    "order_test": ("selection", 4),
    "few_test": ("retrieval", 2),
    "asked_val": ("vqa", 3),
}
MEASURED = [name for name, (kind, _) in SETS.items() if kind != "vqa"]
LOSS_BATCH = 6
RESULTS = [f"{name}.json" for name in sorted(MEASURED)]


def write_set(folder, kind, images):
    """Pictures of noise; captions that are alike in twos."""
    random = np.random.default_rng(images)
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\nsomething {c}\n")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number in range(images):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
            texts = "\n".join(f"{word} {number // 2 if word == 'about' else number}" for word in ("picture", "about"))
            said = {"cls": str(number % 3)} if kind == "classification" else {"txt": texts}
            for extension, data in {"png": buffer.getvalue(), **{k: v.encode() for k, v in said.items()}}.items():
                info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(autouse=True)
def one_thread():
    """As the ranks have; with more, sums are cut differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("during")
    totals = {"shards": 1, "captions": 0, "bytes": 1}
    splits = {name: {"kind": kind, "samples": images, **totals} for name, (kind, images) in SETS.items()}
    for name, (kind, images) in SETS.items():
        write_set(root / "eval" / name, kind, images)
    manifest.write(root, {"name": "small", "splits": splits, "counts": {}}, [], [])
    return root


@pytest.fixture
def run(tmp_path):
    """A run folder with a checkpoint of step 60."""
    write_run(tmp_path / "run")
    return tmp_path / "run"


def save(run, step, change=lambda weights: None):
    """A checkpoint like the run's first, but for a change."""
    weights = dict(checkpoints.load(run, 60, weights_only=True).model)
    change(weights)
    return checkpoints.publish(run, Checkpoint(step, weights, {}, {}))


def evaluators(run, data, rank=0, world=1, names=(), **changes):
    """(the evaluators of a dataset, a run's model)."""
    trained = loading.load(run)
    options = {
        "tokenize": trained.tokenize,
        "preprocess": trained.preprocess,
        "batch_size": 5,
        "workers": 0,
        "global_batch": LOSS_BATCH,
    }
    return Evaluators(data, names, **options | changes, rank=rank, world=world), trained


def measured(rank, world, run, data, batch_size=5):
    """(figures, calls of each tower) of one rank."""
    sets, trained = evaluators(run, data, rank, world, batch_size=batch_size)
    calls = {"encode_image": 0, "encode_text": 0}
    for name in calls:
        encode = getattr(trained.towers, name)

        def counted(*args, name=name, encode=encode, **options):
            calls[name] += 1
            return encode(*args, **options)

        setattr(trained.towers, name, counted)
    return sets.measure(trained.towers, torch.device("cpu")), calls


def test_figures_are_those_of_pipeline_evaluate(run, data):
    found, _ = measured(0, 1, run, data)
    expected = {
        f"{record['dataset']}/{name}": value
        for record in evaluate(str(run), data)
        for name, value in record["metrics"].items()
    }
    losses = {name for name in found if name.endswith("/loss")}
    assert losses == {"pairs_test/loss", "few_test/loss"}
    assert {name: value for name, value in found.items() if name not in losses} == expected
    assert len(set(expected.values())) > 5  # they tell models apart


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_finds_the_same(run, data, world):
    """Bit for bit, on every rank; and all run their towers equally often, as towers that are cut over ranks need."""
    alone, _ = measured(0, 1, run, data)
    ranks = run_ranks(world, measured, run, data)
    assert all(found == alone for found, _ in ranks)
    assert all(calls == ranks[0][1] for _, calls in ranks)


def test_batches_of_another_size_find_the_same_but_for_rounding(run, data):
    alone, _ = measured(0, 1, run, data)
    for found, _ in run_ranks(2, measured, run, data, 1):
        assert found == pytest.approx(alone, abs=1e-6)


def failing(rank, world, run, data):
    """What a rank meets where rank 1 cannot read an image, and where it can again."""
    trained = loading.load(run)
    broken: list[Exception] = []

    def preprocess(image):
        if rank == 1 and broken:
            raise broken[0]
        return trained.preprocess(image)

    sets, trained = evaluators(run, data, rank, world, preprocess=preprocess)
    towers, met = trained.towers.train(), []
    for error in (EvaluationError("0.tar: does not decode"), OSError("gone")):
        broken[:] = [error]
        try:
            sets.measure(towers, torch.device("cpu"))
        except (DataError, TrainingError) as failure:
            met.append(f"{type(failure).__name__}: {failure}")
        assert all(module.training for module in towers.modules())
    broken.clear()
    return met, sets.measure(towers, torch.device("cpu"))


def test_a_failure_on_one_rank_is_one_of_all(run, data):
    """Nobody is left waiting, and what comes after is not mixed up with what went before."""
    alone, _ = measured(0, 1, run, data)
    met = ["EvaluationError: 0.tar: does not decode", "TrainingError: rank 1: OSError: gone"]
    assert run_ranks(3, failing, run, data) == [(met, alone)] * 3


def test_training_is_left_as_it_was(run, data):
    """Modes (a locked tower's is its own), gradients, torch's random numbers; and autocast is not taken over."""
    alone, _ = measured(0, 1, run, data)
    sets, trained = evaluators(run, data, workers=2)
    towers = trained.towers.train()
    towers.visual.eval()
    modes = [module.training for module in towers.modules()]
    random = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sets.measure(towers, torch.device("cpu")) == alone
    assert [module.training for module in towers.modules()] == modes
    assert True in modes
    assert False in modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in towers.parameters())
    embedding = towers.encode_text(trained.tokenize(["a"]))
    embedding.sum().backward()  # nothing that the towers keep was made for inference only


def test_embeddings_are_the_same_in_any_number_of_lanes(run, data):
    trained = loading.load(run)
    items = measures.open_set(measures.choose(data, ["pairs_test"])[0]).items
    found = [embed_images(trained, items, batch_size=5, workers=workers) for workers in (0, 1, 2, 7)]
    assert all(torch.equal(image_ND, found[0]) for image_ND in found)


def test_intervals_are_not_resampled(run, data, monkeypatch):
    monkeypatch.setattr(statistics, "_draws", lambda *_: pytest.fail("resampled"))
    assert "pairs_test/image_retrieval_recall@1" in measured(0, 1, run, data)[0]


def test_sets_are_chosen_by_name(run, data):
    sets, trained = evaluators(run, data, names=["few_test"], global_batch=None)
    figures = [*(f"recall@{k}" for k in (1, 5, 10)), "median_rank"]
    expected = [f"few_test/{way}_retrieval_{name}" for way in ("image", "text") for name in figures]
    spread = ("modality_gap", "alignment", "image_uniformity", "text_uniformity")
    expected += [f"few_test/{name}" for name in spread]
    assert list(sets.measure(trained.towers, torch.device("cpu"))) == expected
    with pytest.raises(EvaluationError, match=r"no evaluation set other\. It has .*few_test"):
        evaluators(run, data, names=["few_test", "other"])
    with pytest.raises(EvaluationError, match="Known kinds: classification"):
        evaluators(run, data, names=["asked_val"])


def test_what_does_not_fit_together_is_refused_before_the_first_step(run, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "eval" / "colors_test" / "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(EvaluationError, match="labels run from 0 to 2"):
        evaluators(run, copy)


def test_embeddings_that_are_not_finite_say_so(run, data):
    sets, trained = evaluators(run, data)
    trained.towers.text_projection.data[0, 0] = math.nan
    with pytest.raises(EvaluationError, match="text tower gives embeddings that are not finite"):
        sets.measure(trained.towers, torch.device("cpu"))


# --- Held-out loss


def unit(pairs, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(pairs, width, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]


@pytest.mark.parametrize(("pairs", "batch", "expected"), [(12, 4, 4), (11, 4, 4), (3, 4, 3), (1, 4, 1)])
def test_equal_embeddings_cost_log_batch(pairs, batch, expected):
    image, _ = unit(1)
    rows = image.repeat(pairs, 1)
    assert held_out_loss(rows, rows, 50.0, batch) == pytest.approx(math.log(expected))


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_it_is_the_training_loss_averaged_over_batches(block, monkeypatch):
    monkeypatch.setattr(during, "BLOCK", block)
    image, text = unit(17)
    scale = torch.tensor(9.0, dtype=torch.float64)
    parts = [info_nce(image[begin : begin + 5], text[begin : begin + 5], scale) for begin in (0, 5, 10)]
    assert held_out_loss(image, text, 9.0, 5) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-9)


def test_a_last_incomplete_batch_is_left_out():
    image, text = unit(12)
    assert held_out_loss(image, text, 9.0, 5) == held_out_loss(image[:10], text[:10], 9.0, 5)
    assert held_out_loss(image, text, 9.0, 5) != held_out_loss(image, text, 9.0, 12)


def test_it_is_of_first_captions_at_the_towers_own_scale(run, data):
    sets, trained = evaluators(run, data, names=["pairs_test"])
    trained.towers.logit_scale.data.fill_(math.log(20.0))
    found = sets.measure(trained.towers, torch.device("cpu"))["pairs_test/loss"]
    items = measures.open_set(measures.choose(data, ["pairs_test"])[0]).items
    image = embed_images(trained, items, batch_size=5, workers=0)
    text = embed_texts(trained, [f"picture {number}" for number in range(len(items))], batch_size=5)
    scale = torch.tensor(20.0)
    parts = [info_nce(*(side[begin : begin + LOSS_BATCH] for side in (image, text)), scale) for begin in (0, 6, 12)]
    assert found == pytest.approx(float(torch.stack(parts).mean()), abs=1e-5)


# --- Budget


def simulate(budget, measurements, *, every=100):
    """The shares of a run that measures every so many steps: 2.1 s each time, 0.5 s a step."""
    return [
        budget.spent(2.1, run_seconds=number * (2.1 + 0.5 * every), steps=number * every)
        for number in range(1, measurements + 1)
    ]


def test_what_measuring_takes_is_warned_of_once(caplog):
    assert simulate(Budget(0.01), 2) == pytest.approx([2.1 / 52.1] * 2)
    assert not caplog.records
    simulate(Budget(0.01), 5)
    (record,) = caplog.records
    for said in ("4.0 %", "evaluate.budget = 1 %", "2.1 s each time", "0.5 s", "evaluate.every_steps=416"):
        assert said in record.getMessage()


def test_the_advice_keeps_to_the_budget(caplog):
    """And one step less does not."""
    assert simulate(Budget(0.01), 1, every=416)[0] <= 0.01 < simulate(Budget(0.01), 1, every=415)[0]
    simulate(Budget(0.01), 9, every=416)
    assert not caplog.records


# --- Following a run


@pytest.fixture
def sleeping(monkeypatch):
    """Instead of sleeping, what the list holds is done, one at a time."""
    events = []
    monkeypatch.setattr(watch.time, "sleep", lambda _: events.pop(0)())
    return events


def end(run, status="done"):
    (run / "exit.json").write_text(json.dumps({"status": status, "code": 0}))


def results(run):
    """step → the files of its results."""
    return {
        int(folder.name.removeprefix("step-")): sorted(file.name for file in folder.glob("*.json"))
        for folder in (run / "eval").glob("step-*")
    }


def test_each_checkpoint_is_measured_as_it_appears(run, data, sleeping, capsys):
    """The last one appears together with the end. What has results stays; a run that failed is waited for."""

    def last():
        save(run, 63)
        end(run)

    (run / "eval" / "step-00000060").mkdir(parents=True)
    for name in RESULTS:
        (run / "eval" / "step-00000060" / name).write_text("kept")
    sleeping[:] = [lambda: save(run, 61), lambda: end(run, "failed"), lambda: save(run, 62), last]
    assert watch.watch(run, data) == "done"
    assert not sleeping
    assert results(run) == dict.fromkeys((60, 61, 62, 63), RESULTS)
    assert (run / "eval" / "step-00000060" / RESULTS[0]).read_text() == "kept"
    found = json.loads((run / "eval" / "step-00000062" / "pairs_test.json").read_text())
    assert found["intervals"].keys() == found["metrics"].keys()
    assert capsys.readouterr().out.count("95 % interval") == 3


def watched(rank, world, run, data):
    """What a rank of several says, by the variables that a launcher sets."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return watch.watch(run, data, poll_s=0.01)


def test_ranks_follow_a_run_together(run, data):
    """Two checkpoints, so that they part and meet again; the second cannot be read."""
    save(run, 61)
    damaged = save(run, 62) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    save(run, 63)
    end(run)
    assert run_ranks(2, watched, run, data) == ["done", "done"]
    assert {step for step, files in results(run).items() if files} == {60, 61, 63}


def test_sets_that_lack_results_are_measured(run, data, sleeping):
    """A stop between two sets of a checkpoint leaves some of them without; other sets may be asked for later, too."""
    end(run)
    assert watch.watch(run, data, names=["few_test"], transform="fast") == "done"
    assert results(run) == {60: ["few_test.json"]}
    assert json.loads((run / "eval" / "step-00000060" / "few_test.json").read_text())["transform"] == "fast"
    assert watch.watch(run, data) == "done"
    assert results(run) == {60: RESULTS}


def test_a_run_that_has_not_begun_is_waited_for(data, tmp_path, sleeping):
    def begin():
        write_run(tmp_path / "run")
        end(tmp_path / "run")

    sleeping[:] = [lambda: None, begin]
    assert watch.watch(tmp_path / "run", data) == "done"
    assert results(tmp_path / "run") == {60: RESULTS}


def test_what_cannot_be_measured_is_passed_over(run, data, monkeypatch, caplog):
    """Removed between listing and loading, damaged, and weights that are no numbers any more."""
    caplog.set_level(logging.INFO)
    save(run, 61)
    damaged = save(run, 62) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    save(run, 63, lambda weights: weights["visual.proj"].fill_(math.nan))
    save(run, 64)
    end(run)

    def evaluate_late(run, data, *, step, **options):
        if step == 61:
            shutil.rmtree(Path(run) / "checkpoints" / "step-00000061")
        return evaluate(run, data, step=step, **options)

    monkeypatch.setattr(watch, "evaluate", evaluate_late)
    assert watch.watch(run, data) == "done"
    assert {step: files for step, files in results(run).items() if files} == {60: RESULTS, 64: RESULTS}
    said = [record.getMessage() for record in caplog.records if "assed over" in record.getMessage()]
    assert len(said) == 3
    assert "step 61 was removed before" in said[0]
    assert "step-00000062/model.safetensors: its sha256" in said[1]
    assert "step 63: the image tower gives embeddings that are not finite" in said[2]


def test_a_set_that_cannot_be_measured_ends_it(run, data, tmp_path):
    """It would be so for every checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "eval" / "few_test" / "test" / "0.tar").unlink()
    with pytest.raises(EvaluationError, match=r"few_test/test/0\.tar"):
        watch.watch(run, copy)
    with pytest.raises(EvaluationError, match="no evaluation set other"):
        watch.watch(run, data, names=["other"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_it_cleanly(run, data, sleeping, number):
    former = signal.getsignal(number)
    sleeping[:] = [lambda: os.kill(os.getpid(), number)]
    assert watch.watch(run, data) == "requeue"
    assert signal.getsignal(number) is former
    assert results(run) == {60: RESULTS}


def follow(arguments):
    torch.set_num_threads(1)
    sys.exit(main(["evaluate", *arguments, "--watch"]))


def test_the_command_follows_a_run_until_it_is_stopped(run, data):
    """A process of its own, stopped while it waits: 75 says that the same command goes on; then 0, done."""
    arguments = [str(run), "--data", str(data), "--set", "few_test"]
    process = CONTEXT.Process(target=follow, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 60
    while results(run) != {60: ["few_test.json"]}:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 75
    end(run)
    assert main(["evaluate", *arguments, "--watch"]) == 0


def test_one_step_cannot_be_followed(run, data, capsys):
    assert main(["evaluate", str(run), "--data", str(data), "--watch", "--step", "60"]) == 2
    assert "leave out all but --data" in capsys.readouterr().err

"""The average of the weights is measured beside them, and neither is the worse for it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from data_prep import manifest
from pipeline import checkpoint as checkpoints
from pipeline import trained as loading
from pipeline.evaluate.during import Evaluators
from pipeline.tracking import read_metrics
from tests.pipeline.test_during import write_set
from tests.processes import train

STEPS = 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A dataset of one retrieval set, six images."""
    root = tmp_path_factory.mktemp("measured")
    write_set(root / "eval" / "small_test", "retrieval", 6)
    split = {"kind": "retrieval", "samples": 6, "shards": 1, "captions": 0, "bytes": 1}
    manifest.write(root, {"name": "small", "splits": {"small_test": split}, "counts": {}}, [], [])
    return root


@pytest.fixture
def start(dataset, recipe, tmp_path):
    """start(name, words, world) trains four steps with an average; the run folder."""
    path = recipe(
        optim={"ema": 0.8, "lr": 0.03, "warmup_steps": 0},
        train={"steps": STEPS, "precision": "fp64"},
        checkpoint={"every_steps": 1, "keep": 2},
    )

    def begin(name, *words, world=1):
        assert train([str(path), str(tmp_path / name), "--data", str(dataset), *words], world=world) == 0
        return tmp_path / name

    return begin


def figures(run):
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def measure(run, data, file):
    """The figures of a checkpoint's file, by its own towers."""
    trained = loading.load(run)
    trained.towers.load_state_dict(load_file(run / f"checkpoints/step-{STEPS:08d}" / file))
    evaluators = Evaluators(
        data,
        [],
        tokenize=trained.tokenize,
        preprocess=trained.preprocess,
        batch_size=256,
        workers=0,
        rank=0,
        world=1,
        global_batch=10,
    )
    return evaluators.measure(trained.towers, torch.device("cpu"))


@pytest.mark.parametrize(("world", "settings"), [(1, []), (2, ["train.sharding=fsdp2"])])
@pytest.mark.slow
def test_both_are_measured_and_training_goes_on_as_without(start, measured, world, settings):
    watched = ["evaluate.every_steps=1", f"evaluate.data={measured}", "checkpoint.keep_best=ema/small_test/loss"]
    plain, run = start("plain", *settings, world=world), start("run", *settings, *watched, world=world)
    assert losses(run) == losses(plain)
    one = run if world == 1 else start("one", *watched)
    found = figures(run)
    for line, expected in zip(found, figures(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for prefix, file in (("", "model.safetensors"), ("ema/", "ema.safetensors")):
        for name, value in measure(one, measured, file).items():
            assert found[-1][f"{prefix}{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert found[-1]["ema/small_test/loss"] != pytest.approx(found[-1]["small_test/loss"], rel=1e-3)
    best = min(found, key=lambda line: (line["ema/small_test/loss"], -line["step"]))["step"]
    assert (run / "checkpoints" / "BEST").read_text() == f"step-{best:08d}"


def test_several_ranks_measure_with_the_batch_statistics_that_are_saved(start, measured):
    vision = "{layers: [1, 1, 1, 1], width: 16, head_width: 32, image_size: 32}"
    text = "{context_length: 12, vocab_size: 49408, width: 16, heads: 2, layers: 1}"
    config = f"model.config={{embed_dim: 32, vision_cfg: {vision}, text_cfg: {text}}}"
    run = start("run", config, "evaluate.every_steps=4", f"evaluate.data={measured}", world=2)
    for prefix, file in (("", "model.safetensors"), ("ema/", "ema.safetensors")):
        for name, value in measure(run, measured, file).items():
            assert figures(run)[-1][f"{prefix}{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("world", "settings"), [(1, []), (2, ["train.sharding=fsdp2"])])
def test_an_average_that_is_asked_for_later_begins_with_the_weights_of_then(start, world, settings):
    start("run", *settings, "optim.ema=null", world=world)
    changes = ["optim.ema=0.75", "train.accept_changes=true", f"train.steps={STEPS + 1}"]
    run = start("run", *settings, *changes, world=world)
    before = checkpoints.load(run, STEPS)
    assert before.average is None
    after = checkpoints.load(run, STEPS + 1)
    for name, tensor in after.average.items():
        expected = 0.75 * before.model[name] + 0.25 * after.model[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12, msg=name)

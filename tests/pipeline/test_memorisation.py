"""Memorisation: a model that knows its train pairs, one that knows nothing, and pairs of the same sources in both."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from data_prep import manifest
from data_prep.__main__ import main as prepare_data
from pipeline.__main__ import main
from pipeline.evaluate import sources
from pipeline.evaluate.compare import compare
from pipeline.evaluate.memorisation import draw, measure
from pipeline.evaluate.run import evaluate
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.statistics import intervals
from pipeline.trained import TrainedModel
from tests.pipeline.test_report import write_run
from tests.processes import run_ranks

PHOTOS = 60


def test_a_model_that_knows_its_train_pairs_exactly():
    """Held-out captions all lie on one point, so that they find their image by luck; train ones on their images."""
    image_ND, held_ND = torch.eye(50), F.normalize(torch.ones(50, 50), dim=1)
    result = measure(image_ND, held_ND, image_ND, image_ND)
    for way in ("image_retrieval", "text_retrieval"):
        name = f"{way}_recall@1"
        assert result.metrics[f"{name}_train"] == 1
        assert result.metrics[f"{name}_held_out"] == pytest.approx(1 / 50)
        assert result.metrics[f"{name}_memorised"] == pytest.approx(49 / 50)
        assert result.intervals[f"{name}_memorised"] == pytest.approx((49 / 50, 49 / 50))


def test_a_model_that_is_as_good_on_both_memorises_nothing():
    random = torch.Generator().manual_seed(0)
    image_ND = F.normalize(torch.randn(40, 6, generator=random), dim=1)
    text_ND = F.normalize(image_ND + 0.5 * torch.randn(40, 6, generator=random), dim=1)
    result = measure(image_ND, text_ND, image_ND, text_ND)
    assert 0.1 < result.metrics["image_retrieval_recall@1_train"] < 0.9
    assert result.metrics["image_retrieval_recall@1_memorised"] == 0
    low, high = result.intervals["image_retrieval_recall@1_memorised"]
    assert low < 0 < high


def test_its_interval_is_that_of_two_bootstraps():
    random = np.random.default_rng(0)
    image_ND = torch.eye(120)
    wrong = [torch.tensor(random.random(120) < share) for share in (0.7, 0.3)]
    texts = [torch.where(one[:, None], -image_ND, image_ND) for one in wrong]
    result = measure(image_ND, texts[0], image_ND, texts[1])
    hits = [1 - one.numpy().astype(float) for one in wrong]
    means = [one[random.integers(120, size=(4000, 120))].mean(axis=1) for one in hits]
    low, high = np.percentile(means[1] - means[0], [2.5, 97.5])
    found = intervals({"it": result.sampled["text_retrieval_recall@1_memorised"]}, result.images)["it"]
    assert result.metrics["text_retrieval_recall@1_memorised"] == pytest.approx(hits[1].mean() - hits[0].mean())
    assert found == pytest.approx((low, high), abs=0.15 * (high - low))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of PHOTOS images of noise with two captions each, a part of them held out."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    rows = ["file,one,two"]
    for number in range(PHOTOS):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{number}.png")
        rows.append(f"{root / f'{number}.png'},photo {number},picture {number}")
    (root / "pairs.csv").write_text("\n".join(rows))
    options = ["--image-column", "file", "--caption-column", "one", "--caption-column", "two", "--hold-out", "val=0.3"]
    assert prepare_data(["build", f"table={root / 'pairs.csv'}", "--out", str(root / "data"), *options]) == 0
    return root / "data"


def held_out(data):
    return next(iter(sources.find(data))).items()


def test_as_many_train_pairs_are_drawn_one_caption_an_image(data):
    dataset, images = manifest.read(data), held_out(data)
    held, train = draw(None, dataset, images)
    assert len(held.items) == len(train.items) == len(images) < PHOTOS / 2
    for pairs in (held, train):
        assert len({item.identity for item in pairs.items}) == len(images)
        for item, caption in zip(*pairs, strict=True):
            assert caption in item.record["captions"]
    assert {item.record["split"] for item in train.items} == {"train"}
    firsts = [caption == item.record["captions"][0] for item, caption in zip(*train, strict=True)]
    assert any(firsts)
    assert not all(firsts)
    again = draw(None, dataset, images)
    assert [item.key for item in again[1].items] == [item.key for item in train.items]
    assert (again[0].captions, again[1].captions) == (held.captions, train.captions)


def test_both_galleries_are_as_large_as_the_smaller_one_of_each_source(data):
    dataset, images = manifest.read(data), held_out(data)
    other = [SimpleNamespace(key=f"o{n}", captions=("x",), record={"source": "other"}) for n in range(5)]
    held, train = draw(None, dataset, [*images[:4], *other])
    assert len(held.items) == len(train.items) == 4
    many = [SimpleNamespace(key=f"m{n}", captions=("x",), record={"source": "table"}) for n in range(PHOTOS)]
    held, train = draw(None, dataset, many)
    assert len(held.items) == len(train.items) == PHOTOS - len(images)
    with pytest.raises(EvaluationError, match="no captions of other"):
        draw(None, dataset, other)


def test_a_run_that_was_trained_on_other_data_is_refused(data, tmp_path):
    dataset, images = manifest.read(data), held_out(data)
    run = object.__new__(TrainedModel)
    object.__setattr__(run, "run", tmp_path)
    known = {str(data): dataset.fingerprint("train")}
    (tmp_path / "environment.json").write_text(json.dumps({"datasets": known}))
    assert len(draw(run, dataset, images)[1].items) == len(images)
    (tmp_path / "environment.json").write_text(json.dumps({"datasets": {"data/other": "0"}}))
    with pytest.raises(EvaluationError, match="was trained on data/other, and not on"):
        draw(run, dataset, images)


@pytest.fixture
def run(data, tmp_path):
    """A run of random weights that says it was trained on `data`."""
    write_run(tmp_path / "run")
    known = {str(data): manifest.read(data).fingerprint("train")}
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"datasets": known}))
    return tmp_path / "run"


def everything(rank, world, run, data, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    return evaluate(str(run), data, out=out, by=["source", "original_width"], further=["perturb", "memorisation"])


@pytest.mark.slow
def test_two_ranks_write_what_one_writes_and_it_compares(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # which are as before afterwards
    monkeypatch.setenv("WORLD_SIZE", "1")
    threads = torch.get_num_threads()
    alone = everything(0, 1, run, data, tmp_path / "1")
    torch.set_num_threads(threads)
    assert run_ranks(2, everything, run, data, tmp_path / "2") == [alone] * 2
    names = [name := alone[0]["dataset"], f"{name}.perturbed", f"{name}.memorisation"]
    assert [one["dataset"] for one in alone] == names
    for one in alone:
        assert one["groups"]["source"]["values"]["table"]["images"] == one["images"]
        assert json.loads((tmp_path / "1" / f"{one['dataset']}.json").read_text()) == json.loads(json.dumps(one))
    found = compare(tmp_path / "1", tmp_path / "2")
    assert {one.dataset for one in found} == set(names)
    assert not any(one.real for one in found)
    lines = (tmp_path / "1" / "results.csv").read_text().splitlines()
    assert sum(line.endswith(",source=table") for line in lines) == sum(len(one["metrics"]) for one in alone) - 3


def test_the_command_writes_what_it_is_asked_for(run, data):
    command = ["evaluate", str(run), "--data", str(data)]
    assert main([*command, "--by", "source", "--memorisation"]) == 0
    kept = {path.name.rpartition("val")[2] for path in (run / "eval" / "step-00000060").glob("*.json")}
    assert kept == {".json", ".memorisation.json"}
    assert main([*command, "--watch", "--perturb"]) == 2

"""What a run's model is, and how it takes pixels, is settled when the run begins, and kept in its folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from pipeline import config, dry_run
from pipeline import trained as loading
from pipeline.export.run import export
from pipeline.tracking import read_metrics
from tests.conftest import RECIPE
from tests.pipeline.towers import BERT
from tests.processes import train

HALF = [0.5, 0.5, 0.5]


@pytest.fixture
def start(dataset, recipe, tmp_path):
    """start(run, words, before, **changes) trains the recipe with these changes; its exit code."""

    def begin(run, *words, before=None, world=1, **changes):
        path = recipe(**{"optim": {"schedule": "constant", "warmup_steps": 0}, **changes})
        return train([str(path), str(tmp_path / run), "--data", str(dataset), *words], before=before, world=world)

    return begin


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def reason(run):
    return json.loads((run / "exit.json").read_text())["reason"]


def model_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())["model"]


def test_a_model_s_file_is_read_when_a_run_begins_and_never_again(start, dataset, tmp_path):
    path, run = tmp_path / "mine.json", tmp_path / "run"
    path.write_text(json.dumps(RECIPE["model"]["config"]))
    named = {"model": {"name": str(path), "config": {}}}
    assert start("straight", "train.steps=4") == 0
    assert start("run", "train.steps=2", world=2, **named) == 0
    assert model_of(run)["config"] == RECIPE["model"]["config"]
    shutil.copy(path, tmp_path / "other.json")
    path.unlink()
    assert start("run", "train.steps=4", world=2, **named) == 0
    asked = config.load(str(tmp_path / "recipe.yaml"), ["train.steps=5", f"data.datasets={dataset}"])
    assert dry_run.look(asked, run).problems == []
    assert losses(run) == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
    trained = loading.load(run)
    assert trained.model_cfg == RECIPE["model"]["config"]
    assert trained.recipe.model.name == str(path)
    assert export(run, formats=["open_clip"])["open_clip"]["max_abs"] <= 1e-5
    other = str(tmp_path / "other.json")
    assert start("run", "train.steps=5", model={"name": other, "config": {}}) == 2
    assert f"model.name: {str(path)!r} -> {other!r}" in reason(run)
    assert start("new", **named) == 2
    assert "mine.json' cannot be read" in reason(tmp_path / "new")


def test_a_text_tower_s_folder_is_read_when_a_run_begins_and_never_again(start, dataset, tmp_path):
    folder, run, copy = tmp_path / "bert", tmp_path / "run", tmp_path / "copy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BERT | {"vocab_size": 49408}))
    text_cfg = {"hf_model_name": str(folder), "context_length": 12, "hf_pooler_type": "cls_pooler"}
    named = {"model": {"config": {**RECIPE["model"]["config"], "text_cfg": text_cfg}}}
    assert start("straight", "train.steps=4", **named) == 0
    assert start("run", "train.steps=2", f"checkpoint.copy_to={copy}", **named) == 0
    folder.rename(tmp_path / "elsewhere")
    shutil.rmtree(run)
    assert start("run", "train.steps=4", f"checkpoint.copy_to={copy}", **named) == 0
    assert losses(run) == losses(tmp_path / "straight")
    asked = config.load(str(tmp_path / "recipe.yaml"), ["train.steps=5", f"data.datasets={dataset}"])
    assert dry_run.look(asked, run).problems == []
    trained = loading.load(run)
    assert trained.towers.encode_text(trained.tokenize(["a text"])).shape == (1, 16)
    assert trained.model_cfg["text_cfg"] == text_cfg
    assert start("new", **named) == 2
    assert "no config.json" in reason(tmp_path / "new")


def described_by_timm(rank):
    """timm's weights are not fetched; what timm says of them is."""
    from pipeline import pretrained

    pretrained._load_own = lambda towers, config: None


def nothing_to_ask(rank):
    from pipeline import begin

    begin.normalisation = None


def test_a_timm_tower_s_normalisation_reaches_training_and_stays(start, tmp_path):
    text_cfg = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision_cfg = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    own = {"embed_dim": 16, "vision_cfg": {**vision_cfg, "timm_model_pretrained": True}, "text_cfg": text_cfg}
    drawn = {**own, "vision_cfg": vision_cfg}
    plain, given, found = (tmp_path / name for name in ("plain", "given", "found"))
    assert start("plain", "train.steps=2", model={"config": drawn}) == 0
    assert start("given", "train.steps=3", model={"config": drawn, "image_mean": HALF, "image_std": HALF}) == 0
    assert start("found", "train.steps=2", model={"config": own}, before=described_by_timm) == 0
    assert start("found", "train.steps=3", model={"config": own}, before=nothing_to_ask) == 0
    assert losses(found) == losses(given)
    assert losses(plain)[0] != losses(found)[0]
    assert (model_of(found)["image_mean"], model_of(found)["image_std"]) == (HALF, HALF)
    assert model_of(plain)["image_mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    white = loading.load(found).preprocess(Image.new("RGB", (9, 9), (255, 255, 255)))
    torch.testing.assert_close(white, torch.ones_like(white))
    values = yaml.safe_load((plain / "config.yaml").read_text())  # as an older version has written it
    values["model"] = {"config": drawn}
    (plain / "config.yaml").write_text(yaml.safe_dump(values))
    assert start("plain", "train.steps=3", model={"config": drawn}, before=nothing_to_ask) == 0
    assert model_of(plain)["image_mean"] is None
    black = loading.load(plain).preprocess(Image.new("RGB", (9, 9)))[:, 0, 0]
    assert black.tolist() == pytest.approx([-1.7923, -1.7521, -1.4802], abs=1e-4)
    assert start("found", "train.steps=4", "model.image_mean=[0,0,0]", model={"config": own}) == 2
    assert "model.image_mean: [0.5, 0.5, 0.5] -> [0.0, 0.0, 0.0]" in reason(found)

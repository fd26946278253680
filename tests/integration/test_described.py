"""What a run's model is, and how it takes pixels, is settled when the run begins, and kept in its folder."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from PIL import Image

from pipeline import trained as loading
from pipeline.tracking import read_metrics
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
    assert start("found", "train.steps=4", "model.image_mean=[0,0,0]", model={"config": own}) == 2
    assert "model.image_mean: [0.5, 0.5, 0.5] -> [0.0, 0.0, 0.0]" in reason(found)

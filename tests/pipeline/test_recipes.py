"""The recipes that come along: each model can be built and trained as it says, on data of the size that it is for."""

from __future__ import annotations

import math
import re

import pytest

from pipeline import begin, config, memory, model
from pipeline.data.plan import Plan, Share
from pipeline.pretrained import open_clip
from pipeline.throughput import flops_per_sample

# Samples of the datasets that each recipe is for, and the ranks that it speaks of.
DATA = {
    "flickr30k_small": ([29_000], 1),
    "coco_vit_b32": ([113_287], 8),
    "coco_lit_b16": ([113_287], 8),
    "cc12m_vit_b16": ([10_500_000], 16),
    "datacomp_medium_b32": ([96_000_000], 8),
    "vqa_mix": ([113_287, 82_783], 8),
}
# open_clip's own counts of parameters in millions; of LiT ViT-B/16, BERT-base and a projection of 768².
MILLIONS = {"coco_vit_b32": 151.3, "cc12m_vit_b16": 149.6, "coco_lit_b16": 85.8 + 109.5 + 0.6}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """bert-base-uncased's description as transformers knows it by itself."""
    from open_clip import hf_model
    from transformers import BertConfig

    monkeypatch.setattr(hf_model.AutoConfig, "from_pretrained", lambda name: BertConfig())


def test_every_recipe_is_looked_at():
    assert {path.stem for path in config.RECIPES.glob("*.yaml")} == {*DATA, "demo"}


@pytest.mark.parametrize("name", DATA)
def test_its_model_can_be_built_and_trained(name):
    recipe = config.load(name)
    model_cfg = model.model_cfg(recipe.model.name, recipe.model.config)
    towers = memory.towers_without_numbers(recipe, model_cfg)
    assert all(value.is_meta for value in towers.parameters())
    sizes = [(value.numel(), value.requires_grad) for value in towers.parameters()]
    if name in MILLIONS:
        assert sum(size for size, _ in sizes) / 1e6 == pytest.approx(MILLIONS[name], abs=0.15)
    assert any(trains for _, trains in sizes)
    if recipe.model.pretrained:
        assert open_clip.get_pretrained_cfg(recipe.model.name, recipe.model.pretrained)


def planned(recipe, sizes):
    """Several datasets are mixed as vqa_mix says, 3 : 1."""
    weights = (3.0, 1.0) if len(sizes) > 1 else (1.0,)
    shares = [Share(str(size), [size // 100] * 100, weight) for size, weight in zip(sizes, weights, strict=True)]
    return Plan(
        shares, seed=0, global_batch=recipe.train.batch_size, lanes=recipe.data.lanes or 1, tail=recipe.data.tail
    )


@pytest.mark.parametrize("name", DATA)
def test_its_head_tells_the_ranks_and_the_operations_that_it_takes(name):
    sizes, world = DATA[name]
    recipe, text = config.load(name), (config.RECIPES / f"{name}.yaml").read_text()
    ranks = math.prod(map(int, re.findall(r"--n(?:nodes|proc-per-node) (\d+)", text)))
    hardware = re.search(r"Hardware: (\d+|one) GPU", text)[1]
    assert (ranks, 1 if hardware == "one" else int(hardware)) == (world, world)
    model_cfg = model.model_cfg(recipe.model.name, recipe.model.config)
    towers = memory.towers_without_numbers(recipe, model_cfg)
    a_pair = flops_per_sample(towers, model.image_size(towers), model_cfg["text_cfg"].get("context_length", 77))
    pairs = begin.length(recipe.train, planned(recipe, sizes)) * recipe.train.batch_size
    assert a_pair * pairs == pytest.approx(float(re.search(r"([\d.e]+) FLOP\b", text)[1]), rel=0.02)


@pytest.mark.parametrize("name", DATA)
def test_its_plan_can_be_made(name):
    sizes, world = DATA[name]
    recipe = config.load(name)
    plan = planned(recipe, sizes)
    total = begin.length(recipe.train, plan)
    assert plan.global_batch % world == 0
    assert recipe.optim.warmup_steps < total / 2
    assert recipe.checkpoint.every_steps <= total


@pytest.mark.parametrize("name", [*DATA, "demo"])
def test_its_head_says_how_it_is_run_and_what_it_costs(name):
    text = (config.RECIPES / f"{name}.yaml").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"pipeline train {name}" in line or f"RECIPE={name}" in line for line in head)
    assert "Cost: " in text or all(word in text for word in ("Hardware: ", "Expected: ", "Never run"))


@pytest.mark.parametrize("name", [*DATA, "demo"])
def test_its_image_tower_gets_pixels_as_it_was_trained_on(name, tmp_path):
    """LiT's between -1 and 1, as timm says; the others' as is usual for CLIP."""
    found = begin.resolved(config.load(name), tmp_path, begun=False).model
    lit = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    usual = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    assert (found.image_mean, found.image_std) == (lit if name == "coco_lit_b16" else usual)


def test_lit_trains_the_text_tower_and_the_temperature_alone():
    recipe = config.load("coco_lit_b16")
    towers = memory.towers_without_numbers(recipe, model.model_cfg("", recipe.model.config))
    trained = [name for name, value in towers.named_parameters() if value.requires_grad]
    assert {name.partition(".")[0] for name in trained} == {"text", "logit_scale"}
    assert "text.transformer.embeddings.word_embeddings.weight" in trained

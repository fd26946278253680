"""Layers in order: what is locked, and what learns at which rate."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from pipeline import layers, model
from pipeline.model import ModelError
from tests.pipeline.towers import (
    CONFIGS,
    PLAIN,
    batch,
    built,
    copied,
    kinds,
    loss_of,
)


@kinds()
@pytest.mark.parametrize("unlocked", [0, 1, 2])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_is_locked_stays_bit_for_bit_and_the_rest_moves(config, tower, unlocked):
    towers = built(config)
    groups = layers.layer_groups(towers, tower)
    locked = set(itertools.chain(*groups[: len(groups) - unlocked]))
    modules = {name.rpartition(".")[0] for name in locked}
    layers.lock(towers, **{"image": None, "text": None} | {tower: unlocked})
    before, parameters = copied(towers), dict(towers.named_parameters())
    optimizer = torch.optim.AdamW([one for one in towers.parameters() if one.requires_grad], lr=0.01)
    loss_of(towers.train()).backward()
    optimizer.step()
    for name, after in copied(towers).items():
        stays = name in locked or (name not in parameters and name.rpartition(".")[0] in modules)
        assert torch.equal(before[name], after) == stays, name
    assert before.keys() == model.build(config).state_dict().keys()


# How many, and what is in the stem and in the projection.
GROUPS = {
    ("image", "vit"): (4, "visual.conv1.weight", "visual.proj"),
    ("image", "resnet"): (7, "visual.conv3.weight", "visual.attnpool.c_proj.bias"),
    ("image", "timm vit"): (8, "visual.trunk.pos_embed", "visual.head.proj.weight"),
    ("image", "timm resnet"): (6, "visual.trunk.conv1.0.weight", "visual.head.proj.weight"),
    ("image", "timm, its own head"): (11, "visual.trunk.stem.0.weight", "visual.trunk.head.fc.weight"),
    ("text", "vit"): (4, "token_embedding.weight", "text_projection"),
    ("text", "bert"): (4, "text.transformer.embeddings.word_embeddings.weight", "text.proj.2.weight"),
}


@pytest.mark.parametrize(("tower", "config"), GROUPS, indirect=["config"])
def test_groups_reach_from_the_stem_to_the_projection(tower, config, request):
    count, first, last = GROUPS[tower, request.node.callspec.params["config"]]
    towers = model.build(config, init_bias=-10.0)
    groups = layers.layer_groups(towers, tower)
    assert (len(groups), first in groups[0], last in groups[-1]) == (count, True, True)
    names = [name for name, _ in towers.named_parameters() if name not in model.TEMPERATURE]
    expected = [name for name in names if name.startswith("visual.") == (tower == "image")]
    assert sorted(itertools.chain(*groups)) == sorted(expected)
    with pytest.raises(ModelError, match=f"{count} layer groups"):
        layers.lock(towers, **{"image": None, "text": None} | {tower: count})


@kinds("vit", "vit, own text class", "timm vit")
@pytest.mark.parametrize("unlocked", [1, 2, 3])
def test_groups_are_those_that_open_clip_unlocks(config, unlocked):
    mine, theirs = model.build(config), model.build(config)
    # open_clip's count of a timm tower's groups leaves its projection out.
    layers.lock(mine, image=unlocked + ("timm_model_name" in config["vision_cfg"]), text=unlocked)
    theirs.lock_image_tower(unlocked)
    theirs.lock_text_tower(unlocked)
    expected = [parameter.requires_grad for parameter in theirs.parameters()]
    assert [parameter.requires_grad for parameter in mine.parameters()] == expected


def test_locked_layers_drop_nothing_and_open_ones_do(bert):
    for unlocked in (0, 2):
        towers = built(bert)  # with BERT's dropout
        _, text = batch(towers)
        layers.lock(towers, image=None, text=unlocked)
        towers.train()
        transformer = towers.text.transformer
        assert not transformer.embeddings.dropout.training
        assert transformer.encoder.layer[1].attention.self.dropout.training == bool(unlocked)
        assert torch.equal(towers.encode_text(text), towers.encode_text(text)) != bool(unlocked)
        assert not towers.eval().text.transformer.encoder.layer[1].training


def test_a_lock_outlives_copies_and_replaced_modules():
    towers = built(CONFIGS["resnet"])
    assert layers.batch_statistics(towers)
    layers.lock(towers, image=1, text=None)
    assert layers.batch_statistics(towers) == []
    twin, synced = copy.deepcopy(towers), nn.SyncBatchNorm.convert_sync_batchnorm(towers)
    assert isinstance(synced.visual.bn1, nn.SyncBatchNorm)
    for changed in (twin, synced):
        assert not changed.train().visual.bn1.training
        assert changed.visual.attnpool.training


@kinds()
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_each_trained_parameter_is_in_one_group_and_decays_as_open_clip_s(config, layer_decay):
    towers = model.build(config, init_bias=-10.0)
    layers.lock(towers, image=1, text=None)
    groups = layers.parameter_groups(towers, lr=0.1, weight_decay=0.2, layer_decay=layer_decay)
    names = {parameter: name for name, parameter in towers.named_parameters()}
    found = {names[parameter]: group for group in groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in towers.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained.keys()
    assert sum(len(group["params"]) for group in groups) == len(trained)
    for name, group in found.items():
        # The rule of open_clip_train.
        exempt = trained[name].ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        assert group["weight_decay"] == (0.0 if exempt else 0.2)
        assert group["lr"] == 0.1 * group["lr_scale"]
    assert found["logit_scale"]["lr_scale"] == found["logit_bias"]["lr_scale"] == 1.0
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups, lr=0.1)


def test_a_table_of_biases_does_not_decay():
    table, kernel = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    groups = layers.parameter_groups(nn.ParameterDict({"bias_table": table, "kernel": kernel}), weight_decay=0.2)
    assert [(group["name"], group["params"]) for group in groups] == [("decayed", [kernel]), ("plain", [table])]


def test_the_rate_falls_from_group_to_group_below():
    towers = model.build(PLAIN)
    groups = layers.parameter_groups(towers, weight_decay=0.2, layer_decay=0.5)
    names = {parameter: name for name, parameter in towers.named_parameters()}
    scales = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales["visual.proj"] == scales["text_projection"] == 1.0
    assert scales["visual.transformer.resblocks.1.mlp.c_fc.weight"] == scales["visual.ln_post.weight"] == 0.5
    assert scales["transformer.resblocks.0.ln_1.bias"] == 0.25
    assert scales["token_embedding.weight"] == scales["visual.conv1.weight"] == 0.125

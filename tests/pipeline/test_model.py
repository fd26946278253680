"""Towers of every kind: described, built, fitted to a tokenizer, recomputed."""

from __future__ import annotations

import contextlib
import json

import open_clip
import pytest
import timm
import torch
from open_clip import hf_model

from pipeline import layers, model
from pipeline.model import ModelError
from tests.pipeline.towers import (
    CONFIGS,
    PAIRS,
    PLAIN,
    TEXT,
    VIT,
    batch,
    built,
    copied,
    described,
    equal,
    kinds,
    loss_of,
)


@kinds()
def test_towers_are_open_clip_s_and_drawn_by_the_seed(config):
    towers, again = built(config, 3, init_scale=20.0), built(config, 3, init_scale=20.0)
    assert isinstance(towers, open_clip.CLIP | open_clip.CustomTextCLIP)
    assert equal(copied(towers), copied(again))
    image_BD, text_BD, scale = model.build(config, init_scale=20.0)(*batch(towers))
    assert image_BD.shape == text_BD.shape == (PAIRS, 16)
    assert scale.item() == pytest.approx(20.0)
    assert {parameter.dtype for parameter in towers.parameters()} == {torch.float32}  # whatever config.json says


def test_a_model_is_found_by_name_and_by_file(tmp_path):
    assert model.model_cfg("ViT-B/32", {})["vision_cfg"]["patch_size"] == 32
    path = tmp_path / "mine.json"
    for name, named in (("vitb32", "Nearest: ViT-B-32"), (str(path), r"mine\.json")):
        with pytest.raises(ModelError, match=named):
            model.model_cfg(name, {})
    for content in (PLAIN, {"model_cfg": PLAIN, "preprocess_cfg": {}}):
        path.write_text(json.dumps(content))
        assert model.model_cfg(str(path), {}) == PLAIN
    for wrong in ("{", "[]", '{"embed_dim": 3}'):
        path.write_text(wrong)
        with pytest.raises(ModelError, match=r"mine\.json"):
            model.model_cfg(str(path), {})


def test_nothing_is_downloaded_to_build(bert, monkeypatch):
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", fetch)
    monkeypatch.setattr(hf_model.AutoModel, "from_pretrained", fetch)
    timm_vit = CONFIGS["timm vit"]["vision_cfg"] | {"timm_model_pretrained": True}
    model.build(described(**timm_vit))
    bert["text_cfg"]["hf_model_pretrained"] = True
    model.build(bert)
    with pytest.raises(ModelError, match="fetched"):
        model.build(described(timm_model_name="hf-hub:timm/test_vit.r160_in1k"))


def test_a_text_tower_without_its_description_says_what_to_do(bert, tmp_path, monkeypatch):
    bert["text_cfg"]["hf_model_name"] = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="folder"):
        model.build(bert)
    monkeypatch.setattr(hf_model, "transformers", None)
    with pytest.raises(ModelError, match=r"clip-pipeline\[hf\]"):
        model.build(bert)


@kinds("vit", "timm vit")
def test_patch_dropout_leaves_patches_out_in_training_only(config):
    towers = built(config, patch_dropout=0.5)
    image, _ = batch(towers)
    for training in (True, False):
        towers.train(training)
        assert torch.equal(towers.encode_image(image), towers.encode_image(image)) != training


def test_a_description_that_open_clip_refuses_is_a_user_s_error():
    for change in ({"timm_model_name": "no_such"}, {"depth": 3}, {"head_width": 64}):
        with pytest.raises(ModelError, match=next(iter(change))):
            model.build(described(**VIT | change))
    for kind in ("resnet", "timm resnet"):
        with pytest.raises(ModelError, match="patch_drop"):
            model.build(CONFIGS[kind], patch_dropout=0.5)


BPE = {"vocab_size": 49408, "end_id": 49407, "pad_id": 0}
PIECES = {"vocab_size": 50, "end_id": 3, "pad_id": 0}
ENDLESS = {**PIECES, "end_id": None}
# What the error says, if there is one.
POOLED = [
    ({}, BPE, ""),
    ({"pool_type": "eos", "eos_id": 49407}, BPE, ""),
    ({"pool_type": "last"}, BPE, ""),
    ({"pool_type": "first", "no_causal_mask": True}, BPE, ""),
    ({"embed_cls": True}, BPE, ""),
    ({**TEXT, "pool_type": "eos", "eos_id": 3}, PIECES, ""),
    ({**TEXT, "pool_type": "last"}, ENDLESS, ""),
    (TEXT, PIECES, "pool_type 'argmax'.*Set pool_type: eos, eos_id: 3"),
    ({**TEXT, "pool_type": "eos"}, PIECES, "eos_id 2"),
    ({"pool_type": "eos"}, BPE, "eos_id: 49407"),
    ({"pool_type": "first"}, BPE, "pool_type 'first'"),
    ({"pool_type": "none"}, BPE, "pool_type 'none'"),
    ({"embed_cls": True, "pad_id": 1}, BPE, "pad_id 1"),
    ({**TEXT, "pool_type": "eos", "eos_id": 3}, ENDLESS, "Set pool_type: last"),
    (TEXT, BPE, "vocab_size is 50"),
]


@pytest.mark.parametrize(("text_cfg", "tokenizer", "wrong"), POOLED)
def test_a_tokenizer_is_taken_where_texts_are_pooled_at_their_end(text_cfg, tokenizer, wrong):
    with pytest.raises(ModelError, match=wrong) if wrong else contextlib.nullcontext():
        model.check_tokenizer({"text_cfg": text_cfg}, **tokenizer)


def test_hugging_face_s_tower_is_asked_for_its_own_numbers(bert):
    model.check_tokenizer(bert, **PIECES)
    for change in ({"pad_id": 1}, {"vocab_size": 51}):
        with pytest.raises(ModelError, match="bert"):
            model.check_tokenizer(bert, **{**PIECES, **change})


@kinds("vit", "vit, own text class", "timm vit", "timm resnet", "bert")
@pytest.mark.parametrize("locked", [None, 3])
def test_gradients_are_those_without_checkpointing(config, locked):
    plain, saving = built(config), built(config)
    calls: list[object] = []
    model.checkpoint_activations(saving)
    for module in saving.modules():
        if type(module).__name__ in ("ResidualAttentionBlock", "Block", "BasicBlock", "BertLayer"):
            module.register_forward_pre_hook(lambda module, _: calls.append(module))
    for towers in (plain, saving):
        layers.lock(towers, image=None, text=locked)
        torch.manual_seed(7)  # of dropout
        loss_of(towers).backward()
    assert len(calls) > len(set(calls)), "no block was recomputed"
    for (name, one), (_, two) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_a_tower_that_cannot_checkpoint_is_named():
    with pytest.raises(ModelError, match="ModifiedResNet"):
        model.checkpoint_activations(model.build(CONFIGS["resnet"]))
    with pytest.raises(ModelError, match="DLA"):
        model.checkpoint_activations(model.build(described(timm_model_name="dla46x_c")))

"""Weights that towers begin with, from files, tags, timm and Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip import hf_model
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import model
from pipeline.model import ModelError
from pipeline.pretrained import load_pretrained, normalisation
from tests.pipeline.test_checkpoint import Touch
from tests.pipeline.towers import (
    PLAIN,
    TEXT,
    VIT,
    built,
    copied,
    described,
    equal,
    kinds,
)


def load(towers: model.Towers, config: dict[str, Any], pretrained: object = "", name: str = "") -> None:
    load_pretrained(towers, config, name=name, pretrained=str(pretrained))


def saved(state: dict[str, Tensor], folder: Path, form: str = "plain") -> Path:
    if form == "safetensors":
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    prefix = {"plain": "", "wrapped": "module.", "compiled": "module._orig_mod."}[form]
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(state if form == "plain" else {"epoch": 3, "state_dict": state}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


@kinds()
@pytest.mark.parametrize("form", ["safetensors", "plain", "wrapped", "compiled"])
def test_weights_are_loaded_from_a_file(config, tmp_path, form):
    source, towers = built(config, 1), built(config, 2)
    load(towers, config, saved(copied(source), tmp_path, form))
    assert equal(copied(towers), copied(source))


@kinds("vit", "vit, own text class")
@pytest.mark.parametrize("half", [False, True])
def test_old_names_and_other_sizes_are_brought_into_form_as_open_clip_does(config, tmp_path, half):
    state = {name: tensor.half() if half else tensor for name, tensor in copied(built(PLAIN, 1)).items()}
    larger = {**config, "vision_cfg": {**VIT, "image_size": 48}, "text_cfg": {**TEXT, "context_length": 12}}
    towers, theirs = built(larger, 2), built(larger, 3)
    load(towers, larger, saved(state, tmp_path))
    # It cannot resize half precision on a CPU.
    open_clip.load_checkpoint(theirs, str(saved({name: tensor.float() for name, tensor in state.items()}, tmp_path)))
    assert equal(copied(towers), copied(theirs))


@pytest.mark.parametrize(("theirs", "mine"), [(None, -10.0), (-5.0, None)])
def test_a_bias_is_the_caller_s_choice_and_one_side_may_lack_it(tmp_path, theirs, mine):
    config = {**PLAIN, "init_logit_bias": -3.0}  # as open_clip's own descriptions of SigLIP have it
    source, towers = built(config, 1, init_bias=theirs), model.build(config, init_bias=mine)
    load(towers, config, saved(copied(source), tmp_path))
    assert torch.equal(towers.visual.proj, source.visual.proj)
    assert (towers.logit_bias is None) == (mine is None)
    assert mine is None or towers.logit_bias.item() == mine


OTHERS = [
    (lambda state: state.pop("visual.proj"), r"lacks visual\.proj"),
    (lambda state: state.update({f"head.{index}": torch.ones(1) for index in range(9)}), "head.0.*and 6 more"),
    (lambda state: state.update({"visual.proj": torch.ones(32, 17)}), r"\(32, 17\), not \(32, 16\)"),
    (lambda state: state.update({"positional_embedding": torch.ones(9, 31)}), r"\(9, 31\), not \(8, 32\)"),
]


@pytest.mark.parametrize(("change", "named"), OTHERS)
def test_weights_of_another_model_are_refused_and_nothing_is_changed(tmp_path, change, named):
    state, towers, before = copied(built(PLAIN, 1)), built(PLAIN, 2), copied(built(PLAIN, 2))
    change(state)
    with pytest.raises(ModelError, match=named):
        load(towers, PLAIN, saved(state, tmp_path))
    assert equal(copied(towers), before)


def test_a_file_of_anything_else_is_refused_and_code_in_it_is_not_run(tmp_path):
    for content in ([], {}, {"epoch": 3}, {"state_dict": {"name": "no tensor"}}, Touch(tmp_path / "pwned")):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ModelError, match="tensors"):
            load(model.build(PLAIN), PLAIN, tmp_path / "weights.pt")
    assert not (tmp_path / "pwned").exists()


def test_a_tag_s_weights_are_fetched_through_open_clip(tmp_path, monkeypatch, caplog):
    source, towers = built(PLAIN, 1), built(PLAIN, 2)
    fetched: list[dict[str, Any]] = []
    path = saved(copied(source), tmp_path, "safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: fetched.append(tag) or str(path))
    load(towers, PLAIN, "laion2b_s34b_b79k", "ViT-B/32")
    assert equal(copied(towers), copied(source))
    assert fetched == [open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")]
    assert not caplog.records
    load(towers, PLAIN, "webli", "ViT-B-16-SigLIP")
    assert "normalised" in caplog.text


HALF = [0.5, 0.5, 0.5]


def test_pixels_are_normalised_as_the_weights_were_trained(tmp_path):
    """What is not known is OpenAI's: also of a file's weights, and of a tower that timm only draws."""
    openai = [list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)]
    described_by_file, weights = tmp_path / "model.json", tmp_path / "weights.pt"
    described_by_file.write_text(json.dumps({"model_cfg": PLAIN, "preprocess_cfg": {"mean": HALF}}))
    weights.touch()
    drawn = described(timm_model_name="vit_base_patch16_224.augreg_in21k")
    own = described(timm_model_name="vit_base_patch16_224.augreg_in21k", timm_model_pretrained=True)
    imagenet = described(timm_model_name="convnext_tiny", timm_model_pretrained=True)
    unknown = described(timm_model_name="convnext_tiny.none", timm_model_pretrained=True)
    for config, name, pretrained, expected in (
        (PLAIN, "ViT-B-16-SigLIP", "webli", [HALF, HALF]),
        (PLAIN, "ViT-B/32", "laion2b_s34b_b79k", openai),
        (own, "", "", [HALF, HALF]),
        (own, "", str(weights), openai),
        (imagenet, "", "", [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]),
        (drawn, "", "", openai),
        (unknown, "", "", openai),
        (PLAIN, str(described_by_file), str(weights), [HALF, openai[1]]),
        (PLAIN, str(described_by_file), "", [HALF, openai[1]]),
    ):
        assert [*map(list, normalisation(config, name=name, pretrained=pretrained))] == expected, (name, pretrained)
    with pytest.raises(ModelError, match="no file, and no tag"):
        normalisation(PLAIN, name="ViT-B-32", pretrained="none")


def test_weights_that_cannot_be_had_are_a_user_s_error(tmp_path, monkeypatch, bert):
    def fetch(_: object) -> str:
        raise FileNotFoundError("Failed to download file")

    monkeypatch.setattr(open_clip, "download_pretrained", fetch)
    (tmp_path / "weights.npz").touch()
    bert["text_cfg"]["hf_model_pretrained"] = True  # the folder holds a description only
    towers = model.build(PLAIN)
    for config, pretrained, named in (
        (PLAIN, "laion2b_s34b_b79k", "Without network"),
        (PLAIN, "laion2b", "laion2b_s34b_b79k"),
        (PLAIN, "openai", "ViT-B-32-quickgelu"),
        (PLAIN, tmp_path / "weights.npz", "npz"),
        (bert, "", "Hugging Face's weights"),
    ):
        with pytest.raises(ModelError, match=named):
            load(towers, config, pretrained, "ViT-B-32")


@kinds("timm vit", "bert")
def test_a_tower_s_own_weights_are_loaded_where_config_asks(config, tmp_path, monkeypatch):
    create, folder = timm.create_model, config["text_cfg"].get("hf_model_name")
    torch.manual_seed(5)
    if folder:
        part, where, asked = "text.transformer.", "text_cfg", "hf_model_pretrained"
        donor = hf_model.AutoModel.from_config(hf_model.AutoConfig.from_pretrained(folder)).float()
        donor.save_pretrained(folder)
    else:
        part, where, asked = "visual.trunk.", "vision_cfg", "timm_model_pretrained"
        donor = create("test_vit")
        torch.save(donor.state_dict(), tmp_path / "timm.pth")

    def from_disk(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        overlay = {"file": str(tmp_path / "timm.pth")} if pretrained else {}
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", from_disk)
    towers = built(config)
    before, random = copied(towers), torch.random.get_rng_state()
    load(towers, config)  # which asks for none
    assert equal(copied(towers), before)
    load(towers, {**config, where: config[where] | {asked: True}})
    assert torch.equal(torch.random.get_rng_state(), random)
    theirs = {part + name: tensor for name, tensor in donor.state_dict().items()}
    expected = {name: theirs[name] if name.startswith(part) else tensor for name, tensor in before.items()}
    assert equal(copied(towers), expected)

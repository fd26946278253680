"""Towers of every kind: built, loaded, locked, grouped, averaged."""

from __future__ import annotations

import contextlib
import copy
import itertools
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

from pipeline import layers, model
from pipeline.average import WeightAverage
from pipeline.model import ModelError
from pipeline.pretrained import load_pretrained
from tests.pipeline.test_checkpoint import Touch

PAIRS = 4
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}


def described(**vision_cfg: Any) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": TEXT}


PLAIN = described(**VIT)
CONFIGS = {
    "vit": PLAIN,
    "vit, own text class": {**PLAIN, "custom_text": True},
    "resnet": described(layers=[1, 1, 2, 1], width=8, head_width=16, image_size=32),
    "timm vit": described(timm_model_name="test_vit", timm_pool="token", image_size=160),
    "timm resnet": described(timm_model_name="test_resnet", timm_drop=0.5, image_size=64),
    "timm, its own head": described(timm_model_name="test_convnext", timm_proj="", image_size=64),
}
BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 12, "pad_token_id": 0, "dtype": "bfloat16"}


@pytest.fixture
def bert(tmp_path) -> dict[str, Any]:
    """A model whose text tower is Hugging Face's, described by a folder."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BERT))
    text_cfg = {"hf_model_name": str(folder), "context_length": 8, "hf_pooler_type": "cls_pooler"}
    return {**PLAIN, "text_cfg": text_cfg}


@pytest.fixture
def config(request, bert) -> dict[str, Any]:
    return bert if request.param == "bert" else CONFIGS[request.param]


def kinds(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", names or [*CONFIGS, "bert"], indirect=True)


def built(config: dict[str, Any], seed: int = 0, **options: Any) -> model.Towers:
    """Towers without a weight that is zero, so that a gradient reaches each of them."""
    torch.manual_seed(seed)
    towers = model.build(config, **options)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return towers


def batch(towers: model.Towers) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(PAIRS, 3, *model.image_size(towers), generator=generator)
    return image, torch.randint(1, 50, (PAIRS, 8), generator=generator)


def loss_of(towers: model.Towers) -> Tensor:
    image_BD, text_BD, scale, *_ = towers(*batch(towers))
    return nn.functional.cross_entropy(scale * image_BD @ text_BD.T, torch.arange(PAIRS))


def copied(towers: model.Towers) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in towers.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def load(towers: model.Towers, config: dict[str, Any], pretrained: object = "", name: str = "") -> None:
    load_pretrained(towers, config, name=name, pretrained=str(pretrained))


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


@kinds("vit", "resnet")
def test_the_average_is_the_closed_form(config):
    towers, decay = built(config), 0.9
    weights, average = [copied(towers)], WeightAverage(towers, decay)
    for step in range(1, 4):
        for tensor in towers.state_dict().values():
            tensor.add_(torch.full_like(tensor, step))
        weights.append(copied(towers))
        average.update(towers)
    factors = [decay**3, (1 - decay) * decay**2, (1 - decay) * decay, 1 - decay]
    parameters, found = dict(towers.named_parameters()), average.state_dict()
    assert list(found) == list(towers.state_dict())
    for name, tensor in found.items():
        expected = sum(factor * weight[name].double() for factor, weight in zip(factors, weights, strict=True))
        expected = expected if name in parameters else weights[-1][name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_average_goes_on_where_it_was_saved_and_equal_weights_leave_it():
    towers = built(PLAIN)
    average = WeightAverage(towers, 0.999)
    average.update(towers)
    assert equal(average.state_dict(), copied(towers))
    state = {name: tensor + 1 for name, tensor in towers.state_dict().items()}
    average.load_state_dict(state)
    assert equal(average.state_dict(), state)
    with pytest.raises(ModelError, match="lacks"):
        average.load_state_dict({})

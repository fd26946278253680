"""transformers' own classes give what was trained; a layer that they lack is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import trained as loading
from pipeline.export import huggingface, own_processing, parity, reload_huggingface
from pipeline.export import run as exporting
from pipeline.export.clip_weights import from_transformers, to_transformers
from pipeline.export.huggingface_tokenizer import ExportError
from tests.pipeline.test_export import EOS_POOL, TEXT, TIMM, VIT, make_run, train_vocabulary

SENTENCEPIECE = {**TEXT, **EOS_POOL}
DUAL = "vision-text-dual-encoder"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "a", "red", "star", "and", "generated", "text", "number", *"0123456789"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "bpe.model")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


def write_bert(folder: Path) -> Path:
    """A small BERT's description, in half precision, and its tokenizer."""
    from transformers import BertConfig, BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=0, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def bert_text(bert: Path, **settings: object) -> dict[str, object]:
    pooled = {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear", "hf_model_pretrained": False}
    return {"hf_model_name": str(bert), "context_length": 12, **pooled, **settings}


@pytest.fixture
def in_process(monkeypatch):
    """Reload here, where transformers has been imported already, and not in a process of its own."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        reload_huggingface.main(*map(Path, command[3:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(parity.subprocess, "run", run)


def exported(run: Path) -> dict[str, object]:
    """The figures of parity.json; the folder is RUN/export/huggingface."""
    return exporting.export(run, formats=["huggingface"])["huggingface"]


def with_bert(run: Path, bert: Path, vision: dict[str, object], text: dict[str, object]) -> Path:
    from pipeline import model, tokenizer

    make_run(run, vision, text, "huggingface")
    tokenizer.store("huggingface", bert, run / "tokenizer")
    model.keep_text({"text_cfg": text}, run)
    return run


@pytest.mark.parametrize(
    ("vision", "words", "kind"),
    [
        (VIT, "open_clip", "clip"),
        (VIT, "sentencepiece", "clip"),
        (TIMM, "open_clip", DUAL),
        (TIMM, "sentencepiece", DUAL),
        ({**TIMM, "timm_model_name": "test_vit", "image_size": 160}, "open_clip", DUAL),
        (
            {**TIMM, "timm_model_name": "test_vit", "image_size": 160, "timm_pool": ""},
            "open_clip",
            DUAL,
        ),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_both_vocabularies_with_both_kinds_of_image_tower_are_the_same(tmp_path, vocabulary, vision, words, kind):
    spelled = words == "sentencepiece"
    run = make_run(tmp_path, vision, SENTENCEPIECE if spelled else TEXT, words, vocabulary if spelled else None)
    found = exported(run)
    assert found["max_abs"] <= 1e-5
    assert (found["differing_tokens"], found["reordered_texts"], found["max_abs_pixels"]) == (0, 0, 0.0)
    # Generated images of 70 × 90 become 16 × 20 and 32 × 41.
    assert found["images_cropped_apart"] == 0
    # `&amp;`, and letters that ftfy joins.
    assert found["texts_changed_by_cleaning"] == 2
    assert json.loads((run / "export/huggingface/config.json").read_text())["model_type"] == kind
    assert not list((run / "export/huggingface").glob("*.py"))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("vision", [VIT, TIMM])
def test_a_hugging_face_text_tower_is_the_same(tmp_path, bert, vision):
    found = exported(with_bert(tmp_path, bert, vision, bert_text(bert)))
    assert found["max_abs"] <= 1e-5
    assert found["differing_tokens"] == 0
    files = [path for path in (tmp_path / "export/huggingface").iterdir() if path.suffix in (".json", ".md")]
    assert not [path for path in files if str(bert) in path.read_text()]


@pytest.mark.slow
def test_a_hugging_face_tokenizer_goes_with_a_text_tower_of_open_clip_s(tmp_path, bert):
    run = with_bert(tmp_path, bert, VIT, {**SENTENCEPIECE, "vocab_size": len(WORDS)})
    found = exporting.export(run, formats=["huggingface", "open_clip"])
    assert max(one["max_abs"] for one in found.values()) <= 1e-5
    assert found["open_clip"]["differing_tokens"] == 0


@pytest.mark.usefixtures("in_process")
def test_activations_widths_heads_and_epsilons_come_along(tmp_path):
    """Those that CLIP's own settings would get wrong, each with its counterpart."""
    from transformers import CLIPConfig

    vision = {**VIT, "layers": 2, "mlp_ratio": 1.7, "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}
    run = make_run(tmp_path, vision, {**TEXT, "mlp_ratio": 3.0, "norm_kwargs": {"eps": 0.1}}, "open_clip")
    assert exported(run)["max_abs"] <= 1e-5
    config = CLIPConfig.from_pretrained(run / "export/huggingface")
    assert (config.vision_config.hidden_act, config.text_config.hidden_act) == ("gelu_pytorch_tanh", "gelu")
    assert (config.vision_config.layer_norm_eps, config.text_config.layer_norm_eps) == (1e-3, 0.1)
    assert (config.vision_config.intermediate_size, config.text_config.intermediate_size) == (54, 48)


@pytest.mark.usefixtures("in_process")
def test_quick_gelu_and_the_text_tower_s_own_class_come_along(tmp_path):
    from pipeline import checkpoint, config, model

    described = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True, "custom_text": True}
    make_run(tmp_path, VIT, TEXT, "open_clip")
    recipe = config.load_file(tmp_path / "config.yaml")
    recipe = config.parse({**recipe.model_dump(mode="json"), "model": {"config": described}}, "test")
    checkpoint.write_atomically(tmp_path / "config.yaml", recipe.to_yaml())
    towers = model.build(described)
    checkpoint.publish(tmp_path, checkpoint.Checkpoint(2, towers.state_dict(), {}, {}))
    assert exported(tmp_path)["max_abs"] <= 1e-5
    written = json.loads((tmp_path / "export/huggingface/config.json").read_text())
    assert written["text_config"]["hidden_act"] == written["vision_config"]["hidden_act"] == "quick_gelu"


def test_what_comes_out_is_used_as_transformers_documents_it(tmp_path, vocabulary):
    """Model and processor by their names, what the processor makes given to the model as it is; short padding too."""
    from transformers import CLIPModel, CLIPProcessor

    run = make_run(tmp_path, VIT, SENTENCEPIECE, "sentencepiece", vocabulary, image_mean=[0.1, 0.2, 0.3])
    exported(run)
    model = CLIPModel.from_pretrained(run / "export/huggingface").eval()
    processor = CLIPProcessor.from_pretrained(run / "export/huggingface", backend="pil")
    image, texts = Image.new("RGB", (40, 20), (255, 51, 0)), ["red star", "a star and a red circle"]
    inputs = processor(text=texts, images=image, return_tensors="pt", padding=True, truncation=True)
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    with torch.inference_mode():
        theirs = model(**inputs)
        trained = loading.load(run)
        ours = trained.towers.encode_text(trained.tokenize(texts), normalize=True)
        image_D = trained.towers.encode_image(trained.preprocess(image)[None], normalize=True)
        logits = trained.towers.logit_scale.exp() * ours @ image_D.T
    torch.testing.assert_close(theirs.text_embeds, ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.logits_per_text, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("vision", "text", "layer"),
    [
        ({"ls_init_value": 0.1}, {}, r"resblocks\.0\.ls_1 \(LayerScale\)"),
        ({}, {"ls_init_value": 0.1}, r"resblocks\.0\.ls_1 \(LayerScale\)"),
        ({"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}, {}, r"visual\.attn_pool"),
        ({"pool_type": "avg"}, {}, "pool_type 'avg'"),
        ({"no_ln_pre": True}, {}, r"visual\.ln_pre"),
        ({"qk_norm": True}, {}, "CustomResidualAttentionBlock"),
        ({"image_size": [16, 24]}, {}, "not squares"),
        ({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, {}, "ModifiedResNet"),
        ({**TIMM, "timm_proj": "mlp"}, {}, r"visual\.head"),
        ({**TIMM, "timm_proj_bias": True}, {}, r"visual\.head"),
        ({**TIMM, "timm_proj": ""}, {}, r"visual\.head"),
        ({**TIMM, "timm_pool": "rot_attn", "timm_proj": "linear"}, {}, r"visual\.head"),
        ({}, {"pool_type": "last"}, "pool_type 'last'"),
        ({}, {"proj_bias": True}, r"text_projection \(with a bias\)"),
        ({}, {"no_causal_mask": True}, "no_causal_mask"),
    ],
)
def test_a_layer_without_a_counterpart_is_named(tmp_path, vision, text, layer):
    run = make_run(tmp_path, {**VIT, **vision}, {**TEXT, **text}, "open_clip")
    with pytest.raises(ExportError, match=f"{layer}.*Export to open_clip or onnx"):
        exported(run)
    assert not (run / "export/huggingface").exists()


def test_more_that_has_no_counterpart_is_named(tmp_path, bert, vocabulary):
    for number, (settings, named) in enumerate([
        ({"hf_pooler_type": "mean_pooler"}, "MeanPooler"),
        ({"hf_proj_type": "mlp"}, r"text\.proj \(Sequential"),
    ]):  # fmt: skip
        run = with_bert(tmp_path / str(number), bert, VIT, bert_text(bert, **settings))
        with pytest.raises(ExportError, match=named):
            exported(run)


def test_a_bias_on_logits_a_class_token_of_texts_and_the_legacy_end_of_text_are_refused(tmp_path, vocabulary):
    from pipeline import model

    described = {"embed_dim": 16, "vision_cfg": VIT, "custom_text": True}
    biased = model.build({**described, "text_cfg": SENTENCEPIECE}, init_bias=-10.0)
    trained = loading.load(make_run(tmp_path / "run", VIT, SENTENCEPIECE, "sentencepiece", vocabulary))
    with pytest.raises(ExportError, match=r"logit_bias \(the sigmoid loss's"):
        huggingface.write(trained.__class__(**{**vars(trained), "towers": biased}), tmp_path)
    appended = model.build({**described, "text_cfg": {**SENTENCEPIECE, "embed_cls": True}})
    with pytest.raises(ExportError, match=r"text\.cls_emb \(embed_cls\)"):
        huggingface.write(trained.__class__(**{**vars(trained), "towers": appended}), tmp_path)
    trained.tokenize.end_id = 2
    with pytest.raises(ExportError, match="end of text 2"):
        huggingface.write(trained, tmp_path)


def test_weights_return_from_their_other_names():
    from pipeline import model

    torch.manual_seed(0)
    state = model.build({"embed_dim": 16, "vision_cfg": {**VIT, "layers": 2}, "text_cfg": TEXT}).state_dict()
    theirs, left = to_transformers(state)
    assert not left
    back, left = from_transformers(theirs, state)
    assert not left
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert to_transformers({**state, "visual.extra": torch.zeros(1)})[1] == ["visual.extra"]
    assert from_transformers({**theirs, "extra": torch.zeros(1)}, state)[1] == ["extra"]


def test_the_crop_falls_elsewhere_by_a_pixel_where_half_of_one_is_rounded_otherwise():
    """Against both libraries, on every width that leaves 0 to 40 pixels over."""
    import open_clip
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side, sizes = 24, [(24 + more, 24) for more in range(41)]
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    square = {"height": side, "width": side}
    theirs = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)(images, return_tensors="np")
    ours = np.stack([open_clip.image_transform(side, is_train=False)(image).numpy() for image in images])
    found = own_processing.measure_pixels(ours, theirs["pixel_values"], sizes)
    assert found == {"max_abs_pixels": 0.0, "images_cropped_apart": 10}
    apart = np.abs(ours - theirs["pixel_values"]).max(axis=(1, 2, 3)) > 1e-5
    assert list(np.flatnonzero(apart)) == list(range(3, 41, 4))


def test_an_image_processor_that_gives_other_pixels_is_not_equal():
    equal = {"max_abs": 0.0, "max_abs_logits": 0.0}
    equal |= {"reordered_texts": 0, "reordered_images": 0, "differing_tokens": 0}
    assert parity.is_equal({**equal, "max_abs_pixels": 1e-6})
    for value in (1e-4, float("nan"), float("inf")):
        assert not parity.is_equal({**equal, "max_abs_pixels": value})
    pixels = np.zeros((1, 3, 8, 8))
    assert own_processing.measure_pixels(pixels, pixels + 0.5, [(8, 8)])["max_abs_pixels"] == 0.5
    assert own_processing.measure_pixels(pixels, pixels[..., 1:], [(8, 8)])["max_abs_pixels"] == np.inf


def test_texts_that_cleaning_changes_are_told_from_others():
    texts = ["a red star", "  two\tspaces ", "a &amp; b", "‘quoted’", "naïve ÜML", "日本語 😀"]
    assert own_processing.unchanged(texts).tolist() == [True, True, False, False, True, True]

"""What lies beside towers: another tool makes the same ids of it, whichever tokenizer the run had."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline import trained as loading
from pipeline.export import preparation, reload_preparation
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from tests.pipeline.test_export import TEXT, VIT, make_run, train_vocabulary

TEXTS = ["red star", "  blue \t circle ", "", "red star " * 30, "a ball ! Two!", "<|endoftext|> red"]


@pytest.fixture
def trained(tmp_path):
    return loading.load(make_run(tmp_path / "run", VIT, TEXT, "open_clip"))


def huggingface(folder):
    """Words by spaces, between [CLS] and [SEP], as BERT's are."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "star"])}
    fast = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)
    return HuggingFaceTokenizer(folder, 12)


@pytest.mark.parametrize("kind", ["open_clip", "huggingface"])
def test_tokenizers_makes_the_same_ids(trained, tmp_path, kind):
    if kind == "huggingface":
        trained = replace(trained, tokenize=huggingface(tmp_path / "theirs"))
    preparation.write(trained, tmp_path)
    known = json.loads((tmp_path / "preprocess.json").read_text())["text"]
    fast = Tokenizer.from_file(str(tmp_path / known["tokenizer"]))
    fast.enable_truncation(known["context_length"])
    fast.enable_padding(length=known["context_length"], pad_id=known["pad_id"])
    assert [fast.encode(" ".join(text.split())).ids for text in TEXTS] == trained.tokenize(TEXTS).tolist()
    assert known["end_id"] == trained.tokenize.end_id


def test_sentencepiece_s_own_model_comes_along_of_any_kind(trained, tmp_path):
    """Also one that is no BPE, which other formats cannot hold."""
    model = train_vocabulary(tmp_path / "unigram.model", "unigram", size=60)
    trained = replace(trained, tokenize=SentencePieceTokenizer(model, 12))
    preparation.write(trained, tmp_path)
    known = json.loads((tmp_path / "preprocess.json").read_text())["text"]
    assert (known["start_id"], known["end_id"], known["pad_id"]) == (2, 3, 0)
    pieces = SentencePieceProcessor(model_file=str(tmp_path / known["tokenizer"]))
    for text, ids in zip(TEXTS, trained.tokenize(TEXTS).tolist(), strict=True):
        found = [2, *pieces.encode(" ".join(text.split()))[:10], 3]
        assert found + [0] * (12 - len(found)) == ids


def test_a_tokenizer_that_no_other_tool_could_be_given_is_refused(trained, tmp_path, monkeypatch):
    tokenizer = huggingface(tmp_path / "theirs")
    monkeypatch.setattr(type(tokenizer.theirs), "is_fast", False)
    with pytest.raises(ExportError, match=r"PreTrainedTokenizerFast|TokenizersBackend"):
        preparation.write(replace(trained, tokenize=tokenizer), tmp_path)


def test_the_image_s_part_is_what_the_towers_and_the_recipe_say(trained, tmp_path):
    image = preparation.about(trained)["image"]
    assert image["size"] == [16, 16]
    assert (image["interpolation"], image["resize_mode"]) == ("bicubic", "shortest")
    assert [round(value, 3) for value in (*image["mean"], *image["std"])] == [0.481, 0.458, 0.408, 0.269, 0.261, 0.276]


@pytest.mark.parametrize("size", [16, [16, 40], [40, 16]])
def test_the_script_that_the_gate_runs_prepares_as_open_clip_does(tmp_path, size):
    run = make_run(tmp_path / "run", {**VIT, "image_size": size}, TEXT, "open_clip", image_mean=[0.1, 0.2, 0.3])
    trained = loading.load(run)
    preparation.write(trained, tmp_path)
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in [(16, 16), (19, 16), (50, 31), (40, 67), (16, 40), (7, 5)]
    ]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    reload_preparation.main(tmp_path, tmp_path)
    with np.load(tmp_path / "found.npz") as found:
        ours = np.stack([trained.preprocess(image).numpy() for image in images])
        np.testing.assert_allclose(found["pixels"], ours, atol=1e-6)
        assert found["tokens"].tolist() == trained.tokenize(TEXTS).tolist()
        np.testing.assert_allclose(found["logits"], [np.log(1 / 0.07), 0.0], atol=1e-6)

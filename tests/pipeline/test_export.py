"""What is exported is what was trained, said by the other library; what is not, is not published."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import sentencepiece
import torch
from PIL import Image

from data_prep.locations import path_of
from pipeline import checkpoint as checkpoints
from pipeline import config, model
from pipeline import trained as loading
from pipeline.checkpoint import Checkpoint
from pipeline.export import open_clip as writer
from pipeline.export import parity
from pipeline.export import run as exporting
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.failure import ParityError
from pipeline.model import ModelError
from pipeline.tokenizer import SentencePieceTokenizer, TokenizerError, load
from tests.pipeline.tars import members, write_tar

WORDS = ["red", "green", "Blue", "stern", "circle", "star", "straße", "naïve", "42", "left-of", "don't", "x₂"]
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TIMM = {"timm_model_name": "test_convnext", "image_size": 32, "timm_pool": "avg", "timm_proj": "linear"}
TEXT = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
EOS_POOL = {"vocab_size": 120, "pool_type": "eos", "eos_id": 3, "pad_id": 0}


def train_vocabulary(path, kind="bpe", size=120, **options):
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:4]]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=size,
            model_type=kind,
            normalization_rule_name="nmt_nfkc_cf",
            character_coverage=1.0,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
        )
    return path


def make_run(run, vision, text, kind, vocabulary=None, loss="info_nce", **settings):
    """A run folder with one checkpoint of random weights; a bias on logits is -7."""
    recipe = config.parse(
        {
            "model": {"config": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, **settings},
            "tokenizer": {"kind": kind},
            "loss": {"kind": loss},
            "train": {"steps": 1, "batch_size": 2},
        },
        "test",
    )
    (run / "tokenizer").mkdir(parents=True)
    if vocabulary:
        (run / "tokenizer" / "sentencepiece.model").write_bytes(vocabulary.read_bytes())
    checkpoints.write_atomically(run / "config.yaml", recipe.to_yaml())
    torch.manual_seed(1)
    towers = model.build(model.model_cfg("", recipe.model.config), init_bias=-7.0 if loss == "sigmoid" else None)
    checkpoints.publish(run, Checkpoint(1, towers.state_dict(), {}, {}))
    return run


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "bpe.model")


def test_a_sentencepiece_model_with_a_timm_tower_is_the_same_in_open_clip(tmp_path, vocabulary):
    run = make_run(tmp_path / "run", TIMM, {**TEXT, **EOS_POOL}, "sentencepiece", vocabulary)
    found = exporting.export(run, formats=["open_clip"])["open_clip"]
    assert found["max_abs"] <= 1e-5
    assert found["differing_tokens"] == 0
    assert json.loads((run / "export" / "parity.json").read_text())["open_clip"] == found


def test_a_bpe_model_with_a_vit_is_the_same_in_open_clip(tmp_path):
    run = make_run(tmp_path / "run", VIT, TEXT, "open_clip")
    found = exporting.export(run, formats=["open_clip"])["open_clip"]
    assert found["max_abs"] <= 1e-5
    assert found["differing_tokens"] == 0


def test_a_normalisation_of_the_run_s_own_is_the_same_in_open_clip(tmp_path):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    run = make_run(tmp_path / "run", VIT, TEXT, "open_clip", image_mean=mean, image_std=std)
    pixel_C = loading.load(run).preprocess(Image.new("RGB", (20, 30), (255, 51, 0)))[:, 0, 0]
    torch.testing.assert_close(pixel_C, torch.tensor([0.9 / 0.4, 0.0, -0.3 / 0.6]))
    assert exporting.export(run, formats=["open_clip"])["open_clip"]["max_abs"] <= 1e-5
    written = json.loads((run / "export" / "open_clip" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert (written["mean"], written["std"]) == (mean, std)


def test_the_sigmoid_loss_s_bias_is_the_same_in_open_clip(tmp_path):
    import open_clip

    run = make_run(tmp_path / "run", VIT, TEXT, "open_clip", loss="sigmoid")
    found = exporting.export(run, formats=["open_clip"])["open_clip"]
    assert (found["max_abs_logits"], found["differing_tokens"]) == (0.0, 0)
    assert open_clip.create_model(f"local-dir:{run / 'export/open_clip'}").logit_bias.item() == -7.0
    assert "-7.00 are its logits" in (run / "export/open_clip/README.md").read_text()


def test_a_bias_that_only_a_description_has_stays_behind(tmp_path):
    """As in open_clip's own of SigLIP, here trained by InfoNCE."""
    trained = loading.load(make_run(tmp_path / "run", VIT, TEXT, "open_clip"))
    writer.write(replace(trained, model_cfg={**trained.model_cfg, "init_logit_bias": -10}), tmp_path)
    assert "init_logit_bias" not in json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]


def test_a_text_tower_of_the_hub_s_goes_by_its_name_but_for_half_precision_and_folders(tmp_path):
    from transformers import AutoConfig, BertConfig

    (tmp_path / "bert").mkdir()
    for dtype, name, built_from in (
        (None, "google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("float32", "google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("bfloat16", "google-bert/bert-base-uncased", "./text_tower"),
        ("float32", str(tmp_path / "bert"), "./text_tower"),
        ("float32", str(tmp_path / "gone"), "./text_tower"),
    ):
        assert writer._text_tower(name, BertConfig(dtype=dtype, hidden_size=24), tmp_path / "out") == built_from
        assert (tmp_path / "out/text_tower").is_dir() is (built_from == "./text_tower")
        if built_from == "./text_tower":
            described = AutoConfig.from_pretrained(tmp_path / "out/text_tower")
            assert (described.dtype, described.hidden_size) == (torch.float32, 24)
            shutil.rmtree(tmp_path / "out")


def test_what_differs_is_not_published(tmp_path, vocabulary, monkeypatch):
    """One weight changed on the way out: a thousandth in one number of the text tower. The former export stays."""
    run = make_run(tmp_path / "run", VIT, {**TEXT, **EOS_POOL}, "sentencepiece", vocabulary)
    former = run / "export" / "open_clip" / "former"
    former.mkdir(parents=True)

    def write(trained, folder):
        before = trained.towers.text_projection.detach().clone()
        trained.towers.text_projection.data[0, 0] += 1e-3
        writer.write(trained, folder)
        trained.towers.text_projection.data.copy_(before)

    monkeypatch.setitem(exporting.FORMATS, "open_clip", exporting.FORMATS["open_clip"]._replace(write=write))
    with pytest.raises(ParityError, match="was not written"):
        exporting.export(run, formats=["open_clip"])
    assert [path.relative_to(run).as_posix() for path in sorted((run / "export").rglob("*"))] == [
        "export/open_clip",
        "export/open_clip/former",
    ]


ODD = [
    *("", " ", "  red   star  ", "\t\nred\r\nstar", "\x00\x07\x1bred\x7f", "long red star " * 40, "a" * 300),
    *("red &amp; green", "&lt;s&gt; &#39;red&#39;", "<s>", "</s> red <unk><pad>", "▁red▁▁star ▁", "red ▁"),
    *("STRASSE straße", "naı̈ve NAÏVE", "e\u0301", "A\u0332B", "A\u200dred", "½́ red", "ﬁ Ａｂ ①", "İıſ"),
    *(
        "日本語 한국어",
        "👩\u200d👩\u200d👧 ©\ufe0f 1\ufe0f\u20e3",
        "\u200d\u200bred",
        "\u0301red",
        "\u2028\u3000\u00a0red\ufeff",
    ),
]
# What normalisers trip over, beside what the vocabulary has.
PARTS = [
    *WORDS,
    *"aeRS ▁.,&;<",
    "  ",
    "<s>",
    "\n",
    "\u0301",
    "\u0332",
    "\u200d",
    "\u200b",
    "É",
    "½",
    "ﬁ",
    "Ａ",
    "ß",
    "日",
    "😀",
]


def test_ids_are_identical_on_odd_texts(tmp_path, vocabulary):
    """The fast tokenizer against SentencePiece itself: bos, pieces, eos, padding and what is cut off."""
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from open_clip.tokenizer import HFTokenizer

    from pipeline.export import huggingface_tokenizer

    ours = SentencePieceTokenizer(vocabulary, 12)
    huggingface_tokenizer.write(ours, tmp_path)
    theirs = HFTokenizer(str(tmp_path), context_length=12)
    assert ours(ODD).tolist() == theirs(ODD).tolist()

    @settings(max_examples=400, deadline=None)
    @given(st.one_of(st.lists(st.sampled_from(PARTS)).map("".join), st.lists(st.sampled_from(WORDS)).map(" ".join)))
    def compare(text):
        assert ours([text]).tolist() == theirs([text]).tolist()

    compare()

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(codec="utf-8", max_codepoint=0x2FF), max_size=40))
    def compare_latin(text):
        assert ours([text]).tolist() == theirs([text]).tolist()

    compare_latin()


def test_byte_fallback_comes_along(tmp_path):
    """What the vocabulary lacks is spelled in bytes, not unknown."""
    from open_clip.tokenizer import HFTokenizer

    from pipeline.export import huggingface_tokenizer

    ours = SentencePieceTokenizer(train_vocabulary(tmp_path / "bytes.model", size=380, byte_fallback=True), 24)
    huggingface_tokenizer.write(ours, tmp_path)
    texts = ["日 red 😀", *ODD]
    assert ours(texts).tolist() == HFTokenizer(str(tmp_path), context_length=24)(texts).tolist()
    assert 1 not in ours(["日 red 😀"])


def test_options_without_a_counterpart_are_refused(tmp_path):
    from pipeline.export import huggingface_tokenizer

    for number, options in enumerate([{"user_defined_symbols": ["<sep>"]}, {"add_dummy_prefix": False}]):
        path = train_vocabulary(tmp_path / f"{number}.model", **options)
        with pytest.raises(ExportError, match="holds SentencePiece's defaults"):
            huggingface_tokenizer.write(SentencePieceTokenizer(path, 12), tmp_path)


def test_real_inputs_come_from_the_data_and_else_are_generated(dataset, tmp_path):
    found = parity.real_inputs(str(dataset))
    assert found.origin == "train/00000.tar"  # this dataset has no evaluation set
    assert len(found.images) == 17
    assert [image.size for image in found.images[-2:]] == [(24, 20), (20, 20)]
    assert found.texts[0].startswith(("picture number", "noise"))
    assert set(parity.ODD_TEXTS) <= set(found.texts)
    for gone in ("", str(tmp_path / "gone"), "s3://", "pipe:cat"):
        assert parity.real_inputs(gone).origin == "generated"


def test_real_inputs_come_from_other_tools_tars_too_without_images_that_do_not_decode(tmp_path, bucket):
    broken = {f"{number:09d}.jpg": b"no image" for number in range(3)}
    tar = write_tar(tmp_path / "tars/00000.tar", broken | members(3) | members(4))
    for address in (str(tmp_path / "tars"), f"{bucket}/tars"):
        path_of(f"{address}/{tar.name}").write_bytes(tar.read_bytes())
        found = parity.real_inputs(address)
        assert (found.origin, [image.size for image in found.images]) == ("00000.tar", [(40, 30), (40, 30), (30, 30)])
        assert found.texts[:2] == ["picture 3", "number 3 seen again"]
    write_tar(tmp_path / "none/00000.tar", broken)
    assert parity.real_inputs(str(tmp_path / "none")).origin == "generated"


def test_unigram_vocabularies_are_refused(tmp_path):
    run = make_run(
        tmp_path / "run",
        VIT,
        {**TEXT, **EOS_POOL},
        "sentencepiece",
        train_vocabulary(tmp_path / "unigram.model", "unigram", size=60),
    )
    with pytest.raises(ExportError, match="not a BPE model"):
        exporting.export(run, formats=["open_clip"])


def test_unknown_formats_and_missing_runs_are_named(tmp_path):
    with pytest.raises(ExportError, match="'onxx' is not known; there is open_clip"):
        exporting.export(tmp_path, formats=["onxx"])
    with pytest.raises(checkpoints.CheckpointError, match="there is none"):
        exporting.export(tmp_path, formats=["open_clip"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_type": "argmax"}, "pool_type"),
        ({"eos_id": 2}, "eos_id: 3"),
        ({"vocab_size": 50}, "vocab_size is 50, but the tokenizer has"),
    ],
)
def test_a_tower_that_would_pool_the_wrong_token_is_refused(vocabulary, changes, message):
    with pytest.raises(ModelError, match=message):
        load("sentencepiece", vocabulary, {"text_cfg": {**TEXT, **EOS_POOL, **changes}})


def test_a_missing_vocabulary_says_how_to_make_one(tmp_path):
    with pytest.raises(TokenizerError, match="data_prep vocabulary"):
        load("sentencepiece", tmp_path / "none.model", {"text_cfg": {**TEXT, **EOS_POOL}})

"""Token ids: open_clip's own, found faster."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

from pipeline import tokenizer
from pipeline.model import ModelError
from pipeline.tokenizer import OpenClipTokenizer, TokenizerError, cleaned

OURS, THEIRS = OpenClipTokenizer(16), SimpleTokenizer(context_length=16)
ODD = ["", "  two  blanks ", "ÜMLAUTS İ ½"]
ODD += ["a &amp;amp;amp; b &lt", "日本語 😀", "<start_of_text> don't", "x\ty\nz", "long " * 40]


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(max_size=60) | st.text("abc XYZ'&#;<>.,-_01 \t", max_size=60), min_size=1, max_size=4))
def test_ids_are_open_clip_s(texts):
    assert torch.equal(OURS(texts), THEIRS(texts))


def test_odd_texts_have_open_clip_s_ids():
    assert torch.equal(OURS(ODD), THEIRS(ODD))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(max_codepoint=127), max_size=60))
def test_plain_texts_are_cleaned_as_ftfy_cleans_them(text):
    for name in ("whitespace", "lower"):
        ours = cleaned(text, get_clean_fn(name))
        assert (ours.lower() if name == "lower" else ours) == get_clean_fn(name)(text)


def test_the_words_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(tokenizer, "REMEMBERED", 5)
    ours = OpenClipTokenizer(16)
    texts = [f"w{chr(97 + number)}x y{chr(97 + number)}z" for number in range(26)]
    assert torch.equal(ours(texts), THEIRS(texts))
    assert len(ours._ids) <= 5


@pytest.mark.parametrize("length", [3, 16])
def test_what_is_too_long_is_cut_before_the_end(length):
    ours, theirs = OpenClipTokenizer(length), SimpleTokenizer(context_length=length)
    assert torch.equal(ours(["one two three four"]), theirs(["one two three four"]))


@pytest.fixture
def bert(tmp_path):
    """A folder with a small BERT's tokenizer and description."""
    from transformers import BertConfig, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "on", "the", "beach", "##es", ",", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "bert"
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=0,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_ids_of_a_hugging_face_tower_are_open_clip_s(bert, tmp_path):
    from open_clip.tokenizer import HFTokenizer

    text_cfg = {"hf_model_name": str(bert), "context_length": 8}
    kept = tokenizer.store("huggingface", bert, tmp_path / "kept")
    ours = tokenizer.load("huggingface", kept, {"text_cfg": text_cfg})
    theirs = HFTokenizer(str(bert), context_length=8)
    texts = ["a dog  on the beaches, a cat.", "", "A Dog &amp; " * 9]
    assert torch.equal(ours(texts), theirs(texts))
    assert ours(texts).dtype == torch.int64
    assert (ours.pad_id, ours.end_id) == (0, 3)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(texts), ours(texts))


def test_a_tokenizer_that_does_not_fit_the_text_tower_is_refused(bert, tmp_path):
    with pytest.raises(ModelError, match="vocab_size"):
        tokenizer.load("open_clip", tmp_path, {"text_cfg": {"vocab_size": 100}})
    with pytest.raises(ModelError, match="positions"):
        tokenizer.load("huggingface", bert, {"text_cfg": {"hf_model_name": str(bert), "context_length": 99}})
    with pytest.raises(TokenizerError, match="no tokenizer"):
        tokenizer.store("huggingface", tmp_path / "nowhere", tmp_path / "kept")

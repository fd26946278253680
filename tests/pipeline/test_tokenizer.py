"""Token ids: open_clip's own, found faster."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

from pipeline import tokenizer
from pipeline.tokenizer import OpenClipTokenizer, cleaned

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

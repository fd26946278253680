"""Changed captions: what is changed and what never is, the same on every machine; and figures worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate import perturb, retrieval
from pipeline.evaluate.nouns import nouns
from pipeline.evaluate.perturb import exchanged, measure, replaced, shuffled
from pipeline.evaluate.sets import Item

CAPTIONS = (
    ("A dog sleeps on a couch.", "An orange couch with a dog"),
    ("Two men ride an elephant", "People on an animal"),
    ("An umbrella stands near a table .",),
    ("THE CAT IS ON THE CAR", "wow"),
)


def items(captions=CAPTIONS):
    return [Item(str(number), Path("0.tar"), 0, 1, captions=texts) for number, texts in enumerate(captions)]


def found(text):
    return [noun.text for noun in nouns(text)]


def test_nouns_stand_for_things():
    assert found("A girl throws a tennis ball to the other side of a group of dogs.") == ["girl", "ball", "dogs"]
    assert found("Two brown dogs are running quickly") == ["dogs"]
    assert found("") == found("!?") == found("of the") == []
    nouns_ = nouns("a man holds a cat and a hat")
    assert [noun.relations for noun in nouns_] == [0, 1, 1]
    assert {noun.tag for noun in nouns_} == {"NN1"}


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(["A", "a", "dog", "cat's", "red", "é", "on"]), max_size=8),
    st.sampled_from(["", ".", " ."]),
)
def test_shuffled_captions_have_the_same_words_in_another_order(words, end):
    text = " ".join(words) + end
    changed = shuffled(text)
    if len({word.lower() for word in words}) < 2:
        assert changed is None
    else:
        assert changed.endswith(end)
        found = changed.removesuffix(end).split()
        assert sorted(found) == sorted(words)
        assert [word.lower() for word in found] != [word.lower() for word in words]
        assert changed == shuffled(text)


def test_draws_never_change():
    """Figures of other days stay comparable: these are what the first version drew."""
    assert shuffled("a dog sleeps on the couch.") == "a the couch dog on sleeps."


def test_nouns_are_exchanged_with_capitals_and_articles():
    def change(text):
        return exchanged(text, nouns(text))

    assert change("Dogs run over hills.") == "Hills run over dogs."
    assert change("An umbrella stands near a table .") == "A table stands near an umbrella ."
    assert change("THE CAT IS ON THE CAR") == "THE CAR IS ON THE CAT"
    assert change("a cat in front of a TV") == "a TV in front of a cat"


@pytest.mark.parametrize(
    "text", ["a dog and a cat", "a dog near a dog", "a dog near dogs", "two dogs on a couch", "a dog runs", "wow"]
)
def test_nouns_that_are_not_exchanged(text):
    """Nothing stands between them, they are alike, or differ in number; or there are not two."""
    assert exchanged(text, nouns(text)) is None


def test_a_noun_gives_way_to_one_that_is_not_said_of_the_image():
    text = "a dog runs"
    pool = {"NN1": nouns("the dog likes the umbrella") + nouns("a cat is there"), "NN2": []}
    assert replaced(text, nouns(text), pool, {"dog", "cat"}) == "an umbrella runs"
    assert replaced(text, nouns(text), pool, {"dog", "umbrella"}) == "a cat runs"
    assert replaced(text, nouns(text), pool, {"dog", "cat", "umbrella"}) is None
    assert replaced("wow", [], pool, set()) is None


def test_every_caption_is_changed_or_left_out():
    changed = perturb.perturb(items())
    assert changed == perturb.perturb(items())
    every = [text for captions in CAPTIONS for text in captions]
    owners = [number for number, captions in enumerate(CAPTIONS) for _ in captions]
    for one in changed.values():
        assert one.places == sorted(set(one.places))
        for place, text in zip(*one, strict=True):
            assert text not in CAPTIONS[owners[place]]
    assert changed["shuffled"].places == [0, 1, 2, 3, 4, 5]
    assert changed["nouns_exchanged"].places == [0, 1, 4, 5]
    assert "COUCH" not in changed["noun_replaced"].texts
    described = perturb.describe(every, changed)["perturbations"]
    assert (described["shuffled"]["captions"], described["shuffled"]["left_out"]) == (6, 1)


def test_a_change_that_is_another_caption_of_the_image_is_none():
    both = ("a cat on a dog", "a dog on a cat")
    assert perturb.perturb(items([both]))["nouns_exchanged"].texts == []
    assert perturb.perturb(items([both[:1]]))["nouns_exchanged"].texts == [both[1]]


def test_figures_worked_by_hand():
    """Of four images, captions 0 to 3 find theirs; changed, 0 still does, 1 finds the next, 3 likes all alike."""
    image_ND = torch.eye(4)
    changed_CD = torch.stack([image_ND[0], image_ND[2], F.normalize(torch.ones(4), dim=0)])
    found = {
        name: one.figure()
        for name, one in measure(image_ND, image_ND, range(4), {"way": ([0, 1, 3], changed_CD)}).items()
    }
    assert found["image_retrieval_recall@1_way"] == pytest.approx((1 + 0 + 1 / 4) / 3)
    assert found["image_retrieval_recall@1_way_drop"] == pytest.approx((0 + 1 + 3 / 4) / 3)
    # The first changed caption is as near as the true one: a half.
    assert found["true_caption_preferred_way"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["image_retrieval_recall@5_way"] == 1


def test_unchanged_texts_give_the_figures_of_retrieval_in_every_gallery():
    random = torch.Generator().manual_seed(0)
    image_ND = F.normalize(torch.randn(12, 5, generator=random), dim=1)
    owners = [image for image in range(12) for _ in range(1 + image % 3)]
    text_MD = F.normalize(image_ND[owners] + torch.randn(len(owners), 5, generator=random), dim=1)
    for folds in (1, 3):
        plain = retrieval.measure(image_ND, text_MD, owners, folds=folds).sampled
        found = measure(image_ND, text_MD, owners, {"way": (range(len(owners)), text_MD)}, folds=folds)
        for k in (1, 5, 10):
            name = f"image_retrieval_recall@{k}"
            assert found[f"{name}_way"].figure() == plain[name].figure()
            assert found[f"{name}_way_drop"].figure() == 0
        assert found["true_caption_preferred_way"].figure() == 0.5

"""When an export counts as equal: by its embeddings, by what they find, and by its tokens."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.export import parity


def unit(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def ours():
    random = np.random.default_rng(0)
    images, texts = (unit(random.standard_normal((count, 8))) for count in (5, 7))
    return {"images": images, "texts": texts, "tokens": random.integers(0, 9, (7, 4))}


def test_the_same_is_equal(ours):
    found = parity.measure(ours, ours)
    assert found == {
        **{"max_abs": 0.0, "max_abs_images": 0.0, "max_abs_texts": 0.0},
        **{"reordered_texts": 0, "reordered_images": 0, "differing_tokens": 0},
    }
    assert parity.is_equal(found)


def test_tokens_that_it_was_given_are_not_compared(ours):
    found = parity.measure(ours, {name: ours[name] for name in ("images", "texts")})
    assert found["differing_tokens"] is None
    assert parity.is_equal(found)


@pytest.mark.parametrize("name", ["images", "texts"])
@pytest.mark.parametrize("change", [2e-5, -2e-5, np.nan, np.inf])
def test_one_number_beyond_the_tolerance_is_not_equal(ours, name, change):
    theirs = {key: value.copy() for key, value in ours.items()}
    theirs[name][2, 3] += change
    assert not parity.is_equal(parity.measure(ours, theirs))


def test_one_token_or_another_shape_is_not_equal(ours):
    for name, other in (
        ("tokens", ours["tokens"] + np.eye(7, 4, dtype=np.int64)[[0]]),
        ("tokens", ours["tokens"][:, :3]),
        ("images", ours["images"][:4]),
        ("texts", ours["texts"][:, :7]),
    ):
        assert not parity.is_equal(parity.measure(ours, ours | {name: other})), name


def test_a_ranking_that_turns_within_the_tolerance_of_each_number_is_not_equal():
    """512 differences of 9e-6 add up: the text that leads by 5e-5 comes second, and no number differs by 1e-5."""
    random = np.random.default_rng(0)
    first_D, second_D, image_D = (unit(random.standard_normal(512)) for _ in range(3))
    lead_D = (first_D - second_D).astype(np.float64)
    image_D = image_D + lead_D * (5e-5 - image_D @ lead_D) / (lead_D @ lead_D)
    ours = {"images": np.float32([image_D]), "texts": np.stack([first_D, second_D]), "tokens": np.zeros((2, 1))}
    theirs = ours | {"images": ours["images"] - np.float32(9e-6 * np.sign(lead_D))}
    found = parity.measure(ours, theirs)
    assert found["max_abs"] <= parity.TOLERANCE
    assert (found["reordered_texts"], found["reordered_images"]) == (1, 0)
    assert not parity.is_equal(found)


def test_reordered_counts_by_hand():
    """Four items that lead by .3, .2, .1 and 0; .1 and .1 + 5e-6 tie."""
    ours = np.array([[0.3, 0.2, 0.1, 0.1 + 5e-6]])
    assert parity.reordered(ours, ours) == 0
    assert parity.reordered(ours, np.array([[0.3, 0.2, 0.11, 0.1]])) == 0  # the tie turned
    assert parity.reordered(ours, np.array([[0.3, 0.1, 0.2, 0.05]])) == 1  # .2 stands behind .1
    assert parity.reordered(ours, np.array([[0.0, 0.1, 0.2, 0.3]])) == 2  # .3 and .2 stand behind both of .1
    assert parity.reordered(np.vstack([ours, ours]), np.vstack([ours, ours[:, ::-1]])) == 2

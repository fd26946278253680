"""When an export counts as equal: by its embeddings, by what they find, and by its tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline import trained as loading
from pipeline.export import parity, preparation
from pipeline.export.run import PREPARATION
from tests.pipeline.test_export import TEXT, VIT, make_run


def unit(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def ours():
    random = np.random.default_rng(0)
    images, texts = (unit(random.standard_normal((count, 8))) for count in (5, 7))
    return {"images": images, "texts": texts, "tokens": random.integers(0, 9, (7, 4)), "logits": np.array([2.5, -10.0])}


def test_the_same_is_equal(ours):
    found = parity.measure(ours, ours)
    assert found == {
        **{"max_abs": 0.0, "max_abs_images": 0.0, "max_abs_texts": 0.0},
        **{"reordered_texts": 0, "reordered_images": 0, "differing_tokens": 0, "max_abs_logits": 0.0},
    }
    assert parity.is_equal(found)


@pytest.mark.parametrize("name", ["images", "texts", "logits"])
@pytest.mark.parametrize("change", [2e-5, -2e-5, np.nan, np.inf])
def test_one_number_beyond_the_tolerance_is_not_equal(ours, name, change):
    theirs = {key: value.copy() for key, value in ours.items()}
    theirs[name].flat[-1] += change
    assert not parity.is_equal(parity.measure(ours, theirs))


def test_one_token_or_another_shape_is_not_equal(ours):
    for name, other in (
        ("tokens", ours["tokens"] + np.eye(7, 4, dtype=np.int64)[[0]]),
        ("tokens", ours["tokens"][:, :3]),
        ("images", ours["images"][:4]),
        ("texts", ours["texts"][:, :7]),
        ("logits", ours["logits"][:1]),
    ):
        assert not parity.is_equal(parity.measure(ours, ours | {name: other})), name


def test_a_ranking_that_turns_within_the_tolerance_of_each_number_is_not_equal():
    """512 differences of 9e-6 add up: the text that leads by 5e-5 comes second, and no number differs by 1e-5."""
    random = np.random.default_rng(0)
    first_D, second_D, image_D = (unit(random.standard_normal(512)) for _ in range(3))
    lead_D = (first_D - second_D).astype(np.float64)
    image_D = image_D + lead_D * (5e-5 - image_D @ lead_D) / (lead_D @ lead_D)
    ours = {"images": np.float32([image_D]), "texts": np.stack([first_D, second_D])}
    ours |= {"tokens": np.zeros((2, 1)), "logits": np.zeros(2)}
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


# What `tokenizers` would find in every text.
EXCLAMATION = {"id": 0, "content": "!", "special": True}
EXCLAMATION |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
TOWERS = """
import sys, shutil
shutil.copy(f"{sys.argv[1]}/towers.npz", f"{sys.argv[2]}/found.npz")
"""


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("preprocess.json", lambda known: known),
        ("preprocess.json", lambda known: known["image"]["mean"].reverse()),
        ("preprocess.json", lambda known: known["text"].update(pad_id=1)),
        ("preprocess.json", lambda known: known["logits"].update(bias=-10.0)),
        ("tokenizer.json", lambda known: known["added_tokens"].append({**EXCLAMATION})),
    ],
    ids=["as it was", "mean", "padding", "bias", "a token in texts"],
)
def test_what_lies_beside_towers_is_compared_too(tmp_path, file, changed):
    """The towers' own embeddings, and a preparation with one thing changed."""
    trained, inputs = loading.load(make_run(tmp_path / "run", VIT, TEXT, "open_clip")), parity.real_inputs("")
    with torch.inference_mode():
        pixel_BCSS = torch.stack([trained.preprocess(image) for image in inputs.images])
        images = trained.towers.encode_image(pixel_BCSS, normalize=True)
        texts = trained.towers.encode_text(trained.tokenize(inputs.texts), normalize=True)
    np.savez(tmp_path / "towers.npz", images=images.numpy(), texts=texts.numpy())
    (tmp_path / "towers.py").write_text(TOWERS)
    preparation.write(trained, tmp_path)
    known = json.loads((tmp_path / file).read_text())
    same = changed(known) is known
    (tmp_path / file).write_text(json.dumps(known))
    found = parity.compare(trained, tmp_path, (tmp_path / "towers.py", PREPARATION), inputs)
    assert parity.is_equal(found) is same
    assert found["max_abs"] == 0.0
    assert found["texts_changed_by_cleaning"] == 2

"""Pictures of a report: the best and the worst are what they are called, and a word is seen where it is."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline import report_pictures
from pipeline.evaluate.embed import Embedder
from pipeline.evaluate.run import evaluate
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.sources import find
from pipeline.trained import load
from tests.pipeline.test_during import data, one_thread, run  # noqa: F401 (fixtures)

SIDE = 32
CORNER = slice(0, 8)


class Towers(nn.Module):
    """An image is (how bright its upper left corner is, 1); "bright" is the first axis, all else the second."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.visual = nn.Module()
        self.visual.image_mean, self.visual.image_std = (0.0,) * 3, (1.0,) * 3

    def encode_image(self, image, normalize):
        bright = image[:, :, CORNER, CORNER].mean(dim=(1, 2, 3))
        return nn.functional.normalize(torch.stack([bright, torch.ones_like(bright)], dim=1), dim=1)

    def encode_text(self, token, normalize):
        return nn.functional.one_hot(token[:, 0], 2).float()


class Model:
    towers = Towers()

    @staticmethod
    def tokenize(texts):
        return torch.tensor([[0 if text == "bright" else 1] for text in texts])

    @staticmethod
    def preprocess(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


class Picture:
    """An item with a bright corner."""

    key, captions = "s0", ("bright and not", "other")

    @staticmethod
    def open():
        image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        image[CORNER, CORNER] = 255
        return Image.fromarray(image)


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))), dtype=float)


def test_a_word_is_seen_where_its_patch_is():
    (found,) = report_pictures.word_maps(Model(), [Picture()], batch_size=7)
    assert [one["word"] for one in found["maps"]] == ["bright", "and", "not"]
    bright = found["maps"][0]
    assert bright["similarity"] == pytest.approx(0.5**0.5)
    # Hidden whole, the corner has the mean of the picture, 1/16.
    hidden = 1 / 16 / (1 + 1 / 256) ** 0.5
    fall = 0.5**0.5 - hidden
    assert 0.5 * fall < bright["most"] <= fall + 1e-6
    map_ = decoded(bright["source"]) - 0.4 * decoded(found["source"])
    assert map_[:20, :20].mean() > 4 * map_[80:, 80:].mean()
    # What the corner hides, the rest gains: "and" is seen nowhere.
    assert found["maps"][1]["most"] <= 1e-6


def test_the_places_of_a_patch_cover_the_picture():
    _, mask_PSS = report_pictures._hide(torch.zeros(3, 30, 50))
    assert (mask_PSS.sum(dim=0) > 0).all()
    assert {int(mask.sum()) for mask in mask_PSS} == {round(30 / 4) * round(50 / 4)}


def test_the_best_come_first_and_the_worst_last(run, data):  # noqa: F811
    source = next(one for one in find(data) if one.name == "pairs_test")
    model = load(run)
    found = report_pictures.retrieval(source, Embedder(model, 5, 0))
    items = source.items()
    image_ND = Embedder(model, 5, 0).images(items)
    for which in ("best", "worst"):
        for example in found["to_images"][which]:
            score_N = image_ND @ Embedder(model, 5, 0).texts([example["text"]])[0]
            owners = [number for number, item in enumerate(items) if example["text"] in item.captions]
            assert example["rank"] in [1 + int((score_N > score_N[owner]).sum()) for owner in owners]
    ranks = {which: [one["rank"] for one in found["to_images"][which]] for which in ("best", "worst")}
    assert ranks["best"] == sorted(ranks["best"])
    assert ranks["worst"] == sorted(ranks["worst"], reverse=True)
    assert max(ranks["best"]) < min(ranks["worst"])
    assert [one["right"] for one in found["to_texts"]["worst"][0]["texts"]].count(True) == 0


def test_confused_classes_are_shown_with_one_of_their_images(run, data):  # noqa: F811
    evaluate(str(run), data)
    folder = run / "eval" / "step-00000060"
    source = next(one for one in find(data) if one.kind == "classification")
    record = json.loads((folder / f"{source.name}.json").read_text())
    found = report_pictures.confusion(source, record, folder)
    expected = sorted((count for label, answered, count in record["confusion"] if label != answered), reverse=True)
    assert [one["count"] for one in found] == expected[: report_pictures.CONFUSED]
    for one in found:
        assert one["name"] != one["answered"]
        classes = {entry["name"]: entry for entry in record["classes"]}
        assert one["share"] == one["count"] / classes[one["name"]]["images"]
    few = next(one for one in find(data) if one.name == "few_test")
    (folder / "few_test.parquet").write_bytes((folder / f"{source.name}.parquet").read_bytes())
    with pytest.raises(EvaluationError, match="Evaluate again"):
        report_pictures.confusion(few, record, folder)

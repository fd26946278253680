"""Crops and texts: torchvision's rule, and a function of the sample's numbers alone."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from pipeline.data import transforms
from pipeline.data.plan import sample_uniforms
from pipeline.data.transforms import BadSample, choose_text, crop_box, decode, normalizer, random_crop

CROP = 4 * transforms.CROP_TRIES


def encoded(mode="RGB", size=(40, 30), form="PNG"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "form"), [("RGB", "PNG"), ("L", "PNG"), ("RGB", "JPEG"), ("L", "JPEG")])
def test_decode_gives_rgb_as_pillow_does(mode, form):
    data = encoded(mode, form=form)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    assert (decode(data).int() - expected.int()).abs().max() <= (0 if form == "PNG" else 3)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded()[:60], encoded(form="JPEG")[:100]])
def test_undecodable_images_are_bad_samples(data):
    with pytest.raises(BadSample):
        decode(data)


@given(height=st.integers(1, 300), width=st.integers(1, 300), low=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_crops_lie_inside_the_image(height, width, low, seed):
    top, left, crop_height, crop_width = crop_box(height, width, (low, 1.0), sample_uniforms(seed, 0, 0, CROP))
    assert 0 <= top <= top + crop_height <= height
    assert 0 <= left <= left + crop_width <= width
    assert crop_height * crop_width > 0


def test_crop_areas_are_distributed_as_torchvisions():
    """The same mean and spread of areas as RandomResizedCrop.get_params, over many draws."""
    ours = [np.prod(crop_box(100, 140, (0.3, 1.0), sample_uniforms(0, 0, i, CROP))[2:]) / 14000 for i in range(4000)]
    image = torch.zeros(3, 100, 140)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale=(0.3, 1.0), antialias=True)
    theirs = []
    for _ in range(4000):
        params = crop.make_params([image])
        theirs.append(params["height"] * params["width"] / 14000)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.01)
    assert np.std(ours) == pytest.approx(np.std(theirs), abs=0.01)


def test_a_whole_crop_is_a_plain_resize():
    image = decode(encoded(size=(64, 64)))
    whole = random_crop(image, (32, 32), (1.0, 1.0), "bicubic", np.full(CROP, 0.5))
    expected = v2.functional.resize(image, [32, 32], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(whole, expected)


def test_grayscale_keeps_the_luma_of_its_share():
    image = decode(encoded())
    expected = np.asarray(Image.open(io.BytesIO(encoded())).convert("L"), dtype=int)
    grey = transforms.maybe_grayscale(image, 0.3, 0.29)
    assert all((channel.int().numpy() - expected).__abs__().max() <= 1 for channel in grey)
    assert torch.equal(transforms.maybe_grayscale(image, 0.3, 0.3), image)


def test_text_is_drawn_by_field_weight_and_evenly_within():
    parts = {"json": json.dumps({"captions": ["a", "b"], "statements": ["c"], "questions": []}).encode()}
    drawn = [choose_text(parts, {"captions": 3.0, "statements": 1.0}, sample_uniforms(0, 0, i, 2)) for i in range(4000)]
    shares = {text: drawn.count(text) / 4000 for text in "abc"}
    assert shares == pytest.approx({"a": 0.375, "b": 0.375, "c": 0.25}, abs=0.03)
    assert choose_text(parts, {"captions": 0.0, "statements": 1.0}, np.array([0.0, 0.0])) == "c"


def test_a_foreign_sample_gives_its_txt():
    assert choose_text({"txt": b"plain"}, {"captions": 1.0}, np.array([0.5, 0.5])) == "plain"


@pytest.mark.parametrize("parts", [{}, {"txt": b"  "}, {"txt": b"\xff\xfe\xfa"}, {"json": b"{", "txt": b"a"}])
def test_unreadable_texts_are_bad_samples(parts):
    with pytest.raises(BadSample):
        choose_text(parts, {"captions": 1.0}, np.array([0.5, 0.5]))


def test_normalizer_equals_to_tensor_and_normalize():
    image = decode(encoded())
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    expected = v2.functional.normalize(v2.functional.to_dtype(image, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(normalizer(mean, std, torch.device("cpu"))(image[None])[0], expected)

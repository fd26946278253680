"""Images as models take them: exactly as open_clip gives them, or fast and equal but for rounding."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageFilter
from torchvision.transforms import Compose, Resize

from data_prep.record import DataError
from pipeline.evaluate.pixels import Fast, faster, name_of, pixels, transformed
from pipeline.evaluate.sets import EvaluationError, Item

SIZE = 32
CPU = torch.device("cpu")
NORM = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}
KINDS = [{"resize_mode": mode} for mode in ("shortest", "squash", "longest")] + [{"interpolation": "bilinear"}]


def picture(height, width, seed=0):
    """Smooth enough to be like a photo, and different everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))


def item(folder, image, name="picture.jpg", **options):
    path = folder / name
    image.save(path, **options)
    return Item(name, path, 0, path.stat().st_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (20, 90), (32, 32)])
def test_exact_pixels_are_open_clip_s_bit_for_bit(kind, shape, tmp_path):
    preprocess = image_transform(SIZE, is_train=False, **NORM, **kind)
    one = item(tmp_path, picture(*shape))
    crop, finish = pixels(preprocess, CPU)
    assert crop(one).dtype == torch.uint8
    torch.testing.assert_close(finish(crop(one)[None])[0], preprocess(one.open()), rtol=0, atol=0)


def test_a_transform_of_another_kind_is_taken_as_it_is(tmp_path):
    one = item(tmp_path, picture(40, 50))
    crop, finish = pixels(lambda image: torch.full((3, 2, 2), float(image.width)), CPU)
    assert finish(crop(one)[None]).tolist() == torch.full((1, 3, 2, 2), 50.0).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from(["bicubic", "bilinear"]))
def test_fast_pixels_are_the_exact_ones_but_for_rounding(height, width, interpolation):
    preprocess = image_transform(SIZE, is_train=False, interpolation=interpolation, mean=(0,) * 3, std=(1,) * 3)
    image = picture(height, width)
    found, expected = faster(preprocess)(image), preprocess(image)
    assert found.shape == expected.shape
    difference = (found - expected).abs() * 255
    assert difference.mean() < 0.25
    assert difference.max() < 2.5


def test_fast_and_exact_take_what_lies_in_files_alike(tmp_path):
    preprocess = image_transform(SIZE, is_train=False, **NORM)
    exact, fast = pixels(preprocess, CPU), pixels(transformed("fast", preprocess), CPU)
    images = [
        item(tmp_path, picture(70, 90), quality=95),
        item(tmp_path, picture(70, 90).convert("L"), "gray.jpg"),
        item(tmp_path, picture(70, 90).convert("CMYK"), "cmyk.jpg"),
        item(tmp_path, picture(90, 70), "picture.png"),
        item(tmp_path, picture(90, 70).convert("P"), "palette.png"),
        item(tmp_path, picture(40, 70), "picture.webp", lossless=True),
    ]
    for one in images:
        crops = exact.crop(one), fast.crop(one)
        assert all(crop.dtype == torch.uint8 for crop in crops)
        assert (crops[0].int() - crops[1].int()).abs().max() <= 2
        torch.testing.assert_close(*(way.finish(exact.crop(one)[None]) for way in (exact, fast)), rtol=0, atol=0)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", "half"])
def test_what_does_not_decode_is_named(data, tmp_path):
    buffer = io.BytesIO()
    picture(60, 60).save(buffer, "JPEG")
    path = tmp_path / "broken.jpg"
    path.write_bytes(buffer.getvalue()[:200] if data == "half" else data)
    for name in ("exact", "fast"):
        crop, _ = pixels(transformed(name, image_transform(SIZE, is_train=False)), CPU)
        with pytest.raises(EvaluationError, match=r"image broken does not decode"):
            crop(Item("broken", path, 0, path.stat().st_size))


@pytest.mark.parametrize(
    "preprocess",
    [
        image_transform(SIZE, is_train=False, resize_mode="squash"),
        image_transform(SIZE, is_train=False, resize_mode="longest"),
        image_transform((SIZE, 2 * SIZE), is_train=False),
        image_transform(SIZE, is_train=True),
        Compose([Resize(SIZE)]),
        lambda image: torch.zeros(3, SIZE, SIZE),
    ],
)
def test_what_has_no_fast_form_is_refused(preprocess):
    with pytest.raises(DataError, match="takes its images otherwise"):
        transformed("fast", preprocess)
    assert transformed("exact", preprocess) is preprocess


def test_forms_are_told_apart():
    preprocess = image_transform(SIZE, is_train=False, **NORM)
    fast = transformed("fast", preprocess)
    assert fast == Fast(SIZE, "bicubic", **NORM)
    assert str(fast) != str(preprocess)
    assert [name_of(form) for form in (preprocess, fast)] == ["exact", "fast"]
    with pytest.raises(DataError, match="Choose exact or fast"):
        transformed("quick", preprocess)

"""Crops and texts: torchvision's rule, and a function of the sample's numbers alone."""

from __future__ import annotations

import contextlib
import io
import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from pipeline.data import transforms
from pipeline.data.philox import SampleUniforms
from pipeline.data.transforms import CROPS, BadSample, Texts, crop_box, crop_shapes, decode, normalizer

TRIES = 4 * transforms.CROP_TRIES


def shapes(count, scale, seed=0):
    return crop_shapes(SampleUniforms(seed, TRIES)([0] * count, range(count)), scale).tolist()


def texts(parts):
    return Texts(parts.get("txt", b""), parts.get("json", b""))


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
    top, left, crop_height, crop_width = crop_box(height, width, shapes(1, (low, 1.0), seed)[0])
    assert 0 <= top <= top + crop_height <= height
    assert 0 <= left <= left + crop_width <= width
    assert crop_height * crop_width > 0


def test_crop_areas_are_distributed_as_torchvisions():
    """The same mean and spread of areas as RandomResizedCrop.get_params, over many draws."""
    ours = [np.prod(crop_box(100, 140, tries)[2:]) / 14000 for tries in shapes(4000, (0.3, 1.0))]
    image = torch.zeros(3, 100, 140)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale=(0.3, 1.0), antialias=True)
    theirs = []
    for _ in range(4000):
        params = crop.make_params([image])
        theirs.append(params["height"] * params["width"] / 14000)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.01)
    assert np.std(ours) == pytest.approx(np.std(theirs), abs=0.01)


def cropped(decoder, data, tries, size=(32, 48), interpolation="bicubic"):
    """(3, H, W), written as the loader does it: into channels-last memory."""
    out = torch.zeros(1, *size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    CROPS[decoder](memoryview(bytearray(data)), tries, interpolation, out)
    return out[0]


def photo(seed, size=(171, 128), quality=90):
    """A JPEG with the smoothness of a photo, from random frequencies."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]] / 128
    waves = [np.sin(2 * np.pi * (x * a + y * b + c)) / (1 + np.hypot(a, b)) for a, b, c in random.normal(0, 6, (60, 3))]
    channels = [sum(wave * weight for wave, weight in zip(waves, random.normal(0, 90, 60), strict=True)) for _ in "rgb"]
    pixels = (np.stack(channels, axis=2) + 128 + random.normal(0, 4, (size[1], size[0], 3))).clip(0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_exact_way_gives_open_clip_s_very_pixels(interpolation):
    """The same crop through torchvision's functions on Pillow images, as open_clip's training transform calls them."""
    mode = v2.InterpolationMode[interpolation.upper()]
    for seed, tries in enumerate(shapes(20, (0.4, 1.0))):
        image = Image.open(io.BytesIO(photo(seed))).convert("RGB")
        expected = v2.functional.resized_crop(image, *crop_box(image.height, image.width, tries), [32, 48], mode)
        ours = cropped("exact", photo(seed), tries, interpolation=interpolation)
        assert torch.equal(ours, v2.functional.pil_to_tensor(expected))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("quality", [70, 95])
def test_the_fast_way_differs_from_the_exact_one_by_rounding(interpolation, quality):
    """The stated tolerance: at most 3 of 255 anywhere, and .1 on average."""
    apart = torch.stack(
        [
            (
                cropped("fast", photo(seed, quality=quality), tries, interpolation=interpolation).int()
                - cropped("exact", photo(seed, quality=quality), tries, interpolation=interpolation).int()
            ).abs()
            for seed, tries in enumerate(shapes(20, (0.4, 1.0)))
        ]
    )
    assert apart.max() <= 3
    assert apart.float().mean() <= 0.1


def test_a_whole_crop_is_a_plain_resize():
    image = decode(encoded(size=(64, 64)))
    whole = cropped("fast", encoded(size=(64, 64)), crop_shapes(np.full(TRIES, 0.5), (1.0, 1.0)), (32, 32))
    expected = v2.functional.resize(image, [32, 32], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_what_one_decoder_does_not_take_the_other_is_asked_for(mode, monkeypatch):
    data = encoded(mode, form="JPEG")

    def refuse(*_):
        raise RuntimeError("unsupported")

    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    monkeypatch.setattr(transforms, "DECODE", refuse)
    assert torch.equal(decode(data), expected)


def test_damaged_pngs_are_bad_samples_and_no_more():
    """One flipped bit at a time: torchvision 0.29's own decoder ends the process at most of them."""
    whole, bad = encoded(size=(20, 20)), 0
    for at in range(8, len(whole), 7):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        try:
            assert decode(data).shape[0] == 3
        except BadSample:
            bad += 1
    assert bad > 10


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_other_formats_and_animations_give_their_first_frame(form):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in pixels]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], lossless=True)
    expected = np.array(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode(buffer.getvalue()), expected)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_what_would_fill_the_memory_is_refused_by_its_header(form):
    data = bytearray(encoded(size=(16, 16), form=form))
    if form == "PNG":
        data[16:24] = (60_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    else:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(BadSample, match="pixels"):
        decode(data)


@given(
    noise=st.binary(max_size=200),
    head=st.sampled_from([b"", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"8BPS", b"DDS "]),
)
def test_whatever_the_bytes_only_bad_samples_are_raised(noise, head):
    with contextlib.suppress(BadSample):
        decode(head + noise)


def test_sixteen_bits_become_eight():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(buffer, "PNG")
    assert decode(buffer.getvalue()).dtype == torch.uint8


def test_grayscale_keeps_the_luma_of_its_share():
    image = decode(encoded())[None]
    expected = np.asarray(Image.open(io.BytesIO(encoded())).convert("L"), dtype=int)
    grey, kept = image.clone(), image.clone()
    transforms.maybe_grayscale(grey, 0.3, 0.29)
    assert all((channel.int().numpy() - expected).__abs__().max() <= 1 for channel in grey[0])
    transforms.maybe_grayscale(kept, 0.3, 0.3)
    assert torch.equal(kept, image)


def test_text_is_drawn_by_field_weight_and_evenly_within():
    parts = {"json": json.dumps({"captions": ["a", "b"], "statements": ["c"], "questions": []}).encode()}
    numbers = SampleUniforms(0, 2)([0] * 4000, range(4000)).tolist()
    drawn = [texts(parts).choose({"captions": 3.0, "statements": 1.0}, *pair) for pair in numbers]
    shares = {text: drawn.count(text) / 4000 for text in "abc"}
    assert shares == pytest.approx({"a": 0.375, "b": 0.375, "c": 0.25}, abs=0.03)
    assert texts(parts).choose({"captions": 0.0, "statements": 1.0}, 0.0, 0.0) == "c"
    assert texts(parts).choose({"captions": 0.1, "statements": 0.7}, 1 - 2**-53, 1 - 2**-53) == "c"


def test_a_foreign_sample_gives_its_txt():
    assert texts({"txt": b"plain"}).choose({"captions": 1.0}, 0.5, 0.5) == "plain"
    laion = {"txt": b"plain", "json": json.dumps({"caption": "plain", "captions": "not a list", "url": "x"}).encode()}
    assert texts(laion).choose({"captions": 1.0}, 0.5, 0.5) == "plain"


def test_photos_are_told_apart_by_their_id_or_by_their_bytes():
    def number(record, image=b"image"):
        return texts({"json": json.dumps(record).encode() if record else b""}).image_number(image)

    assert number({"image_id": "coco:1"}) == number({"image_id": "coco:1", "captions": ["other"]}, b"other")
    assert number({"image_id": "coco:1"}) != number({"image_id": "coco:2"})
    assert number({"sha256": "ab"}) == number({"sha256": "ab"}, b"other")
    assert number({}) == number({"url": "x"}) != number({}, b"other")
    assert -(2**63) <= number({}) < 2**63


@pytest.mark.parametrize("parts", [{}, {"txt": b"  "}, {"txt": b"\xff\xfe\xfa"}, {"json": b"{", "txt": b"a"}])
def test_unreadable_texts_are_bad_samples(parts):
    with pytest.raises(BadSample):
        texts(parts).choose({"captions": 1.0}, 0.5, 0.5)


def test_normalizer_equals_to_tensor_and_normalize():
    image = decode(encoded())
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    expected = v2.functional.normalize(v2.functional.to_dtype(image, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(normalizer(mean, std, torch.device("cpu"))(image[None])[0], expected)

"""Images: what comes out is upright RGB or a reason, and bytes are kept where they were fit already."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from data_prep import images
from data_prep.images import ORIENTATION, BadImage, prepare

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS).resize((60, 40), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(("form", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_a_fit_file_keeps_its_bytes(form, extension):
    data = encoded(PHOTO, form)
    stored = prepare(data, None)
    assert (stored.data, stored.extension) == (data, extension)
    assert stored.sha256 == stored.original_sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("resize", [None, 16])
@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode, resize):
    source = Image.fromarray(np.full((40, 60), 40_000, np.uint16)) if mode == "I;16" else PHOTO.convert(mode)
    stored = prepare(encoded(source, "JPEG" if mode == "CMYK" else "PNG"), resize)
    assert decoded(stored.data).mode == "RGB"
    assert (stored.original_width, stored.original_height) == (60, 40)
    if mode == "I;16":
        assert abs(np.asarray(decoded(stored.data)).mean() - 40_000 / 256) < 2


def test_transparent_becomes_white():
    stored = prepare(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG"), None)
    assert decoded(stored.data).getpixel((8, 8)) == (255, 255, 255)


def test_a_rotated_photo_is_stored_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = prepare(encoded(PHOTO, exif=exif), None)
    upright = decoded(stored.data)
    assert upright.size == (stored.width, stored.height) == (stored.original_width, stored.original_height) == (40, 60)
    assert upright.getexif().get(ORIENTATION, 1) == 1


@pytest.mark.parametrize(("resize", "size"), [(20, (30, 20)), (40, (60, 40)), (400, (60, 40))])
def test_the_shorter_side_is_resized_and_never_enlarged(resize, size):
    data = encoded(PHOTO)
    stored = prepare(data, resize)
    assert (stored.width, stored.height) == size == decoded(stored.data).size
    assert (stored.data == data) == (resize >= 40)


def test_a_photo_with_a_preview_behind_it_is_one_photo():
    data = encoded(PHOTO, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    stored = prepare(data, None)
    assert (stored.data, stored.extension, stored.width) == (data, "jpg", 60)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"<html>gone</html>", "not_an_image"),
        (encoded(PHOTO, "GIF"), "not_an_image"),
        (encoded(PHOTO)[:-200], "undecodable"),
        (encoded(PHOTO, "PNG")[:-300], "undecodable"),
        (encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]), "animated"),
    ],
)
def test_bad_files_have_a_reason(data, reason):
    with pytest.raises(BadImage, match=f"^{reason}$"):
        prepare(data, None)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    data = encoded(PHOTO)
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 40 - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="too_many_pixels"):
        prepare(data, None)


SEEDS = [encoded(PHOTO), encoded(PHOTO.convert("P"), "PNG"), encoded(PHOTO, "WEBP")]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    st.integers(0, 4000),
)
def test_damaged_files_are_stored_or_refused(data, flips, length):
    damaged = bytearray(data[: max(length, 1)])
    for place, value in flips:
        damaged[place % len(damaged)] = value
    try:
        stored = prepare(bytes(damaged), None)
    except BadImage:
        return
    assert decoded(stored.data).size == (stored.width, stored.height)


def test_looks_are_deterministic_and_64_bits():
    first, second = prepare(encoded(PHOTO), None), prepare(encoded(PHOTO), None)
    assert first == second
    assert len(first.perceptual_hash) == 16
    assert len(first.thumbnail) == 192
    assert images.looks(Image.new("RGB", (30, 30), "red")) == ("0" * 16, bytes((255, 0, 0)) * 64)

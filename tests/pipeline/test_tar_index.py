"""Where the samples of a tar lie: in every format that Python's tarfile writes, and typed errors for the rest."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tar_index import BLOCK, ShardError, key_at, read_index

MEMBERS = [
    ("000.jpg", b"\xff\xd8first"),
    ("000.txt", b"a caption"),
    ("000.json", b"{}"),
    ("sub/001.v2.png", b"second"),  # webdataset: the key ends at the first dot, so this is `v2.png`, no image
    ("sub/001.txt", "ünïcode".encode()),
    ("001.pkl", b"never unpickled"),
    ("002.webp", b"x" * 1000),
    ("002.TXT", b"caps"),
    ("002.jpeg", b"another image"),
]


def tar(members, form=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def index(data):
    return read_index(lambda offset, length: data[offset : offset + length], len(data), "0.tar")


def contents(data):
    """[(image, txt, json)] of each sample."""
    return [
        tuple(bytes(data[BLOCK * first : BLOCK * first + length]) for first, length in sample)
        for sample in index(data).places.tolist()
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_found_by_key_in_order(form):
    data = tar(MEMBERS, form)
    found = contents(data)
    assert [sample[1:] for sample in found] == [
        (b"a caption", b"{}"),
        ("ünïcode".encode(), b""),
        (b"caps", b""),
    ]
    assert found[0][0] == b"\xff\xd8first"
    assert found[2][0] == b"x" * 1000  # of two images the first
    assert index(data).ignored == 2
    first = index(data).places[0][0][0]
    assert key_at(data[(first - 1) * BLOCK : first * BLOCK]) == "000"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(form):
    name = "ü" * 90 + "/" + "long" * 40
    members = [(f"{name}.jpg", b"image"), (f"{name}.txt", b"text"), ("b.jpg", b"other")]
    assert [sample[:2] for sample in contents(tar(members, form))] == [(b"image", b"text"), (b"other", b"")]


def test_an_empty_tar_has_no_samples():
    assert len(index(tar([])).places) == 0


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, 4000), flip=st.integers(0, 9000), bit=st.integers(0, 7))
def test_broken_tars_give_typed_errors_only(cut, flip, bit):
    data = bytearray(tar(MEMBERS, tarfile.GNU_FORMAT))
    del data[len(data) - cut :]
    data[min(flip, len(data) - 1)] ^= 1 << bit
    try:
        for first, length in index(data).places.reshape(-1, 2).tolist():
            assert first * BLOCK + length <= len(data)
    except ShardError as error:
        assert "0.tar" in str(error)  # noqa: PT017


@given(noise=st.binary(max_size=3000))
def test_what_is_no_tar_gives_typed_errors_only(noise):
    try:
        index(noise)
    except ShardError as error:
        assert "0.tar" in str(error)  # noqa: PT017

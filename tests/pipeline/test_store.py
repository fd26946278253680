"""Samples out of tars: the bytes that went in, from sound shards only."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.manifest import Shard
from pipeline.data.store import ShardError, ShardStore, read_headers

MEMBERS = [
    ("000.jpg", b"\xff\xd8first"),
    ("000.txt", b"a caption"),
    ("000.json", b"{}"),
    ("001.v2.png", b"second"),  # webdataset: the key ends at the first dot
    ("001.txt", "ünïcode".encode()),
    ("001.pkl", b"never unpickled"),
    ("002.webp", b"x" * 1000),
    ("002.TXT", b"caps"),
]


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def store(path, samples):
    data = path.read_bytes()
    shard = Shard("train", path.name, len(data), hashlib.sha256(data).hexdigest(), samples, samples)
    return ShardStore(path.parent, (shard,))


def test_samples_are_read_by_key_in_order(tmp_path):
    members = [member for member in MEMBERS if member[0] != "001.v2.png"] + [("001.png", b"second")]
    shards = store(write_tar(tmp_path / "0.tar", members), 3)
    shards.check_files()
    shards.check_hashes()
    first, second, third = (shards.read(0, index) for index in range(3))
    assert (first.key, first.image, first.texts) == ("000", b"\xff\xd8first", {"txt": b"a caption", "json": b"{}"})
    assert (second.key, second.image, second.texts["txt"].decode()) == ("001", b"second", "ünïcode")
    assert (third.image, third.texts) == (b"x" * 1000, {"txt": b"caps"})


def test_damage_is_found_before_a_sample_is_used(tmp_path):
    path = write_tar(tmp_path / "0.tar", MEMBERS[:3])
    shards = store(path, 1)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    shards.check_files()
    with pytest.raises(ShardError, match=r"0\.tar: sha256 is"):
        shards.check_hashes()
    path.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=r"0\.tar \(\d+ bytes"):
        shards.check_files()
    path.unlink()
    with pytest.raises(ShardError, match=r"0\.tar \(missing"):
        shards.check_files()


def test_a_wrong_number_of_samples_is_refused(tmp_path):
    with pytest.raises(ShardError, match="holds 1 samples, the manifest lists 2"):
        store(write_tar(tmp_path / "0.tar", MEMBERS[:3]), 2).read(0, 0)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 4000), flip=st.integers(0, 4000), bit=st.integers(0, 7))
def test_broken_tars_give_typed_errors_only(tmp_path_factory, cut, flip, bit):
    path = write_tar(tmp_path_factory.mktemp("fuzz") / "0.tar", MEMBERS)
    data = bytearray(path.read_bytes())[: 10240 - cut]
    data[flip] ^= 1 << bit
    path.write_bytes(data)
    with path.open("rb") as file:
        try:
            for _, members in read_headers(file.fileno(), path):
                assert all(offset + size <= len(data) for offset, size in members.values())
        except ShardError as error:
            assert "0.tar" in str(error)  # noqa: PT017

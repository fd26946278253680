"""Sources and datasets behind an address, on a real S3 API."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from data_prep import manifest
from data_prep.__main__ import main
from data_prep.locations import path_of
from tests.data_prep import layouts


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """The address of an empty bucket."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    bucket = f"photos-{uuid.uuid4()}"
    files.mkdir(bucket)
    yield f"s3://{bucket}"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def upload(folder: Path, address: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path_of(f"{address}/{path.relative_to(folder).as_posix()}").write_bytes(path.read_bytes())


def content(folder: Path) -> dict[str, bytes]:
    root = str(folder)
    return {str(path)[len(root) :].lstrip("/"): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sources_and_dataset_may_lie_in_a_bucket(tmp_path, bucket):
    layouts.coco(tmp_path / "c", {"train2017": list(range(1, 8)), "val2017": [9]})
    upload(tmp_path / "c", f"{bucket}/coco")
    options = ["--workers", "1", "--name", "x", "--samples-per-shard", "3"]
    assert main(["build", f"coco={tmp_path / 'c'}", "--out", str(tmp_path / "out"), *options]) == 0
    assert main(["build", f"coco={bucket}/coco", "--out", f"{bucket}/out", *options]) == 0
    ours, theirs = content(tmp_path / "out"), content(path_of(f"{bucket}/out"))
    # The manifest names what a dataset was made from.
    changed = {"manifest.json", "manifest.sha256"}
    assert {name: data for name, data in theirs.items() if name not in changed} == {
        name: data for name, data in ours.items() if name not in changed
    }
    assert set(ours) == set(theirs)
    assert main(["verify", f"{bucket}/out"]) == 0
    tar = path_of(f"{bucket}/out/train/00001.tar")
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    assert main(["verify", f"{bucket}/out"]) == 2


def test_an_unfinished_dataset_in_a_bucket_is_finished(tmp_path, bucket, monkeypatch):
    layouts.coco(tmp_path / "c", {"train2017": list(range(1, 8))})
    arguments = ["build", f"coco={tmp_path / 'c'}", "--out", f"{bucket}/out", "--workers", "1"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            assert main(arguments) != 0
    assert not path_of(f"{bucket}/out/manifest.json").exists()
    shard = path_of(f"{bucket}/out/train/00000.tar")
    made = shard.stat().st_mtime
    assert main(arguments) == 0
    assert shard.stat().st_mtime == made
    assert main(["verify", f"{bucket}/out"]) == 0


def test_tars_in_a_bucket_are_read_in_place(tmp_path, bucket):
    layouts.coco(tmp_path / "c", {"train2017": [1, 2, 3]})
    assert main(["build", f"coco={tmp_path / 'c'}", "--out", f"{bucket}/first", "--workers", "1"]) == 0
    source = f"webdataset={bucket}/first/train"
    assert main(["build", source, "--out", str(tmp_path / "again"), "--workers", "2"]) == 0
    assert main(["verify", str(tmp_path / "again")]) == 0

"""Sources and datasets behind an address, on a real S3 API."""

from __future__ import annotations

import contextlib
from pathlib import Path

import fsspec
import pytest

from data_prep import locations, manifest
from data_prep.__main__ import main
from data_prep.locations import open_file, path_of, read_bytes
from data_prep.record import DataError
from tests.data_prep import layouts
from tests.servers import RESET, SHORT, UNAVAILABLE, serving, upload


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


def test_parts_of_a_build_meet_in_a_bucket(tmp_path, bucket, capsys):
    layouts.coco(tmp_path / "c", {"train2017": list(range(1, 8)), "val2017": [9]})
    options = ["--workers", "1", "--name", "x", "--samples-per-shard", "2"]
    arguments = ["build", f"coco={tmp_path / 'c'}", *options, "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    for part in ("1/2", "0/2"):
        assert main([*arguments, f"{bucket}/out", "--part", part]) == 0
    assert not path_of(f"{bucket}/out/manifest.json").exists()
    assert main([*arguments, f"{bucket}/out"]) == 0
    assert "train: 4 of 4 shards were there already" in capsys.readouterr().err
    assert content(path_of(f"{bucket}/out")) == content(tmp_path / "out")


def test_tars_in_a_bucket_are_read_in_place(tmp_path, bucket):
    layouts.coco(tmp_path / "c", {"train2017": [1, 2, 3]})
    assert main(["build", f"coco={tmp_path / 'c'}", "--out", f"{bucket}/first", "--workers", "1"]) == 0
    source = f"webdataset={bucket}/first/train"
    assert main(["build", source, "--out", str(tmp_path / "again"), "--workers", "2"]) == 0
    assert main(["verify", str(tmp_path / "again")]) == 0


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(locations, "WAIT_S", 0.01)


TROUBLE = [[UNAVAILABLE, UNAVAILABLE], [RESET], [SHORT], [SHORT, RESET, UNAVAILABLE]]


@pytest.mark.parametrize("faults", TROUBLE, ids=" ".join)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_failing_server_is_asked_again_until_all_bytes_are_there(tmp_path, no_waiting, faults, ranges):
    content = bytes(range(256)) * 40
    (tmp_path / "a.bin").write_bytes(content)
    with serving(tmp_path) as server:
        server.ranges = ranges
        path = path_of(f"{server.url}/a.bin")
        for span, expected in ((None, content), ((100, 5000), content[100:5100]), ((10_000, 999), content[10_000:])):
            server.faults = [*faults]
            assert read_bytes(path, span) == expected
            assert not server.faults
        server.faults = [*faults]
        with open_file(path) as file:
            assert file.seek(-3, 2) == len(content) - 3
            assert (file.read(), file.seek(7), file.read(3)) == (content[-3:], 7, content[7:10])


def test_a_server_that_keeps_failing_is_given_up_by_name_and_one_that_refuses_is_not_asked_again(tmp_path, no_waiting):
    (tmp_path / "a.bin").write_bytes(b"abc")
    with serving(tmp_path) as server:
        server.faults = [SHORT] * 99
        with pytest.raises(DataError, match=r"a\.bin: cannot be fetched .*Run it again later"):
            read_bytes(path_of(f"{server.url}/a.bin"))
        assert len(server.faults) == 99 - locations.TRIES
        server.faults = []
        with pytest.raises(FileNotFoundError):
            read_bytes(path_of(f"{server.url}/b.bin"))


def test_no_image_is_lost_to_a_server_that_fails_at_times(tmp_path, no_waiting):
    layouts.coco(tmp_path / "c", {"train2017": list(range(1, 8))})
    assert main(["build", f"coco={tmp_path / 'c'}", "--out", str(tmp_path / "first"), "--workers", "1"]) == 0
    shard = "train/00000.tar"
    with serving(tmp_path / "first") as server:
        command = ["build", f"webdataset={server.url}/{shard}", "--workers", "1", "--resize", "64", "--name", "x"]
        assert main([*command, "--out", str(tmp_path / "calm")]) == 0
        server.faults = [UNAVAILABLE, "", RESET, "", SHORT] * 5
        assert main([*command, "--out", str(tmp_path / "rough")]) == 0
        assert not server.faults
        assert content(tmp_path / "rough") == content(tmp_path / "calm")
        # Nor does a lasting failure count as an image that is damaged.
        server.faults = [SHORT] * 999
        assert main([*command, "--out", str(tmp_path / "broken")]) == 2
        assert not (tmp_path / "broken/manifest.sha256").exists()


@pytest.mark.parametrize(
    "address", ["https://me:S3CRET@host/a.tar", "https://S3CRET@host/a", "s3://key:S3CRET@bucket/a"]
)
def test_an_address_with_a_password_is_refused_without_repeating_it(address):
    with pytest.raises(DataError, match=r"has a user, password or query.*FSSPEC_HTTPS") as refused:
        path_of(address)
    assert "S3CRET" not in str(refused.value)


def test_a_signature_that_fsspec_is_told_of_reaches_the_server_and_no_log(tmp_path, no_waiting, monkeypatch, caplog):
    monkeypatch.setitem(fsspec.config.conf, "http", {"params": {"sig": "S3CRET"}})
    (tmp_path / "a.bin").write_bytes(b"abc")
    with serving(tmp_path) as server:
        server.signature = "sig=S3CRET"
        server.faults = [UNAVAILABLE]
        assert read_bytes(path_of(f"{server.url}/a.bin")) == b"abc"
        assert "a.bin: trying again" in caplog.text
        server.faults = [UNAVAILABLE] * 99
        with pytest.raises(DataError, match="cannot be fetched") as failure:
            read_bytes(path_of(f"{server.url}/a.bin"))
    assert "S3CRET" not in f"{caplog.text}{failure.value}"

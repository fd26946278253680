"""Which tars are trained on: our own datasets, and any other tool's, in place."""

from __future__ import annotations

import json
import logging
import os

import pytest

from data_prep.locations import UnreachableError, path_of
from data_prep.record import DataError
from pipeline.data.cache import Cache
from pipeline.data.store import ShardStore
from pipeline.data.tar_index import ShardError
from pipeline.data.tars import open_tars
from tests.pipeline.tars import write_tar, write_tars
from tests.servers import UNAVAILABLE, serving, upload

SIZES = (3, 5, 2)


@pytest.fixture
def tars(tmp_path):
    write_tars(tmp_path / "tars", SIZES)
    return tmp_path / "tars"


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 1 << 30)


def as_img2dataset(folder):
    for path, size in zip(sorted(folder.glob("*.tar")), SIZES, strict=True):
        stats = {"count": size + 4, "successes": size, "failed_to_download": 4, "status_dict": {"success": size}}
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))
        path.with_name(f"{path.stem}.parquet").write_bytes(b"not looked at")


def test_our_own_datasets_are_read_by_their_manifest(dataset, cache):
    one = open_tars(str(dataset), cache)
    assert one.at_hand
    assert one.fingerprint == one.shards.fingerprint()
    assert sum(one.shards.numbers("samples")) == 70
    one.check()


@pytest.mark.parametrize("by", ["folder", "pattern", "list"])
def test_img2dataset_s_tars_are_used_in_place_without_reading_them(tars, cache, by, monkeypatch):
    as_img2dataset(tars)
    before = {path: path.stat().st_mtime_ns for path in tars.iterdir()}
    monkeypatch.setattr("pipeline.data.tars.read_index", None)  # whoever counts headers fails
    address = {"folder": f"{tars}/", "pattern": f"{tars}/{{00000..00002}}.tar", "list": f"{tars}/0000{{0,1,2}}.tar"}[by]
    one = open_tars(address, cache)
    assert one.shards.numbers("samples").tolist() == list(SIZES)
    assert not one.at_hand
    one.check()
    store = ShardStore([one], cache)
    assert bytes(store.read(1, 4).txt) == b"picture 7"
    assert {path: path.stat().st_mtime_ns for path in tars.iterdir()} == before


def test_open_clip_s_sizes_are_believed(tars, cache, monkeypatch):
    (tars / "sizes.json").write_text(json.dumps({f"{number:05d}.tar": size for number, size in enumerate(SIZES)}))
    monkeypatch.setattr("pipeline.data.tars.read_index", None)
    assert open_tars(str(tars), cache).shards.numbers("samples").tolist() == list(SIZES)


def test_where_nothing_tells_headers_are_counted_once(tars, cache, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        assert open_tars(str(tars), cache).shards.numbers("samples").tolist() == list(SIZES)
    assert "counting their headers, once" in caplog.text
    monkeypatch.setattr("pipeline.data.tars.read_index", None)
    assert open_tars(str(tars), cache).shards.numbers("samples").tolist() == list(SIZES)


def test_foreign_tars_are_known_by_size_and_first_bytes_so_that_a_copy_is_the_same(tars, cache, tmp_path):
    known = open_tars(str(tars), cache).fingerprint
    write_tars(tmp_path / "copy", SIZES)
    os.utime(tmp_path / "copy/00000.tar", (1, 1))
    assert open_tars(str(tmp_path / "copy"), cache).fingerprint == known
    write_tar(tmp_path / "copy/00000.tar", {f"{number}.txt": b"other" for number in range(3)})
    assert open_tars(str(tmp_path / "copy"), cache).fingerprint != known


@pytest.mark.parametrize("listed", [True, False])
def test_foreign_tars_on_a_server_are_known_by_size_and_etag(tars, cache, listed):
    as_img2dataset(tars)
    with serving(tars) as server:
        server.listing = listed
        address = server.url if listed else f"{server.url}/{{00000..00002}}.tar"
        one = open_tars(address, cache)
        assert one.remote
        assert one.versions[0].startswith('"')
        one.check()
        assert bytes(ShardStore([one], cache).read(2, 1).txt) == b"picture 9"
        os.utime(tars / "00001.tar", (1, 1))
        assert open_tars(address, cache).fingerprint != one.fingerprint
        (tars / "00001.tar").unlink()
        with pytest.raises(ShardError, match=r"1 of 3 shards are not as listed: 00001\.tar \(missing\)"):
            one.check()


def test_foreign_tars_in_a_bucket_are_known_by_size_and_etag(tars, cache, bucket):
    as_img2dataset(tars)
    upload(tars, f"{bucket}/laion")
    for address in (f"{bucket}/laion", f"{bucket}/laion/{{00000..00002}}.tar"):
        one = open_tars(address, cache)
        one.check()
        assert bytes(ShardStore([one], cache).read(2, 1).txt) == b"picture 9"
        known = one.fingerprint
    tar = path_of(f"{bucket}/laion/00001.tar")
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert open_tars(f"{bucket}/laion", cache).fingerprint != known
    with pytest.raises(ShardError, match=r"00001\.tar: changed since the run began"):
        ShardStore([one], cache).read(1, 0)


def test_a_stats_file_that_lies_is_found_out_when_its_shard_arrives(tars, cache):
    as_img2dataset(tars)
    (tars / "00001_stats.json").write_text(json.dumps({"successes": 6}))
    store = ShardStore([open_tars(str(tars), cache)], cache)
    with pytest.raises(ShardError, match=r"00001\.tar: holds 5 samples, 6 were listed"):
        store.read(1, 0)


def test_what_cannot_be_trained_on_is_refused_with_the_reason(tmp_path, tars, cache):
    def refusal(address):
        with pytest.raises(DataError) as error:
            open_tars(address, cache)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "found none" in refusal(str(tmp_path / "empty"))
    assert "cannot be listed" in refusal(str(tmp_path / "nowhere"))
    assert "a brace is missing" in refusal(f"{tars}/{{00000..00002.tar")
    assert "1 of 4 shards are missing: 00003.tar" in refusal(f"{tars}/{{00000..00003}}.tar")
    assert "tars of several places" in refusal("s3://{a,b}/0.tar")
    assert "names a tar twice" in refusal(f"{tars}/0000{{0,0}}.tar")
    assert "only s3://" in refusal("pipe:cat tars.tar")
    assert "only s3://" in refusal("ftp://host/{0..3}.tar")
    (tars / "sizes.json").write_text("{")
    assert "not JSON" in refusal(str(tars))


def test_patterns_may_begin_anywhere(tars, cache, monkeypatch):
    monkeypatch.chdir(tars)
    (tars / "a").mkdir()
    (tars / "00001.tar").rename(tars / "a" / "00001.tar")
    for pattern in ("{a/00001,00000}.tar", f"{tars}/{{a/00001,00000}}.tar", "00000.tar"):
        one = open_tars(pattern, cache)
        one.check()
        assert bytes(ShardStore([one], cache).read(len(one.shards) - 1, 0).txt) == b"picture 0"


def test_a_server_that_fails_when_asked_about_a_tar_is_asked_again(tars, cache, monkeypatch):
    monkeypatch.setattr("data_prep.locations.WAIT_S", 0.01)
    as_img2dataset(tars)
    with serving(tars) as server:
        server.head_faults, server.faults = [UNAVAILABLE] * 4, [UNAVAILABLE] * 4
        one = open_tars(f"{server.url}/{{00000..00002}}.tar", cache)
        assert one.shards.numbers("samples").tolist() == list(SIZES)
        server.head_faults, server.faults = [UNAVAILABLE] * 99, [UNAVAILABLE] * 99
        with pytest.raises(UnreachableError, match=r"0000\d\.tar: cannot be fetched \(ClientResponseError: 503"):
            one.check()


def test_a_scheme_whose_reader_is_not_installed_is_refused_with_the_extra(monkeypatch, cache):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"gcsfs reads gs:// and is not installed\. `pip install .\.\[gcs\]"):
        open_tars("gs://bucket/data", cache)


def test_no_command_is_run_for_a_shard(tmp_path, cache):
    with pytest.raises(DataError):
        open_tars(f"pipe:touch {tmp_path}/owned; cat {tmp_path}/{{0..1}}.tar", cache)
    assert not (tmp_path / "owned").exists()

"""Samples out of tars: the bytes that went in, from sound shards only, wherever they lie."""

from __future__ import annotations

import multiprocessing
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import locations
from data_prep.record import DataError
from pipeline.data import store as storing
from pipeline.data.ahead import Ahead
from pipeline.data.cache import Cache
from pipeline.data.store import ShardStore
from pipeline.data.tar_index import ShardError
from pipeline.data.tars import TarSet
from tests.pipeline.tars import members, sealed, write_tar
from tests.servers import RESET, SHORT, STALL, UNAVAILABLE, WRONG, serving

SIZES = (3, 5, 2)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(locations, "WAIT_S", 0.01)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 1 << 30)


def all_samples(store, sizes=SIZES):
    return [store.read(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


def assert_whole(store):
    for number, stored in enumerate(all_samples(store)):
        expected = list(members(number).values())
        assert stored.key == f"{number:09d}"
        assert [bytes(part) for part in (stored.image, stored.txt, stored.json)] == expected


def test_samples_are_the_bytes_that_went_in(tmp_path, cache):
    assert_whole(ShardStore([sealed(tmp_path / "tars", SIZES)], cache))


def test_members_far_apart_and_missing_ones(tmp_path, cache):
    content = {"a.jpg": b"image", "b.txt": b"no image", "c.bin": bytes(200_000), "a.txt": b"text"}
    path = write_tar(tmp_path / "0.tar", content)
    one = sealed(tmp_path / "sealed", (1,))
    row = one.shards[0].__class__("train", path.name, path.stat().st_size, "", 2, 2)
    store = ShardStore([TarSet(str(tmp_path), one.shards.of([row]), ("",), "f")], cache)
    first, second = store.read(0, 0), store.read(0, 1)
    assert [bytes(part) for part in (first.image, first.txt, first.json)] == [b"image", b"text", b""]
    assert [bytes(part) for part in (second.image, second.txt)] == [b"", b"no image"]
    assert (first.key, second.key) == ("a", "b")


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_found_before_a_sample_is_used(tmp_path_factory, at, bit):
    folder = tmp_path_factory.mktemp("flip")
    one = sealed(folder / "tars", (2,))
    path = folder / "tars" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"00000\.tar: sha256 is"):
        ShardStore([one], Cache(folder / "cache", 1 << 30)).read(0, 0)


@pytest.mark.parametrize("cut", ["member boundary", "mid-header", "mid-data"])
def test_a_cut_shard_is_refused_by_name(tmp_path, cache, cut):
    """A plain tar stream ends early and says nothing; also where the list was made of the cut file."""
    one = sealed(tmp_path / "tars", (3,))
    path = tmp_path / "tars" / "00000.tar"
    size = path.stat().st_size
    header = (ShardStore([one], Cache(tmp_path / "other", 1 << 30))._open(0).places[2][0][0] - 1) * 512
    os.truncate(path, {"member boundary": header, "mid-header": header + 100, "mid-data": header + 700}[cut])
    with pytest.raises(ShardError, match=rf"00000\.tar: \d+ bytes, {size} were listed"):
        ShardStore([one], cache).read(0, 0)
    with pytest.raises(ShardError, match=r"1 of 1 shards are not as listed: 00000\.tar \(\d+ bytes"):
        one.check()
    row = one.shards[0].__class__("train", path.name, path.stat().st_size, "", 3, 3)
    with pytest.raises(ShardError, match=r"00000\.tar: .*damaged|00000\.tar: .*cut off"):
        ShardStore([TarSet(str(path.parent), one.shards.of([row]), ("",), "f")], cache).read(0, 0)


def test_missing_shards_are_listed(tmp_path):
    one = sealed(tmp_path / "tars", SIZES)
    (tmp_path / "tars" / "00001.tar").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 shards are not as listed: 00001\.tar \(missing\)"):
        one.check()


def test_another_number_of_samples_than_listed_is_refused(tmp_path, cache):
    one = sealed(tmp_path / "tars", (3,))
    row = one.shards[0].__class__(**{**vars(one.shards[0]), "samples": 4})
    with pytest.raises(ShardError, match="holds 3 samples, 4 were listed"):
        ShardStore([TarSet(one.address, one.shards.of([row]), (), "f")], cache).read(0, 0)


def test_a_shard_on_this_machine_is_hashed_once_and_again_when_it_changes(tmp_path, cache, monkeypatch):
    one, hashed = sealed(tmp_path / "tars", SIZES), []
    monkeypatch.setattr(storing, "sha256", lambda path: hashed.append(path.name) or locations_sha256(path))
    for _ in range(2):
        ShardStore([one], cache).bring(range(3))
    assert sorted(hashed) == ["00000.tar", "00001.tar", "00002.tar"]
    path = tmp_path / "tars" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"00001\.tar: sha256 is"):
        ShardStore([one], cache).bring(range(3))
    ShardStore([one], cache, verify=False).bring(range(3))
    assert hashed.count("00001.tar") == 2


def locations_sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("trouble", [[], [UNAVAILABLE] * 2, [RESET], [SHORT], [WRONG], [SHORT, WRONG, RESET]])
@pytest.mark.parametrize("ranges", [True, False])
def test_remote_shards_arrive_whole_whatever_their_server_does(tmp_path, cache, trouble, ranges):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", SIZES, server.url)
        server.faults, server.ranges = [*trouble], ranges
        store = ShardStore([one], cache)
        store.arrive(0)
        assert not server.faults
        assert_whole(store)
        asked = dict(server.requests)
        assert_whole(ShardStore([one], cache))  # from the copies
        assert server.requests == asked


def test_wrong_bytes_never_reach_training(tmp_path, cache):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", SIZES, server.url)
        server.faults = [WRONG] * 99
        with pytest.raises(DataError, match=r"00000\.tar: cannot be fetched .*sha256 is"):
            ShardStore([one], cache).read(0, 0)
    assert not list((cache.path / "shards").iterdir())


def test_copies_are_bounded_and_the_longest_unused_go_first(tmp_path):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", (4,) * 6, server.url)
        size = max(one.shards.numbers("bytes"))
        cache = Cache(tmp_path / "cache", int(3 * size))
        store = ShardStore([one], cache)
        copies = [cache.copy(store._source(shard).key) for shard in range(6)]
        for shard in range(3):
            store.read(shard, 0)
            os.utime(copies[shard], (shard, shard))
        store.use([0])
        store.read(3, 0)
        assert [copy.exists() for copy in copies] == [True, False, True, True, False, False]
        assert len(list((cache.path / "shards").glob("*.npy"))) == 3
        assert bytes(store.read(1, 2).txt) == b"picture 6"  # read from what is gone, but still open
        for shard in range(6):
            store.read(shard, 1)
            taken = sum(file.stat().st_size for file in (cache.path / "shards").glob("*.tar*"))
            assert taken <= cache.limit


def test_what_a_killed_process_left_half_fetched_is_cleared_away(tmp_path):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", (4,) * 2, server.url)
        size = int(max(one.shards.numbers("bytes")))
        cache = Cache(tmp_path / "cache", size + 100)
        server.faults = [STALL]
        process = multiprocessing.get_context("fork").Process(target=ShardStore([one], cache).arrive, args=(0,))
        process.start()
        while not list((cache.path / "shards").glob("*.tmp")):
            time.sleep(0.01)
        process.kill()
        process.join()
        server.released.set()
        (left,) = (cache.path / "shards").glob("*.tmp")
        ShardStore([one], cache).read(1, 0)
        assert not left.exists()


def test_many_processes_fetch_a_shard_once(tmp_path, cache):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", SIZES, server.url)
        server.latency_s = 0.1
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=ShardStore([one], cache).bring, args=(range(3),)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert dict(server.requests) == {"00000.tar": 1, "00001.tar": 1, "00002.tar": 1}


def test_a_foreign_shard_that_changes_is_noticed_when_it_is_fetched(tmp_path, cache):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", (3,), server.url)
        row = one.shards[0].__class__(**{**vars(one.shards[0]), "sha256": ""})
        foreign = TarSet(server.url, one.shards.of([row]), ('"an older etag"',), "f")
        with pytest.raises(ShardError, match="changed since the run began"):
            ShardStore([foreign], cache).read(0, 0)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    """A file system of 200 kB, which is full once the first shard is on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=200k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting a small file system needs root")
    try:
        with serving(tmp_path / "tars") as server:
            one = sealed(tmp_path / "tars", (40,) * 2, server.url)
            store = ShardStore([one], Cache(disk, 1 << 30))
            with pytest.raises(
                DataError, match=r"disk: cannot be written to \(No space left.* lower data\.cache_gb, or choose another"
            ):
                store.bring(range(2))
            assert not list(disk.glob("shards/*.tmp"))
    finally:
        os.system(f"umount -l {disk}")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, cache):
    """Also where nothing is fetched: what is found out about shards on disk is kept, too."""
    one = sealed(tmp_path / "tars", SIZES)
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "shards").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"disk: cannot be written to .*data\.cache="):
        ShardStore([one], Cache(disk, 1 << 30)).read(0, 0)


def test_a_server_without_ranges_sends_a_shard_of_many_blocks_once(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(storing, "FETCHED", 1000)
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", SIZES, server.url)
        assert_whole(ShardStore([one], cache))
        assert server.requests["00000.tar"] > 3
        server.ranges = False
        server.requests.clear()
        assert_whole(ShardStore([one], Cache(tmp_path / "other", 1 << 30)))
        assert set(server.requests.values()) == {1}


def test_processes_that_share_too_small_a_cache_get_on(tmp_path):
    """Each evicts what others have just fetched; all find every shard whole."""
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", (2,) * 12, server.url)
        cache = Cache(tmp_path / "cache", int(2.5 * max(one.shards.numbers("bytes"))))
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=read_all, args=(one, cache, seed)) for seed in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4


def read_all(one, cache, seed):
    store = ShardStore([one], cache)
    for shard in random.Random(seed).sample(range(12), 12) * 3:
        store.bring([shard])
        assert bytes(store.read(shard, 1).txt) == f"picture {2 * shard + 1}".encode()


def test_shards_arrive_ahead_of_time_and_trouble_is_left_to_who_needs_them(tmp_path, cache, caplog):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", (3,) * 8, server.url)
        (tmp_path / "tars" / "00002.tar").unlink()
        store = ShardStore([one], cache)
        ahead = Ahead(store, threads=2)
        ahead.want([5, 2, 0])
        deadline = time.monotonic() + 30
        while len(list((cache.path / "shards").glob("*.npy"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        while "00002.tar did not arrive ahead of time" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {name: count for name, count in server.requests.items() if name != "00002.tar"} == {
            "00005.tar": 1,
            "00000.tar": 1,
        }
        with pytest.raises(ShardError, match=r"00002\.tar: cannot be fetched \(FileNotFoundError"):
            store.read(2, 0)
        ahead.want([5, 6])
        while not cache.places(store._source(6).key).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.requests["00005.tar"] == 1

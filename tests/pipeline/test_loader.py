"""Batches by loader processes: what the plan says, whatever the processes, ranks and interruptions."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from data_prep.record import DataError
from pipeline.data import loader, shared
from pipeline.data.cache import Cache
from pipeline.data.loader import Augmentation, LoaderError, Stream
from pipeline.data.plan import Plan, Share, rank_bounds
from pipeline.data.store import ShardStore
from pipeline.data.tar_index import ShardError
from pipeline.data.tars import TarSet
from tests.pipeline.tars import members, sealed, write_tar
from tests.servers import STALL, serving

SIZES = (13, 1, 22, 17, 30)
AUGMENTATION = Augmentation((16, 16), (0.5, 1.0), "bicubic", 0.2, {"captions": 1.0})


def letters(texts):
    """A tokenizer: 24 character codes a text."""
    return torch.tensor([[ord(letter) for letter in text.ljust(24)[:24]] for text in texts])


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("tars"), SIZES)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts a batch, of unequal size."""
    monkeypatch.setattr(loader, "PART", 4)


def plan_of(one, batch=10, **settings):
    return Plan([Share(one.fingerprint, one.shards.numbers("samples"))], 5, batch, **settings)


def stream(one, steps, tmp_path, *, plan=None, rank=0, world=1, workers=2, tokenize=letters, **settings):
    plan = plan or plan_of(one)
    bounds = rank_bounds(plan.global_batch, world)
    store = ShardStore([one], Cache(tmp_path / "cache", 1 << 30))
    own = bounds[rank], bounds[rank + 1]
    return Stream(plan, store, AUGMENTATION, tokenize, 24, own, steps, workers=workers, **settings)


def read(one, steps, tmp_path, **settings):
    """[(images, tokens, ids, photos)] of each step, copied out of the loader's memory."""
    with stream(one, steps, tmp_path, **settings) as batches:
        return [tuple(tensor.clone() for tensor in batch[:4]) for batch in batches]


def join(ranks):
    """Global batches, from the ranks' parts of them."""
    return [tuple(torch.cat(column) for column in zip(*parts, strict=True)) for parts in zip(*ranks, strict=True)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_hold_what_the_plan_names(tars, tmp_path):
    plan = plan_of(tars)
    for step, (images, tokens, ids, photos) in enumerate(read(tars, range(20), tmp_path)):
        assert ids.tolist() == plan.global_ids(step).tolist()
        for row, sample in enumerate(ids.tolist()):
            text = "".join(chr(code) for code in tokens[row].tolist()).strip()
            assert text in (f"picture {sample}", f"number {sample} seen again")
        assert len(set(photos.tolist())) == 10
        assert images.shape == (10, 3, 16, 16)
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("begin", [0, 7, 8, 23])
def test_pixels_texts_and_order_depend_on_no_process_and_no_interruption(tars, tmp_path, workers, begin):
    """An epoch is eight steps of ten: begun anew at its first and last step, and two epochs later."""
    straight = read(tars, range(40), tmp_path, workers=2)
    assert_equal(read(tars, range(begin, 40), tmp_path, workers=workers), straight[begin:])


def test_a_pass_takes_one_caption_of_each_image_and_another_pass_may_take_another(tars, tmp_path):
    epochs = [read(tars, range(8 * epoch, 8 * epoch + 8), tmp_path) for epoch in (0, 1)]
    chosen = [
        {sample: bytes(row) for _, tokens, ids, _ in epoch for sample, row in zip(ids.tolist(), tokens, strict=True)}
        for epoch in epochs
    ]
    both = chosen[0].keys() & chosen[1].keys()
    assert 0.25 < np.mean([chosen[0][sample] != chosen[1][sample] for sample in both]) < 0.75


def test_ranks_share_every_global_batch_also_where_they_do_not_divide_it(tars, tmp_path):
    """One rank, two, four; then five, three and seven, one after the other."""
    straight = read(tars, range(12), tmp_path)
    for world in (2, 4, 7):
        ranks = [read(tars, range(12), tmp_path, rank=rank, world=world, workers=1) for rank in range(world)]
        assert_equal(join(ranks), straight)
        sizes = [len(parts[0][2]) for parts in ranks]
        assert max(sizes) - min(sizes) <= 1
    joined = []
    for steps, world in ((range(4), 5), (range(4, 8), 3), (range(8, 12), 7)):
        ranks = [read(tars, steps, tmp_path, rank=rank, world=world, workers=0) for rank in range(world)]
        joined += [
            tuple(torch.cat(column) for column in zip(*parts, strict=True)) for parts in zip(*ranks, strict=True)
        ]
    assert_equal(joined, straight)


def test_one_shard_serves_eight_ranks(tmp_path):
    one = sealed(tmp_path / "tars", (20,))
    ids = [read(one, range(1), tmp_path, rank=rank, world=8, workers=2)[0][2].tolist() for rank in range(8)]
    assert list(itertools.chain(*ids)) == plan_of(one).global_ids(0).tolist()


def test_an_epoch_sees_every_sample_once_in_lanes_and_windows(tars, tmp_path):
    plan = plan_of(tars, lanes=5, window=7)
    seen = torch.cat([ids for _, _, ids, _ in read(tars, range(plan.first_step(1)), tmp_path, plan=plan)])
    assert len(seen) == plan.samples - plan.dropped_tail == 80
    assert len(seen.unique()) == 80


def test_a_remote_epoch_in_a_cache_smaller_than_the_data(tmp_path):
    """Its windows fit, the data does not: shards come and go, and the batches stay the same."""
    with serving(tmp_path / "tars") as server:
        server.latency_s = 0.02
        one = sealed(tmp_path / "tars", (6,) * 20, server.url)
        plan = plan_of(one, lanes=2, window=12)
        local = TarSet(str(tmp_path / "tars"), one.shards, (), one.fingerprint)
        expected = read(local, range(12), tmp_path / "local", plan=plan, workers=1)
        shards = one.shards.numbers("bytes")
        store = ShardStore([one], Cache(tmp_path / "cache", int(14 * shards.max())))
        with Stream(plan, store, AUGMENTATION, letters, 24, (0, 10), range(12), workers=2) as batches:
            assert_equal([tuple(tensor.clone() for tensor in batch[:4]) for batch in batches], expected)
        assert max(server.requests.values()) <= 2
        assert sum(server.requests.values()) <= 24


@pytest.fixture
def damaged(tmp_path):
    """The same samples, of which five are unreadable in five ways."""
    content = {name: data for number in range(sum(SIZES)) for name, data in members(number).items()}
    content["000000003.jpg"] = b"no picture"
    content["000000020.jpg"] = content["000000020.jpg"][:300]
    content["000000040.json"], content["000000040.txt"] = b"{}", b"\xff\xfe\xfa"
    content["000000050.json"], content["000000050.txt"] = b"{}", b"  "
    content["000000060.json"] = b"{"
    path = write_tar(tmp_path / "damaged" / "00000.tar", content)
    one = sealed(tmp_path / "sealed", (1,))
    row = one.shards[0].__class__("train", path.name, path.stat().st_size, "", sum(SIZES), sum(SIZES))
    return TarSet(str(path.parent), one.shards.of([row]), ("",), "f")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_replaced_by_plan_and_the_others_keep_their_place(damaged, tmp_path, workers):
    bad = {3: "undecodable", 20: "undecodable", 40: "unreadable text", 50: "no text", 60: "unreadable text"}
    plan = plan_of(damaged)
    with stream(damaged, range(8), tmp_path, plan=plan, workers=workers) as batches:
        seen = [(batch.id_B.tolist(), batch.replaced) for batch in batches]
    planned = [plan.global_ids(step).tolist() for step in range(8)]
    told = [item for _, replaced in seen for item in replaced]
    in_epoch = [sample for ids in planned for sample in ids if sample in bad]
    assert sorted(item.sample for item in told) == sorted(in_epoch)
    for item in told:
        assert (item.key, item.shard) == (f"{item.sample:09d}", "00000.tar")
        assert item.reason.startswith(bad[item.sample])
        assert item.substitute == plan.substitute(item.sample, 0)
    stand_in = {item.sample: item.substitute for item in told}
    for (ids, _), expected in zip(seen, planned, strict=True):
        assert ids == [stand_in.get(sample, sample) for sample in expected]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_is_all_unreadable_ends_with_one_plain_sentence(tmp_path, workers):
    path = write_tar(tmp_path / "bad" / "00000.tar", {f"{number}.jpg": b"no picture" for number in range(30)})
    one = sealed(tmp_path / "sealed", (1,))
    row = one.shards[0].__class__("train", path.name, path.stat().st_size, "", 30, 30)
    bad = TarSet(str(path.parent), one.shards.of([row]), ("",), "f")
    with pytest.raises(DataError, match=r"sample \d+ and 16 substitutes") as error:
        read(bad, range(3), tmp_path, workers=workers)
    assert "Traceback" not in str(error.value)


def test_a_damaged_shard_is_named_by_a_loader_process(tmp_path):
    one = sealed(tmp_path / "tars", SIZES)
    path = tmp_path / "tars" / "00002.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 4
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"00002\.tar: sha256 is"):
        read(one, range(8), tmp_path)


def test_an_error_of_ours_in_a_loader_process_comes_with_its_trace(tars, tmp_path):
    def broken(texts):
        raise ZeroDivisionError("in the tokenizer")

    with pytest.raises(LoaderError, match=r"loader process \d failed:\n.*") as error:
        read(tars, range(3), tmp_path, tokenize=broken)
    assert "in broken" in str(error.value)


def test_a_killed_loader_process_is_named(tars, tmp_path):
    def kill(texts):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    with pytest.raises(
        LoaderError, match=r"loader process \d \(\d+\) has died \(SIGKILL\), at 0000\d\.tar.*lower data\."
    ):
        read(tars, range(3), tmp_path, tokenize=kill)
    assert time.monotonic() - began < 60


def test_a_loader_process_that_dies_before_it_begins_is_named(tars, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_begin", lambda _: os._exit(3))
    with pytest.raises(LoaderError, match=r"loader process \d \(\d+\) has died \(exit 3\), between two batches"):
        read(tars, range(3), tmp_path)


def test_what_ends_the_trainer_is_not_laid_on_the_loader(tars, tmp_path):
    """However long it took, with loader processes idle meanwhile."""

    def train():
        with stream(tars, range(1000), tmp_path, timeout_s=1) as batches:
            next(iter(batches))
            time.sleep(1.5)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        train()


def test_a_loader_process_stuck_on_a_server_is_named_with_its_shard(tmp_path):
    with serving(tmp_path / "tars") as server:
        one = sealed(tmp_path / "tars", SIZES, server.url)
        server.faults = [STALL] * 20
        began = time.monotonic()
        with pytest.raises(
            LoaderError,
            match=r"loader process \d \(\d+\) has been at 0000\d\.tar for \d+ s, longer than data\.timeout_s",
        ):
            read(one, range(3), tmp_path, timeout_s=2)
        assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()


def slowly(monkeypatch, seconds):
    """Let reading take so long that loader processes are nearly always at a shard."""
    quick = ShardStore.read

    def slow(store, shard, index):
        time.sleep(seconds)
        return quick(store, shard, index)

    monkeypatch.setattr(ShardStore, "read", slow)


def test_a_stopped_loader_process_is_named(tars, tmp_path, monkeypatch):
    slowly(monkeypatch, 0.2)
    with stream(tars, range(10_000), tmp_path, timeout_s=2) as batches:
        steps = iter(batches)
        next(steps)
        time.sleep(0.1)  # what has just handed over a part is at the next one
        stopped = next(iter(multiprocessing.active_children()))
        os.kill(stopped.pid, signal.SIGSTOP)
        with pytest.raises(LoaderError, match=rf"\({stopped.pid}\) has been at 0000\d\.tar for"):
            for _ in steps:
                pass
    assert not multiprocessing.active_children()


def test_a_loader_process_stopped_between_two_batches_ends_the_wait_too(tars, tmp_path):
    with stream(tars, range(10_000), tmp_path, timeout_s=2, workers=1) as batches:
        steps = iter(batches)
        next(steps)
        time.sleep(0.5)  # it has made all that it may make ahead
        (stopped,) = multiprocessing.active_children()
        os.kill(stopped.pid, signal.SIGSTOP)
        with pytest.raises(LoaderError, match=rf"\({stopped.pid}\) has been between two batches for"):
            for _ in steps:
                pass


def test_slow_work_that_gets_on_is_waited_for(tars, tmp_path, monkeypatch):
    """Each part takes longer than the time-out, no sample does."""
    slowly(monkeypatch, 0.5)
    assert len(read(tars, range(2), tmp_path, timeout_s=1)) == 2


def test_a_loader_that_is_left_early_leaves_no_process(tars, tmp_path):
    with stream(tars, range(1000), tmp_path, workers=3) as batches:
        for _ in zip(range(3), batches, strict=False):
            pass
        assert len(multiprocessing.active_children()) == 3
    assert not multiprocessing.active_children()


def test_loader_processes_may_be_spawned(tars, tmp_path, monkeypatch):
    """As on macOS, where they are not forked: everything they need is sent to them, and the batches are shared."""
    expected = read(tars, range(3), tmp_path)
    for module in (loader, shared):
        monkeypatch.setattr(module, "START", "spawn")
    monkeypatch.setattr(loader, "PART", 10)  # which the processes do not see
    for ours, theirs in zip(read(tars, range(3), tmp_path, workers=1), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_memory_is_flat_over_twenty_epochs(tars, tmp_path):
    with stream(tars, range(20 * 8), tmp_path) as batches:
        taken = [batches.memory() for _ in batches]
    assert taken[-1] - taken[3 * 8] < 4 << 20


def test_a_loader_process_that_leaks_is_told_of(tars, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shared, "LEAK", 100 << 20)
    kept = []

    def leaky(texts):
        kept.append(np.ones(1 << 19))
        return letters(texts)

    with caplog.at_level(logging.WARNING), stream(tars, range(60), tmp_path, tokenize=leaky) as batches:
        for _ in batches:
            batches.memory()
    assert "has gained 0.1 GB since it began: it leaks" in caplog.text

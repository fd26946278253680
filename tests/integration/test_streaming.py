"""Training on tars wherever they lie and whoever made them: mixed, remote, damaged, missing, changed."""

from __future__ import annotations

import json
import os
import shutil
import signal

import psutil
import pytest

from data_prep import locations
from pipeline.tracking import read_metrics
from tests.pipeline.tars import members, write_tar, write_tars
from tests.processes import finish, free_port, kill_at_step, last_step, start_trainer, train
from tests.servers import UNAVAILABLE, serving, upload


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def hashes(run):
    return [line["batch_sha256"] for line in read_metrics(run)]


def verdict(run):
    return json.loads((run / "exit.json").read_text())


def environment(run):
    return json.loads((run / "environment.json").read_text())


def as_img2dataset(folder, sizes):
    for path, size in zip(write_tars(folder, sizes), sizes, strict=True):
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": size}))
    return folder


def test_other_tools_tars_are_mixed_with_ours_in_exact_parts(dataset, recipe, tmp_path, run):
    """70 samples of ours and 24 of img2dataset's, 7 and 3 of each batch of ten."""
    foreign = as_img2dataset(tmp_path / "laion", (9, 15))
    command = [str(recipe()), str(run), "--data", f"{dataset}@7 {foreign}@3", "data.tail=wrap"]
    kill_at_step(command, run, 5)
    assert train(command) == 0
    assert list(environment(run)["datasets"]) == [str(dataset), str(foreign)]
    assert train([str(recipe()), str(tmp_path / "straight"), *command[2:]]) == 0
    assert hashes(run) == hashes(tmp_path / "straight")
    longer = [*command[:3], f"{dataset}@1 {foreign}@1", "data.tail=wrap", "train.steps=16"]
    assert train(longer) == 2
    assert "mixture: " in verdict(run)["reason"]


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_run_on_remote_shards_is_the_run_on_local_ones(dataset, recipe, tmp_path, run, scheme, request):
    settings = ["data.lanes=2", "data.window=20", "train.steps=9"]
    assert train([str(recipe()), str(tmp_path / "local"), "--data", str(dataset), *settings]) == 0
    if scheme == "s3":
        address = f"{request.getfixturevalue('bucket')}/data"
        upload(dataset, address)
        assert train([str(recipe()), str(run), "--data", address, f"data.cache={tmp_path}", *settings]) == 0
    else:
        with serving(dataset) as server:
            server.faults = ["", UNAVAILABLE] * 4
            assert train([str(recipe()), str(run), "--data", server.url, f"data.cache={tmp_path}", *settings]) == 0
            assert not server.faults
    keys = ("loss", "grad_norm", "batch_sha256")
    ours, theirs = ([[line[key] for key in keys] for line in read_metrics(one)] for one in (tmp_path / "local", run))
    assert ours == theirs
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 5


def signed(rank):
    import fsspec

    fsspec.config.conf["http"] = {"params": {"sig": "S3CRET"}}  # as FSSPEC_HTTP does


def test_a_secret_is_in_no_file_of_a_run(dataset, recipe, tmp_path, run):
    with serving(dataset) as server:
        server.signature = "sig=S3CRET"
        server.faults = [UNAVAILABLE, "", UNAVAILABLE]
        settings = [f"data.cache={tmp_path / 'cache'}", f"checkpoint.copy_to={tmp_path / 'copy'}", "train.steps=2"]
        command = [str(recipe()), str(run), "--data", server.url, *settings]
        assert train(command, before=signed) == 0
        assert train([*command[:3], f"{server.url}?sig=S3CRET", *settings]) == 2
    assert f"data.datasets = [{{'path': '{server.url}', 'weight': 1.0}}]: an address has" in verdict(run)["reason"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if b"S3CRET" in path.read_bytes()]


def test_a_cache_that_is_too_small_is_refused_with_the_fix(dataset, recipe, tmp_path, run):
    with serving(dataset) as server:
        command = [str(recipe()), str(run), "--data", server.url, f"data.cache={tmp_path}", "data.cache_gb=1e-6"]
        assert train(command) == 2
    assert "data.cache_gb = 1e-06 is less than the 0.0 GB" in verdict(run)["reason"]


def test_a_missing_shard_ends_all_ranks_before_the_first_step(dataset, recipe, tmp_path, run):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / "train/00002.tar").unlink()
    command, port = [str(recipe()), str(run), "--data", str(copy)], free_port()
    ranks = [start_trainer(command, rank=rank, world=2, port=port) for rank in range(2)]
    assert [finish(process) for process in ranks] == [2, 2]
    assert "train/00002.tar (missing)" in verdict(run)["reason"]
    assert not (run / "metrics.jsonl").exists()


def test_a_damaged_shard_ends_all_ranks_before_the_first_step(dataset, recipe, tmp_path, run):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    data = bytearray((copy / "train/00003.tar").read_bytes())
    data[5000] ^= 1
    (copy / "train/00003.tar").write_bytes(data)
    command, port = [str(recipe()), str(run), "--data", str(copy)], free_port()
    ranks = [start_trainer(command, rank=rank, world=2, port=port) for rank in range(2)]
    assert [finish(process) for process in ranks] == [2, 2]
    assert "00003.tar: sha256 is" in verdict(run)["reason"]
    assert not (run / "metrics.jsonl").exists()


def test_changed_data_are_accepted_only_on_request_and_then_recorded(dataset, recipe, tmp_path, run, caplog):
    first, other = as_img2dataset(tmp_path / "a", (20, 21)), as_img2dataset(tmp_path / "b", (20, 21))
    data = bytearray((other / "00001.tar").read_bytes())
    data[520] ^= 1
    (other / "00001.tar").write_bytes(data)
    kill_at_step([str(recipe()), str(run), "--data", str(first)], run, 9)
    again = [str(recipe()), str(run), "--data", str(other)]
    assert train(again) == 2
    assert "fingerprint: " in verdict(run)["reason"]
    assert train([*again, "seed=9", "train.accept_changes=true"]) == 0
    (accepted,) = environment(run)["accepted_changes"]
    assert accepted["step"] in (4, 8)  # the latter may just have been published
    assert [change.split(":")[0] for change in accepted["changes"]] == ["seed", "fingerprint", "seed", "mixture"]
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 16))


@pytest.fixture
def partly_unreadable(tmp_path):
    """120 samples of which every tenth has no picture."""
    content = {name: data for number in range(120) for name, data in members(number).items()}
    content |= {f"{number:09d}.jpg": b"no picture" for number in range(0, 120, 10)}
    write_tar(tmp_path / "bad" / "00000.tar", content)
    return tmp_path / "bad"


@pytest.mark.parametrize("world", [1, 2])
def test_unreadable_samples_are_replaced_counted_and_listed(partly_unreadable, recipe, run, world):
    command = [str(recipe()), str(run), "--data", str(partly_unreadable), "train.steps=12", "data.max_bad=0.2"]
    assert train(command, world=world) == 0
    listed = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    # Once each, and once more for each that the plan named in place of another.
    in_place = sum(item["substitute"] % 10 == 0 for item in listed)
    assert {item["sample"] for item in listed} == set(range(0, 120, 10))
    assert {item["key"] for item in listed} == {f"{number:09d}" for number in range(0, 120, 10)}
    assert read_metrics(run)[-1]["bad_samples"] == len(listed) == 12 + in_place


def test_too_many_unreadable_samples_stop_all_ranks_together(partly_unreadable, recipe, run):
    settings = ["train.steps=1000", "data.max_bad=0.05"]
    command, port = [str(recipe()), str(run), "--data", str(partly_unreadable), *settings], free_port()
    ranks = [start_trainer(command, rank=rank, world=2, port=port) for rank in range(2)]
    assert [finish(process) for process in ranks] == [1, 1]
    assert "more than data.max_bad = 0.05" in verdict(run)["reason"]
    last = read_metrics(run)[-1]
    assert last["bad_samples"] > 0.05 * max(last["samples_seen"], 1000)
    assert list((run / "checkpoints").glob("step-*/CHECKSUMS.json"))


def test_fewer_samples_than_a_batch_is_refused_at_once(recipe, tmp_path, run):
    few = as_img2dataset(tmp_path / "few", (4, 3))
    assert train([str(recipe()), str(run), "--data", str(few)]) == 2
    assert "has 7 samples, fewer than the 10" in verdict(run)["reason"]
    assert train([str(recipe()), str(run), "--data", str(few), "data.tail=wrap", "train.steps=3"]) == 0


def test_one_shard_trains_on_more_ranks_and_loader_processes_than_shards(recipe, tmp_path, run):
    one = as_img2dataset(tmp_path / "one", (40,))
    command = [str(recipe()), "--data", str(one), "data.workers=2", "train.steps=5"]
    assert train([command[0], str(run), *command[1:]], world=3) == 0
    assert train([command[0], str(tmp_path / "alone"), *command[1:]]) == 0
    lanes = [environment(folder)["lanes"] for folder in (run, tmp_path / "alone")]
    assert lanes == [3, 1]  # foreign tars are read in lanes, one a rank when the run begins
    again = [command[0], str(run), *command[1:-1], "train.steps=8"]
    assert train(again, world=2) == 0
    assert environment(run)["lanes"] == 3


def test_a_killed_loader_process_is_named_with_its_shard(dataset, recipe, run):
    """Wherever the trainer is when it dies: the run ends, says so, and does not hang."""
    process = start_trainer([str(recipe()), str(run), "--data", str(dataset), "train.steps=100000"])
    while last_step(run) < 3:
        assert process.is_alive()
    (worker,) = psutil.Process(process.pid).children()
    os.kill(worker.pid, signal.SIGKILL)
    assert finish(process) == 75
    assert verdict(run)["status"] == "requeue"
    assert f"LoaderKilledError: loader process 0 ({worker.pid}) has died" in verdict(run)["reason"]
    assert psutil.pid_exists(process.pid) is False


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(locations, "WAIT_S", 0.01)

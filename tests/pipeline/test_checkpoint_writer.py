"""Checkpoints written in the background: what is kept, what BEST names, and the copy elsewhere."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch

from data_prep import locations
from data_prep.locations import path_of
from data_prep.record import DataError
from pipeline import checkpoint as checkpoints
from pipeline import checkpoint_copy, checkpoint_writer
from pipeline.checkpoint import Checkpoint, CheckpointError
from pipeline.checkpoint_copy import fetch_copy
from pipeline.checkpoint_writer import Writer
from pipeline.failure import TrainingError
from tests.pipeline.test_checkpoint import assert_same, make

FIGURE = "coco/recall@1"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(params=["folder", "bucket"])
def copy(request, tmp_path):
    """The address of a copy: a folder, or a bucket on a real S3 API."""
    return str(tmp_path / "copy") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/copy"


@pytest.fixture
def held(monkeypatch):
    """An event that publishing waits for."""
    gate, publish = threading.Event(), checkpoints.publish

    def wait_and_publish(run, checkpoint):
        assert gate.wait(20)
        return publish(run, checkpoint)

    monkeypatch.setattr(checkpoints, "publish", wait_and_publish)
    yield gate
    gate.set()


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def pointer(root, name):
    return (root / name).read_text()


def evaluate(run, step, value):
    """What an evaluation job writes."""
    folder = run / "eval" / checkpoints.folder_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coco.json").write_text(json.dumps({"dataset": "coco", "metrics": {"recall@1": value}}))


def fail(_):
    return 1 / 0


def describe(run):
    """What a run folder holds beside its checkpoints."""
    (run / "tokenizer").mkdir(parents=True)
    for name in ("config.yaml", "environment.json", "tokenizer/tokenizer.json", "metrics.jsonl", "evaluations.jsonl"):
        (run / name).write_text(f"content of {name}")


def test_what_is_saved_is_what_was_there_at_the_call(run, held):
    """The trainer goes on changing its tensors, and its plain values, while they are written."""
    given, expected = make(1), make(1)
    with Writer(run) as writer:
        writer.save(given)
        with torch.no_grad():
            for tensors in (given.model, given.average, given.optimizer["state"][0]):
                for tensor in tensors.values():
                    tensor.add_(1)
        given.optimizer["param_groups"][0]["lr"] = 77.0
        given.state["stream"]["epoch"] = 77
        held.set()
        writer.wait()
        assert_same(expected, checkpoints.load_newest(run))
        assert pointer(run / "checkpoints", "LATEST") == "step-00000001"


def test_memory_is_taken_once(run):
    """Buffers are used again where shapes are the same, and given back where they are not needed any more."""
    memory = checkpoint_writer.HostMemory()
    first = memory.take(make(1))
    places = [first.model["weight"].data_ptr(), first.optimizer["state"][0]["exp_avg"].data_ptr()]
    second = memory.take(make(2))
    assert [second.model["weight"].data_ptr(), second.optimizer["state"][0]["exp_avg"].data_ptr()] == places
    assert_same(make(2), Checkpoint(2, second.model, second.optimizer, {"step": 2, **second.state}, second.average))
    third = memory.take(make(3, size=4, average=False))
    assert third.model["weight"].shape == (4, 2)
    assert len(memory._held) == 4  # weight, step, exp_avg, exp_avg_sq


def test_a_copy_lies_as_the_tensor_did_and_not_in_the_trainers_memory():
    """Fused optimizers refuse state that lies otherwise than its parameter; tied weights are two in a file."""
    tied = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    given = Checkpoint(1, {"a": tied, "b": tied}, {"state": {0: {"exp_avg": tied}}}, {})
    taken = checkpoint_writer.HostMemory().take(given)
    assert taken.optimizer["state"][0]["exp_avg"].stride() == tied.stride()
    assert len({tied.data_ptr(), *(tensor.data_ptr() for tensor in taken.model.values())}) == 3


def test_tied_weights_can_be_saved(run):
    tied = torch.randn(3, 4)
    with Writer(run) as writer:
        writer.save(Checkpoint(1, {"a": tied, "b": tied, "part": tied[:, :2]}, {}, {}))
    loaded = checkpoints.load(run, 1).model
    assert torch.equal(loaded["a"], tied)
    assert torch.equal(loaded["b"], tied)
    assert torch.equal(loaded["part"], tied[:, :2])


def test_a_second_save_waits_for_the_first(run, held):
    with Writer(run) as writer:
        writer.save(make(1))
        second = threading.Thread(target=writer.save, args=(make(2),))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        assert checkpoints.steps(run) == []
        held.set()
        second.join(20)
        assert not second.is_alive()
    assert checkpoints.steps(run) == [2, 1]


@pytest.mark.parametrize("told", ["save", "check", "wait", "exit"])
def test_a_save_that_failed_ends_the_run(run, monkeypatch, told):
    """At the next occasion, once, and with the former checkpoint as it was."""
    sync = checkpoints.sync

    def full(path):
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    writer = Writer(run)
    writer.save(make(1))
    writer.wait()
    monkeypatch.setattr(checkpoints, "sync", full)
    writer.save(make(2))
    writer._thread.submit(lambda: None).result()  # until the save has ended
    occasion = {
        "save": lambda: writer.save(make(3)),
        "check": writer.check,
        "wait": writer.wait,
        "exit": lambda: writer.__exit__(None, None, None),
    }[told]
    with pytest.raises(TrainingError, match=r"step 2 could not be saved .*No space left.* goes on from step 1"):
        occasion()
    assert checkpoints.load_newest(run).step == 1
    assert names(run) == ["LATEST", "step-00000001"]
    assert pointer(run / "checkpoints", "LATEST") == "step-00000001"
    monkeypatch.undo()
    writer.__exit__(None, None, None)  # told once


def test_a_failure_does_not_hide_what_ended_the_run(run, monkeypatch, caplog):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "sync", full)
    with pytest.raises(ZeroDivisionError), Writer(run) as writer:
        fail(writer.save(make(1)))
    assert "step 1 could not be saved" in caplog.text


def test_a_check_waits_for_nothing(run, held):
    with Writer(run) as writer:
        writer.check()
        writer.save(make(1))
        writer.check()
        assert checkpoints.steps(run) == []
        held.set()


def test_what_cannot_be_written_as_json_is_refused_at_once(run):
    with Writer(run) as writer, pytest.raises(TypeError):
        writer.save(Checkpoint(1, {}, {}, {"when": object()}))


def test_the_newest_are_kept(run):
    with Writer(run, keep=3) as writer:
        for step in range(1, 7):
            writer.save(make(step))
    assert names(run) == ["LATEST", *(f"step-0000000{step}" for step in (4, 5, 6))]


def test_the_best_is_kept_and_named(run):
    values = [0.1, 0.7, 0.3, 0.5, None, 0.6]
    with Writer(run, keep=2, keep_best=FIGURE) as writer:
        for step, value in enumerate(values, 1):
            writer.save(make(step, {"loss": 1.0, FIGURE: value}))
    assert checkpoints.steps(run) == [6, 5, 2]
    assert pointer(run / "checkpoints", "BEST") == "step-00000002"
    with Writer(run, keep=2, keep_best=FIGURE) as writer:  # after a resume, a better one takes its place
        writer.save(make(7, {FIGURE: 0.9}))
    assert checkpoints.steps(run) == [7, 6]
    assert pointer(run / "checkpoints", "BEST") == "step-00000007"


@pytest.mark.parametrize(
    ("figure", "best"),
    [
        ("loss", 2),
        ("coco/loss", 2),
        ("coco/text_retrieval_median_rank", 2),
        ("coco/recall@1", 3),
        ("loss/recall@1", 3),
        ("median_rank/acc1", 3),
        ("coco/gloss", 3),
    ],
)
def test_the_name_of_a_figure_says_which_is_better(run, figure, best):
    for step, value in ((1, 0.4), (2, 0.1), (3, 0.7)):
        checkpoints.publish(run, make(step, {figure: value}))
    assert checkpoint_writer.ranked(run, figure)[0] == best
    assert checkpoint_writer.lower_is_better(figure) == (best == 2)
    checkpoints.publish(run, make(4, {figure: 0.1 if best == 2 else 0.7}))
    assert checkpoint_writer.ranked(run, figure)[:2] == [4, best]


def test_a_figure_may_come_from_an_evaluation_after_the_save(run):
    with Writer(run, keep=2, keep_best=FIGURE) as writer:
        for step in (1, 2):
            writer.save(make(step))
        writer.wait()
        assert not (run / "checkpoints" / "BEST").exists()
        evaluate(run, 1, 0.9)
        evaluate(run, 2, 0.2)
        for step in (3, 4, 5):
            writer.save(make(step))
    assert checkpoints.steps(run) == [5, 4, 1]
    assert pointer(run / "checkpoints", "BEST") == "step-00000001"


def test_a_figure_may_be_of_the_average(run):
    for step, value in ((1, 0.9), (2, 0.2)):
        checkpoints.publish(run, make(step, {FIGURE: 0.5}))
        evaluate(run, step, value)
        folder = run / "eval" / checkpoints.folder_name(step)
        folder.rename(folder.with_name(f"{folder.name}-average"))
    assert checkpoint_writer.figures(run, 1) == {FIGURE: 0.5, f"ema/{FIGURE}": 0.9}
    assert checkpoint_writer.ranked(run, f"ema/{FIGURE}") == [1, 2]


def test_of_equals_the_newest_is_best_and_nan_is_no_figure(run):
    for step, value in ((1, 0.5), (2, 0.5), (3, float("nan"))):
        checkpoints.publish(run, make(step, {FIGURE: value}))
    evaluate(run, 3, "high")
    assert checkpoint_writer.ranked(run, FIGURE) == [2, 1]


def test_a_damaged_best_is_not_named(run, caplog):
    with Writer(run, keep=2, keep_best=FIGURE) as writer:
        for step, value in ((1, 0.9), (2, 0.8)):
            writer.save(make(step, {FIGURE: value}))
    (run / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
    with Writer(run, keep=2, keep_best=FIGURE) as writer:
        for step in (3, 4, 5):
            writer.save(make(step))
    assert checkpoints.steps(run) == [5, 4, 2]
    assert pointer(run / "checkpoints", "BEST") == "step-00000002"
    assert caplog.text.count("does not count") == 1


def test_a_figure_that_nobody_measures_is_told_of_once(run, caplog):
    with Writer(run, keep_best="coco/recal@1") as writer:
        for step in (1, 2):
            writer.save(make(step, {FIGURE: 0.5}))
    assert caplog.text.count("keep_best=coco/recal@1: no checkpoint has that figure yet; found ['coco/recall@1']") == 1


def test_a_copy_holds_what_the_run_holds(run, copy):
    describe(run)
    with Writer(run, keep=2, keep_best=FIGURE, copy_to=copy) as writer:
        for step, value in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
            writer.save(make(step, {FIGURE: value}))
    root = path_of(copy)
    assert checkpoints.steps_in(root) == checkpoints.steps(run) == [4, 3, 1]
    assert (pointer(root, "LATEST"), pointer(root, "BEST")) == ("step-00000004", "step-00000001")
    for path in run.rglob("*"):
        if path.is_file():
            inner = path.relative_to(run).as_posix().removeprefix("checkpoints/")
            assert (root / inner).read_bytes() == path.read_bytes()


def test_a_copy_comes_back(run, copy):
    """The newest, the best, and what else makes them a run; which the next save then goes on from."""
    describe(run)
    with Writer(run, keep=2, keep_best=FIGURE, copy_to=copy) as writer:
        for step, value in ((1, 0.9), (2, 0.1), (3, 0.2)):
            writer.save(make(step, {FIGURE: value}))
    assert fetch_copy(run, copy) is None  # there is a checkpoint here
    shutil.rmtree(run)
    assert fetch_copy(run, copy) == 3
    assert_same(make(3, {FIGURE: 0.2}), checkpoints.load_newest(run))
    assert names(run) == ["BEST", "LATEST", "step-00000001", "step-00000003"]
    assert (run / "tokenizer" / "tokenizer.json").read_text() == "content of tokenizer/tokenizer.json"
    for name in ("config.yaml", "metrics.jsonl", "evaluations.jsonl"):
        assert (run / name).read_text() == f"content of {name}"
    with Writer(run, keep=2, keep_best=FIGURE, copy_to=copy) as writer:
        writer.save(make(4, {FIGURE: 0.1}))
    assert checkpoints.steps(run) == [4, 3, 1]
    assert checkpoints.steps_in(path_of(copy)) == [4, 3, 1]


def test_a_copy_s_records_tell_of_all_steps_of_its_checkpoints(run, copy, monkeypatch):
    """Also where the copy ends before the checkpoint is whole there: the records go first."""
    run.mkdir()
    with Writer(run, copy_to=copy) as writer:
        for step in (1, 2):
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
            writer.save(make(step))
    assert (path_of(copy) / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"st')  # while it is written to
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_copy.Copier, "_copy_step", lambda self, step: fail(step))
        with Writer(run, copy_to=copy) as writer:
            writer.save(make(3))
    shutil.rmtree(run)
    assert fetch_copy(run, copy) == 2
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st'
    assert not list(run.glob("*.now"))


def test_a_copy_keeps_its_newest_where_the_run_has_fewer(run, tmp_path):
    """On a new machine only one has come back; the others in the copy are still worth falling back to."""
    target = tmp_path / "copy"
    with Writer(run, keep=3, copy_to=str(target)) as writer:
        for step in (1, 2, 3):
            writer.save(make(step))
    shutil.rmtree(run)
    fetch_copy(run, str(target))
    with Writer(run, keep=3, copy_to=str(target)) as writer:
        writer.save(make(4))
    assert checkpoints.steps(run) == [4, 3]
    assert checkpoints.steps_in(target) == [4, 3, 2]


def test_an_empty_copy_brings_nothing(run, copy):
    assert fetch_copy(run, copy) is None
    assert not run.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "CHECKSUMS.json"])
@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_copy_falls_back_to_the_one_before(run, tmp_path, caplog, name, damage):
    with Writer(run, copy_to=str(tmp_path / "copy")) as writer:
        for step in (1, 2):
            writer.save(make(step))
    shutil.rmtree(run)
    path = tmp_path / "copy" / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage == "flip":
        path.write_bytes(data)
    assert fetch_copy(run, str(tmp_path / "copy")) == 1
    assert checkpoints.load_newest(run).step == 1
    assert checkpoints.steps(run) == [1]
    if not (name == "CHECKSUMS.json" and damage == "missing"):
        assert "step-00000002" in caplog.text


def test_a_copy_of_which_nothing_is_whole_is_an_error(run, tmp_path):
    with Writer(run, copy_to=str(tmp_path / "copy")) as writer:
        writer.save(make(1))
    shutil.rmtree(run)
    (tmp_path / "copy" / "step-00000001" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of 1 copied checkpoints"):
        fetch_copy(run, str(tmp_path / "copy"))


def test_a_copy_writes_nothing_outside_the_checkpoint(run, tmp_path):
    """A name in CHECKSUMS.json comes from whoever can write to the bucket."""
    with Writer(run, copy_to=str(tmp_path / "copy")) as writer:
        writer.save(make(1))
    shutil.rmtree(run)
    listed = tmp_path / "copy" / "step-00000001" / "CHECKSUMS.json"
    (tmp_path / "copy" / "evil").write_text("evil")
    listed.write_text(
        json.dumps({**json.loads(listed.read_text()), "../evil": checkpoints.sha256(tmp_path / "copy/evil")})
    )
    with pytest.raises(CheckpointError, match="none of 1"):
        fetch_copy(run, str(tmp_path / "copy"))
    assert not list(tmp_path.glob("run/**/evil"))


def test_a_copy_that_fails_is_warned_of_and_made_up_for(run, tmp_path, caplog):
    """The run goes on; once there is room, what was missed is copied too."""
    target = tmp_path / "copy"
    target.write_text("a file where a folder should be")
    with Writer(run, keep=3, copy_to=str(target)) as writer:
        for step in (1, 2):
            writer.save(make(step))
        writer.wait()
        writer._copier.close()
        assert checkpoints.steps(run) == [2, 1]
        assert f"{target}: step 2 could not be copied" in caplog.text
        target.unlink()
        writer.save(make(3))
    assert checkpoints.steps_in(target) == [3, 2, 1]


def test_a_server_that_fails_is_tried_again(run, bucket, monkeypatch):
    monkeypatch.setattr(locations, "WAIT_S", 0.001)
    import s3fs

    put, failures = s3fs.S3FileSystem._put_file, [OSError("reset"), OSError("reset")]

    async def put_file(self, *arguments, **options):
        if failures:
            raise failures.pop()
        return await put(self, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", put_file)
    s3fs.S3FileSystem.clear_instance_cache()
    with Writer(run, copy_to=f"{bucket}/copy") as writer:
        writer.save(make(1))
    assert not failures
    assert checkpoints.steps_in(path_of(f"{bucket}/copy")) == [1]


def test_a_slow_copy_holds_up_no_save_and_keeps_what_it_reads(run, tmp_path, monkeypatch):
    gate, begun, put = threading.Event(), threading.Event(), checkpoint_copy._put

    def slow(source, target):
        begun.set()
        assert gate.wait(20)
        put(source, target)

    monkeypatch.setattr(checkpoint_copy, "_put", slow)
    with Writer(run, keep=2, copy_to=str(tmp_path / "copy")) as writer:
        writer.save(make(1))
        assert begun.wait(20)
        for step in (2, 3, 4, 5):
            writer.save(make(step))
        writer.wait()
        assert checkpoints.steps(run) == [5, 4, 1]
        gate.set()
    assert checkpoints.steps(run) == [5, 4]


def test_what_the_end_does_not_wait_for_is_copied_when_the_run_goes_on(run, tmp_path, monkeypatch, caplog):
    gate, put = threading.Event(), checkpoint_copy._put

    def slow(source, target):
        assert gate.wait(20)
        put(source, target)

    monkeypatch.setattr(checkpoint_copy, "_put", slow)
    with Writer(run, copy_to=str(tmp_path / "copy")) as writer:
        writer.save(make(1))
        writer.patience_s = 0.01
    assert "is not copied after 0.01 s" in caplog.text
    monkeypatch.setattr(checkpoint_copy, "_put", put)
    with Writer(run, copy_to=str(tmp_path / "again")) as writer:
        writer.resumed(1)
    assert checkpoints.steps_in(tmp_path / "again") == [1]
    gate.set()


def test_a_checkpoint_of_another_run_in_the_copy_is_replaced(run, tmp_path):
    target = tmp_path / "copy"
    with Writer(tmp_path / "other", copy_to=str(target)) as writer:
        writer.save(make(1, {FIGURE: 0.4}))
    with Writer(run, copy_to=str(target)) as writer:
        writer.save(make(1, {FIGURE: 0.5}))
    assert (target / "step-00000001" / "state.json").read_text() == (
        run / "checkpoints" / "step-00000001" / "state.json"
    ).read_text()


def test_a_copy_goes_where_something_can_be_written(run):
    with pytest.raises(DataError, match=r"copy_to=https://.*s3://"):
        Writer(run, copy_to="https://example.org/copy")

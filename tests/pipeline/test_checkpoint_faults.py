"""Checkpoints of processes that die at any moment, and on disks that fill up."""

from __future__ import annotations

import functools
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint_copy import fetch_copy
from pipeline.checkpoint_writer import Writer
from pipeline.failure import TrainingError
from tests.pipeline.test_checkpoint import assert_same, make, save
from tests.processes import CONTEXT

FIGURE = "coco/recall@1"
VALUES = {1: 0.5, 2: 0.4, 3: 0.9, 4: 0.1}
# Each changes a folder; `open` also stands for what has been written since the call before.
REMOVALS = ("os.remove", "os.rmdir")
CALLS = ("open", "os.mkdir", "os.rename", *REMOVALS)


@functools.cache
def checkpoint(step):
    return make(step, {FIGURE: VALUES[step]}, size=1000)


def inodes(*roots: Path) -> set[int]:
    return {path.stat().st_ino for root in roots for path in root.rglob("*") if path.is_file()}


def save_and_die(run: Path, copy: str, call: int) -> None:
    """Save step 3 in a process that is killed before its call number `call` that reads or changes these folders.

    What was written and not synced by then is cut in half, as a power cut may leave it.
    """
    roots = (run, Path(copy)) if copy else (run,)
    on_disk, calls = inodes(*roots), iter(range(1, call + 1))
    dying = threading.Lock()

    def count() -> None:
        if next(calls, call) < call or not dying.acquire(blocking=False):
            return
        for root in roots:
            for path in root.rglob("*"):
                if path.is_file() and path.stat().st_ino not in on_disk:
                    os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def synced(descriptor: int) -> None:
        count()
        on_disk.add(os.fstat(descriptor).st_ino)

    def watch(event: str, arguments: tuple) -> None:
        if event not in CALLS or dying.locked():
            return
        path = str(arguments[0])
        # A tree is removed by names relative to its folders.
        if path.startswith(tuple(map(str, roots))) or (event in REMOVALS and not path.startswith("/")):
            count()

    os.fsync = synced
    sys.addaudithook(watch)
    with Writer(run, keep=2, keep_best=FIGURE, copy_to=copy) as writer:
        writer.save(checkpoint(3))
    os._exit(0)


def die_at_every_call(before: Path, copy_before: Path | None, cases: Path) -> None:
    """Make cases/1, cases/2 …, each with `run` and `copy` as a process that died at that call left them."""
    checkpoint(3)  # imports what the processes below need
    for call in itertools.count(1):
        run, copy = cases / f"{call}" / "run", cases / f"{call}" / "copy"
        shutil.copytree(before, run)
        if copy_before:
            shutil.copytree(copy_before, copy)
        process = os.fork()
        if process == 0:
            save_and_die(run, str(copy) if copy_before else "", call)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return


@pytest.mark.parametrize("copied", [False, True])
def test_killed_at_any_call_a_whole_checkpoint_is_left(tmp_path, monkeypatch, copied):
    """Also of the pointers, of the copy, and of the run that then goes on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut here
    before, copy_before = tmp_path / "before", tmp_path / "copy_before"
    with Writer(before, keep=2, keep_best=FIGURE, copy_to=str(copy_before) if copied else "") as writer:
        for step in (1, 2):
            writer.save(checkpoint(step))
    cases = tmp_path / "cases"
    process = CONTEXT.Process(target=die_at_every_call, args=(before, copy_before if copied else None, cases))
    process.start()
    process.join(60)
    assert process.exitcode == 0

    seen = set()
    for case in cases.iterdir():
        run, copy = case / "run", str(case / "copy") if copied else ""
        root = run / "checkpoints"
        found = checkpoints.load_newest(run)
        assert_same(checkpoint(found.step), found)
        seen.add(found.step)
        for step in checkpoints.steps(run):
            checkpoints.verify(root / checkpoints.folder_name(step))
        for pointer in ("LATEST", "BEST"):
            named = int((root / pointer).read_text().removeprefix("step-"))
            assert_same(checkpoint(named), checkpoints.load(run, named))
        if copied:
            brought = fetch_copy(case / "fetched", copy)
            assert_same(checkpoint(brought), checkpoints.load_newest(case / "fetched"))

        # The run goes on from what it found.
        with Writer(run, keep=2, keep_best=FIGURE, copy_to=copy) as writer:
            for step in range(found.step + 1, 5):
                writer.save(checkpoint(step))
        assert sorted(path.name for path in root.iterdir()) == ["BEST", "LATEST", "step-00000003", "step-00000004"]
        assert (root / "BEST").read_text() == "step-00000003"
        if copied:
            assert checkpoints.steps_in(case / "copy")[:2] == [4, 3]  # and what was being copied when it was purged
    assert seen == {2, 3}
    assert len(list(cases.iterdir())) > 25  # it has died in so many places


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_former_checkpoint(small_disk):
    """Wherever it is full, nothing half-written is visible; where room is made, the same save goes through."""
    run, ballast, saved = small_disk / "run", small_disk / "ballast", 0
    save(run, make(1, size=10_000), keep=2)  # 400 kB
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    for room in range(0, 512, 16):
        ballast.write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(max(0, free - room * 1024)))
        writer = Writer(run)
        writer.save(make(2, size=10_000))
        failure = writer._writing.exception()
        if failure:
            assert isinstance(failure, TrainingError)
            assert "No space left on device" in str(failure)
            assert sorted(path.relative_to(run) for path in run.rglob("*") if path.suffix != ".tmp") == before
        else:
            saved += 1
            checkpoints.remove(run / "checkpoints" / "step-00000002")
            (run / "checkpoints" / "LATEST").write_text("step-00000001")
        assert checkpoints.load_newest(run).step == 1
        assert (run / "checkpoints" / "LATEST").read_text() == "step-00000001"
    assert 0 < saved < 16


def save_under_a_limit(run: Path, limit: int) -> None:
    """As on a full disk: writing beyond `limit` bytes of a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with Writer(run) as writer:
            writer.save(make(2, size=10_000))
    except TrainingError as error:
        os._exit(3 if "File too large" in str(error) and "step 1" in str(error) else 1)
    os._exit(0)


@pytest.mark.parametrize("limit", [0, 100, 40_000, 100_000])
def test_a_file_that_cannot_be_written_leaves_the_former_checkpoint(tmp_path, limit):
    save(tmp_path, make(1), keep=2)
    process = CONTEXT.Process(target=save_under_a_limit, args=(tmp_path, limit))
    process.start()
    process.join(60)
    assert process.exitcode == 3
    assert checkpoints.load_newest(tmp_path).step == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000001"]

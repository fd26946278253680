"""A second copy of a run's checkpoints, on another disk or behind an address, and how it comes back.

COPY/step-00001000/…  LATEST  BEST             as in RUN/checkpoints
COPY/config.yaml  environment.json  tokenizer/  text_tower/
                                               without which a checkpoint is no run
COPY/metrics.jsonl  evaluations.jsonl  quarantine.jsonl
                                               up to the newest step or beyond; cut back to it when a run goes on
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from data_prep.locations import (
    appearing,
    fs_of,
    is_local,
    path_of,
    read_blocks,
    read_bytes,
    remove_tree,
    retried,
    size_of,
)
from data_prep.record import DataError
from pipeline import checkpoint as checkpoints
from pipeline.checkpoint import (
    BEST,
    CHECKSUMS,
    FOLDERS,
    KEEP_AT_LEAST,
    LATEST,
    STATE,
    CheckpointError,
    folder_name,
)
from pipeline.tracking import BY_STEP

RUN_FILES = ("config.yaml", "environment.json", "tokenizer/*", "text_tower/*")
SCHEMES = ("s3://", "gs://")
# Bytes that are read at a time.
BLOCK = 64 << 20
# How long the end of a run waits for a copy, which may be of many GB, or to a server that does not answer; and how long
# where a stop was asked for, after which a scheduler kills within half a minute.
PATIENCE_S, STOP_PATIENCE_S = 600, 10

log = logging.getLogger(__name__)


class Copier:
    """Copies checkpoints in a thread of its own: a slow network holds up no save.

    Args:
        run: the run folder.
        address: folder, or s3:// or gs:// address, of this run alone.
        keep: that many of the newest stay there, and all that stay here.

    Attributes:
        copying: the step that is being read, which must not be removed; None for none.

    Raises:
        DataError: nothing can be written to such an address.
    """

    def __init__(self, run: Path, address: str, keep: int) -> None:
        self._run, self._root, self._keep = run, _root(address), max(keep, KEEP_AT_LEAST)
        self._lock = threading.Lock()
        self._job: tuple[list[int], int | None] | None = None
        self._thread: threading.Thread | None = None
        self._described = False
        self.copying: int | None = None

    def copy(self, steps: list[int], best: int | None) -> None:
        """Bring the copy up to these checkpoints, newest first, in the background.

        A call takes the place of one that has not begun. A failure is warned of; the next call makes up for it.
        """
        with self._lock:
            self._job = (steps, best)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint copy", daemon=True)
                self._thread.start()

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Wait for what was begun, so many seconds at the most."""
        if thread := self._thread:
            thread.join(patience_s)
            if thread.is_alive():
                log.warning(
                    "%s: the newest checkpoint is not copied after %g s; left so until the run goes on.",
                    *(self._root, patience_s),
                )

    def _work(self) -> None:
        while True:
            with self._lock:
                job, self._job = self._job, None
                if job is None:
                    self._thread = None
                    return
            try:
                self._copy(*job)
            except Exception as error:  # every file system has its own
                why = error.__cause__ if isinstance(error, DataError) and error.__cause__ else error
                what = f"{type(why).__name__}: {why}"
                log.warning(
                    "%s: step %d could not be copied (%s). The next copy makes up.", self._root, job[0][0], what
                )
                log.debug("copy", exc_info=True)
            finally:
                self.copying = None

    def _copy(self, steps: list[int], best: int | None) -> None:
        if not self._described:
            for pattern in RUN_FILES:
                for path in sorted(self._run.glob(pattern)):
                    _put(path, self._root / path.relative_to(self._run).as_posix())
            self._described = True
        for name in BY_STEP:  # before the checkpoint: where that is whole, they tell of all of its steps
            with contextlib.suppress(FileNotFoundError):
                _put_as_it_is(self._run / name, self._root / name)
        for step in steps:
            self.copying = step
            if step in checkpoints.steps(self._run):  # else it was removed since
                self._copy_step(step)
            if step == steps[0]:
                _put_text(folder_name(step), self._root / LATEST)
        self.copying = None
        if best is not None:
            _put_text(folder_name(best), self._root / BEST)
        self._purge(steps)

    def _copy_step(self, step: int) -> None:
        source, target = self._run / "checkpoints" / folder_name(step), self._root / folder_name(step)
        checksums = (source / CHECKSUMS).read_bytes()
        with contextlib.suppress(FileNotFoundError):
            if read_bytes(target / CHECKSUMS) == checksums:
                return
            _remove(target)  # of another run, or of this one before it was set back
        for name in checkpoints.read_checksums(checksums, source):
            _put(source / name, target / name)
        _put(source / CHECKSUMS, target / CHECKSUMS)

    def _purge(self, here: list[int]) -> None:
        there = _steps_in(self._root)
        stay = {*here, *there[: self._keep]}
        for folder in _glob(self._root, FOLDERS):
            if int(folder.name.removeprefix("step-")) not in stay:  # old, or never finished
                _remove(folder)


def fetch_copy(run: Path, copy_to: str) -> int | None:
    """Where a run has no checkpoint and its copy has one, bring the newest whole one here, and the best.

    The recipe, environment, tokenizer and records that belong to it come along, and replace those of the run.

    Args:
        run: the run folder.
        copy_to: the copy's folder or address.

    Returns:
        The step of the newest, None where nothing was brought.

    Raises:
        CheckpointError: the copy has checkpoints and none is whole.
        DataError: the copy cannot be reached. (Starting anew would leave it behind.)
        OSError: it cannot be written here.
    """
    if checkpoints.steps(run):
        return None
    root = _root(copy_to)
    candidates = _steps_in(root)
    for step in candidates:
        try:
            log.info("%s: bringing step %d from %s.", run, step, root)
            _bring(root, run, step)
        except CheckpointError as error:
            log.warning("%s Trying the one before.", error)
            continue
        _bring_best(root, run, step)
        checkpoints.write_atomically(run / "checkpoints" / LATEST, folder_name(step))
        return step
    if candidates:
        raise CheckpointError(f"{root}: none of {len(candidates)} copied checkpoints is intact.")
    return None


def fetch_description(copy_to: str, folder: Path) -> None:
    """Bring all of a copy but its tensors: what its run was begun with, and how far it got.

    Raises:
        DataError: the copy cannot be reached.
    """
    root = _root(copy_to)
    for pattern in RUN_FILES:
        for path in _glob(root, pattern):
            _fetch(path, folder / Path(pattern).with_name(path.name))
    for name in map(folder_name, _steps_in(root)):
        with contextlib.suppress(FileNotFoundError):
            for file in (STATE, CHECKSUMS):
                _fetch(root / name / file, folder / "checkpoints" / name / file)


def _bring(root: Path, run: Path, step: int) -> None:
    """Copy one checkpoint here, verified as it comes, its checksums last."""
    source = root / folder_name(step)
    try:
        checksums = read_bytes(source / CHECKSUMS)
        listed = checkpoints.read_checksums(checksums, source)
        folder = checkpoints.new_folder(run, step)
        for name, expected in listed.items():
            if _fetch(source / name, folder / name) != expected:
                raise CheckpointError(f"{source / name}: its sha256 is not the one in {CHECKSUMS}.")
        for pattern in (*RUN_FILES, *BY_STEP):
            for path in _glob(root, pattern):
                _fetch(path, run / Path(pattern).with_name(path.name))
    except FileNotFoundError as error:
        raise CheckpointError(f"{source}: a file of it is missing ({error}).") from error
    checkpoints.write_atomically(folder / CHECKSUMS, checksums.decode())


def _bring_best(root: Path, run: Path, newest: int) -> None:
    try:
        name = read_bytes(root / BEST).decode()
        best = next((step for step in _steps_in(root) if folder_name(step) == name), newest)
        if best != newest:
            _bring(root, run, best)
        checkpoints.write_atomically(run / "checkpoints" / BEST, folder_name(best))
    except FileNotFoundError:
        pass  # no figure was asked for
    except CheckpointError as error:
        log.warning("%s The run goes on without its best checkpoint.", error)


def _root(address: str) -> Path:
    if "://" in address and not address.startswith(SCHEMES):
        raise DataError(f"checkpoint.copy_to={address}: copies go to {' or '.join(SCHEMES)} addresses, or to a folder.")
    return path_of(address)


def _steps_in(root: Path) -> list[int]:
    if not is_local(root):
        fs_of(root).invalidate_cache()
    return retried(root, lambda: checkpoints.steps_in(root))


def _glob(root: Path, pattern: str) -> list[Path]:
    return retried(root, lambda: sorted(root.glob(pattern)))


def _put(source: Path, target: Path) -> None:
    """Copy a file of this machine's, which appears whole or not at all."""
    if is_local(target):
        with source.open("rb") as content, appearing(target) as file:
            shutil.copyfileobj(content, file, BLOCK)
    else:
        retried(target, lambda: fs_of(target).put_file(str(source), str(target)))


def _put_as_it_is(source: Path, target: Path) -> None:
    """Copy a file that others add to meanwhile: an upload may not take it if its size changes."""
    now = source.with_name(source.name + ".now")
    try:
        shutil.copyfile(source, now)
        _put(now, target)
    finally:
        now.unlink(missing_ok=True)


def _put_text(text: str, target: Path) -> None:
    if is_local(target):
        with appearing(target) as file:
            file.write(text.encode())
    else:
        retried(target, lambda: fs_of(target).pipe_file(str(target), text.encode()))


def _fetch(source: Path, target: Path) -> str:
    """Copy a file here; the sha256 of what came."""
    found = hashlib.sha256()
    with appearing(target) as file:
        for block in _blocks(source):
            found.update(block)
            file.write(block)
    return found.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    if is_local(path):
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    else:
        yield from read_blocks(path, size_of(path) or 0, BLOCK)


def _remove(folder: Path) -> None:
    """Remove a copied checkpoint, its checksums first."""
    with contextlib.suppress(FileNotFoundError):
        (folder / CHECKSUMS).unlink()
    remove_tree(folder)

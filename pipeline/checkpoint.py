"""Checkpoints that are either whole or not there: written in full, hashed last, verified when loaded.

RUN/checkpoints/step-00001000/ model.safetensors  optimizer.pt  ema.safetensors (where weights are averaged)
                               state.json  CHECKSUMS.json (last)
RUN/checkpoints/LATEST         the newest whole one
RUN/checkpoints/BEST           the one with the best value of a figure, where one was asked for
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.record import DataError

MODEL, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"
SHARDS = "shard-"
CHECKSUMS, LATEST, BEST = "CHECKSUMS.json", "LATEST", "BEST"
FOLDERS = "step-" + 8 * "[0-9]"
KEEP_AT_LEAST = 2

# What json, safetensors and torch raise for a file that is not theirs; torch.load refuses code with UnpicklingError.
MALFORMED = (ValueError, KeyError, AttributeError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError)

log = logging.getLogger(__name__)


class CheckpointError(DataError):
    """No checkpoint that can be used where one was asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training step leaves behind.

    Attributes:
        step: optimizer steps done.
        model: parameters and buffers by open_clip's names.
        optimizer: torch's optimizer state; empty where only the weights were loaded.
        state: stream state, recipe hash, metrics (name → figure): plain JSON values.
        average: the moving average of `model`; None where there is none, or only the weights were loaded.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    average: dict[str, Tensor] | None = None


def publish(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and point LATEST to it.

    Raises:
        OSError: it cannot be written (a full disk, say); LATEST and the other checkpoints are as they were.
    """
    folder = new_folder(run, checkpoint.step)
    try:
        finish(folder, write(folder, checkpoint))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # what is half written takes room
        raise
    return folder


def new_folder(run: Path, step: int) -> Path:
    """An empty folder for the checkpoint of a step; what a killed run, or a damaged checkpoint, left there is gone."""
    folder = run / "checkpoints" / folder_name(step)
    if folder.exists():
        remove(folder)
    folder.mkdir(parents=True)
    return folder


def write(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Write a checkpoint's files; their names. Without CHECKSUMS.json it is none yet.

    Raises:
        OSError: a file cannot be written.
    """
    state = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1)
    writers: dict[str, Callable[[Path], object]] = {
        MODEL: lambda path: _save_tensors(checkpoint.model, path),
        OPTIMIZER: lambda path: _save_pickled(checkpoint.optimizer, path),
        STATE: lambda path: path.write_text(state, encoding="utf-8"),
    }
    if (average := checkpoint.average) is not None:
        writers[AVERAGE] = lambda path: _save_tensors(average, path)
    for name, write_file in writers.items():
        write_file(folder / name)
    return list(writers)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _save_pickled(value: object, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        # torch closes its archive after a failed write, and reports that the archive is incomplete.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def finish(folder: Path, names: Iterable[str]) -> None:
    """Make the files in a folder a checkpoint, on disk, and point LATEST to it."""
    for name in names:
        sync(folder / name)
    write_atomically(folder / CHECKSUMS, json.dumps({name: sha256(folder / name) for name in names}, indent=1))
    sync(folder.parent)  # the folder's own name, before another file tells of it
    write_atomically(folder.parent / LATEST, folder.name)


def purge(run: Path, keep: int, *, known: dict[int, bool], spare: Collection[int | None] = ()) -> None:
    """Remove old checkpoints, and what killed runs left of some.

    Args:
        run: the run folder.
        keep: that many of the newest stay, at least two. A damaged one does not count, and goes with the old.
        known: step → whether its files are whole; what is found out here is added, so that each is hashed once.
        spare: steps that stay too.

    What cannot be removed is warned of: training goes on without.
    """
    root = run / "checkpoints"
    listed, kept = steps(run), 0
    partial = {path for path in root.glob(FOLDERS) if not (path / CHECKSUMS).exists()}
    old: list[Path] = []
    for step in listed:
        if kept >= max(keep, KEEP_AT_LEAST):
            old += [] if step in spare else [root / folder_name(step)]
        elif is_whole(run, step, known):
            kept += 1
    for folder in (*sorted(partial), *old):
        try:
            remove(folder)
        except OSError as error:
            log.warning("%s: the old checkpoint cannot be removed (%s). Remove it by hand.", folder, error)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its checksums first: what is then left is none, however far the removal gets."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(folder)


def steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints, newest first; their contents are not verified."""
    return steps_in(run / "checkpoints")


def steps_in(root: Path) -> list[int]:
    """As `steps`, of a folder that holds checkpoints, here or behind an address."""
    found = root.glob(f"{FOLDERS}/{CHECKSUMS}")
    return sorted((int(path.parent.name.removeprefix("step-")) for path in found), reverse=True)


def load_newest(run: Path, read: Callable[[Path, int], Checkpoint] | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, with a warning for each newer one that does not; None if there is none.

    Args:
        run: the run folder.
        read: how one is loaded: None for `load`, or `load_state`.

    Raises:
        CheckpointError: there are checkpoints and none verifies. (Starting anew would hide the damage.)
    """
    candidates = steps(run)
    for step in candidates:
        try:
            return (read or load)(run, step)
        except CheckpointError as error:
            log.warning("%s Trying the one before.", error)
    if candidates:
        raise CheckpointError(f"{run / 'checkpoints'}: none of {len(candidates)} checkpoints is intact.")
    return None


def load(run: Path, step: int, *, weights_only: bool = False, average: bool = False) -> Checkpoint:
    """Read one checkpoint after verifying every file of it.

    Args:
        run: the run folder.
        step: the checkpoint's.
        weights_only: leave the optimizer's state out, and the average of the weights.
        average: give that average as `model`.

    Raises:
        CheckpointError: a file is missing, its hash differs, or it does not parse; or there is no average.
    """
    folder = run / "checkpoints" / folder_name(step)
    listed = verify(folder)
    if any(map(is_shard, listed)):
        from pipeline.checkpoint_sharded import join  # loads torch.distributed.checkpoint

        saved = join(folder)
    else:
        saved = _read(folder, step, optimizer=not weights_only, averaged=AVERAGE in listed)
    if average:
        if saved.average is None:
            raise CheckpointError(
                f"{folder}: an average of the weights was asked for and there is none: optim.ema was off in this run. "
                "Take the weights themselves, or train with optim.ema."
            )
        saved = replace(saved, model=saved.average)
    return replace(saved, optimizer={}, average=None) if weights_only else saved


def load_state(run: Path, step: int) -> Checkpoint:
    """As `load`, every file verified, but without tensors."""
    folder = run / "checkpoints" / folder_name(step)
    verify(folder)
    with reading(folder):
        return Checkpoint(step, {}, {}, json.loads((folder / STATE).read_text(encoding="utf-8")))


def _read(folder: Path, step: int, *, optimizer: bool, averaged: bool) -> Checkpoint:
    with reading(folder):
        return Checkpoint(
            step=step,
            model=load_file(folder / MODEL),
            # Only what holds no code is unpickled.
            optimizer=torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True) if optimizer else {},
            state=json.loads((folder / STATE).read_text(encoding="utf-8")),
            average=load_file(folder / AVERAGE) if averaged else None,
        )


def verify(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a checkpoint, by name, once the files have been found to agree with it.

    Raises:
        CheckpointError: one is missing, or its hash differs.
    """
    with reading(folder):
        listed = read_checksums((folder / CHECKSUMS).read_bytes(), folder)
        for name, expected in listed.items():
            if sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name}: its sha256 is not the one in {CHECKSUMS}.")
    return listed


def read_checksums(content: bytes, folder: Path) -> dict[str, str]:
    """What CHECKSUMS.json says: file name → sha256.

    Raises:
        CheckpointError: it is not such a table, lacks a checkpoint's files, or names one that lies elsewhere.
    """
    with reading(folder / CHECKSUMS):
        listed = dict(json.loads(content).items())
    sharded = STATE in listed and any(map(is_shard, listed))
    if not (sharded or listed.keys() >= {MODEL, OPTIMIZER, STATE}) or any(Path(name).name != name for name in listed):
        raise CheckpointError(f"{folder / CHECKSUMS}: does not list the files of a checkpoint; found {sorted(listed)}.")
    return listed


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What cannot be read or parsed meanwhile is a CheckpointError."""
    try:
        yield
    except (*MALFORMED, OSError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({why}).") from error


def is_whole(run: Path, step: int, known: dict[int, bool]) -> bool:
    """Whether a checkpoint's files are whole: as `known` says, or by their hashes, and then added to it."""
    if step not in known:
        try:
            known[step] = bool(verify(run / "checkpoints" / folder_name(step)))
        except CheckpointError as error:
            log.warning("%s It does not count as a checkpoint.", error)
            known[step] = False
    return known[step]


def is_shard(name: str) -> bool:
    """Whether a checkpoint's file is one rank's part of it (see checkpoint_sharded)."""
    return name.startswith(SHARDS)


def folder_name(step: int) -> str:
    """`step-00001000`: sorts by step."""
    return f"step-{step:08d}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by its new text in one move: readers see the old or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints that are either whole or not there: written in full, hashed last, verified when loaded.

RUN/checkpoints/step-00001000/ model.safetensors  optimizer.pt  state.json  CHECKSUMS.json (last)
RUN/checkpoints/LATEST         the newest whole one
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.record import DataError

CHECKSUMS = "CHECKSUMS.json"
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
        state: stream state, recipe hash, metrics: plain JSON values.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, point LATEST to it, then remove all but the newest `keep` (never fewer than two).

    An OSError (a full disk, say) leaves the former checkpoints and LATEST as they were.
    """
    root = run / "checkpoints"
    folder = root / folder_name(checkpoint.step)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    writers: dict[str, Callable[[Path], object]] = {
        "model.safetensors": lambda path: save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.items()}, path
        ),
        "optimizer.pt": lambda path: torch.save(checkpoint.optimizer, path),
        "state.json": lambda path: path.write_text(
            json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1), encoding="utf-8"
        ),
    }
    for name, write in writers.items():
        write(folder / name)
        _sync(folder / name)
    write_atomically(folder / CHECKSUMS, json.dumps({name: _sha256(folder / name) for name in writers}, indent=1))
    write_atomically(root / "LATEST", folder.name)
    for old in steps(run)[max(keep, KEEP_AT_LEAST) :]:
        # Its checksums go first: what is then left of it is no checkpoint, however far the removal gets.
        (root / folder_name(old) / CHECKSUMS).unlink()
        shutil.rmtree(root / folder_name(old))
    return folder


def steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints, newest first; their contents are not verified."""
    found = (run / "checkpoints").glob(f"step-????????/{CHECKSUMS}")
    return sorted((int(path.parent.name.removeprefix("step-")) for path in found), reverse=True)


def load_newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, with a warning for each newer one that does not; None if there is none.

    Raises:
        CheckpointError: there are checkpoints and none verifies. (Starting anew would hide the damage.)
    """
    candidates = steps(run)
    for step in candidates:
        try:
            return load(run, step)
        except CheckpointError as error:
            log.warning("%s Trying the one before.", error)
    if candidates:
        raise CheckpointError(f"{run / 'checkpoints'}: none of {len(candidates)} checkpoints is intact.")
    return None


def load(run: Path, step: int, *, weights_only: bool = False) -> Checkpoint:
    """Read one checkpoint after verifying every file of it; `weights_only` leaves the optimizer's state out.

    Raises:
        CheckpointError: a file is missing, its hash differs, or it does not parse.
    """
    folder = run / "checkpoints" / folder_name(step)
    try:
        listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            if _sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name}: its sha256 is not the one in {CHECKSUMS}.")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        optimizer = {} if weights_only else torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        return Checkpoint(step, load_file(folder / "model.safetensors"), optimizer, state)
    except (*MALFORMED, OSError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({str(error).splitlines()[0]}).") from error


def folder_name(step: int) -> str:
    """`step-00001000`: sorts by step."""
    return f"step-{step:08d}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by its new text in one move: readers see the old or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

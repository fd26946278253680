"""Checkpoints written while training goes on: copied from the trainer's memory at once, published by a thread."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint import BEST, KEEP_AT_LEAST, MALFORMED, STATE, Checkpoint, folder_name
from pipeline.checkpoint_copy import PATIENCE_S, STOP_PATIENCE_S, Copier
from pipeline.failure import TrainingError

# What the names of figures begin with that are not of the weights but of their moving average.
AVERAGED = "ema/"

log = logging.getLogger(__name__)


class Writer:
    """Saves a run's checkpoints in the background. One for a run: on its main rank.

    A save that fails (a full disk, say) leaves LATEST and the former checkpoints as they were, and raises at the next
    `save`, `check` or `wait`, or when the context ends.

    Args:
        run: the run folder.
        keep: that many of the newest whole checkpoints stay, at least two.
        keep_best: the one with the best value of this figure (see lower_is_better) stays too, and BEST names it. It is
            looked for in state["metrics"] and, as SET/METRIC, in RUN/eval/STEP/SET.json, which may come later; as
            ema/SET/METRIC, of the average of the weights, in RUN/eval/STEP-average/SET.json.
        copy_to: folder or address of this run alone that gets a copy of each; empty for none. A copy that fails is
            warned of, and tried again with the next.

    Attributes:
        patience_s: how long the end of the context waits for a copy; after an error STOP_PATIENCE_S at the most.

    Raises:
        DataError: `copy_to` is an address that nothing here writes to.
    """

    def __init__(self, run: Path, *, keep: int = 3, keep_best: str = "", copy_to: str = "") -> None:
        self._run, self._keep, self._keep_best = run, keep, keep_best
        self._copier = Copier(run, copy_to, keep) if copy_to else None
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._whole: dict[int, bool] = {}
        self._best: int | None = None
        self._spared: int | None = None
        self._said = False
        self.patience_s: float = PATIENCE_S

    def resumed(self, step: int) -> None:
        """Bring the copy up to the checkpoint that a run goes on from, in the background: a stop may cut one off."""
        if self._copier:
            self._writing = self._thread.submit(self._guarded, step, lambda: self.published(step))

    def save(self, checkpoint: Checkpoint) -> None:
        """Take a copy of a checkpoint, once the one before is written, and write it in the background.

        The tensors may change as soon as this returns.

        Raises:
            TrainingError: the one before could not be written.
        """
        self.wait()
        taken = self._memory.take(checkpoint)
        self._writing = self._thread.submit(self._guarded, checkpoint.step, lambda: self._write(taken))

    def published(self, step: int) -> None:
        """Point to the best, remove what is old, and begin to copy, now that a step has been published.

        `save` sees to it by itself; who publishes otherwise (checkpoint_sharded) calls this.

        Raises:
            OSError: BEST cannot be written.
        """
        self._whole[step] = True
        self._best = self._point_to_best() if self._keep_best else None
        self._purge()
        if self._copier:
            whole = [step for step in checkpoints.steps(self._run) if self._whole.get(step)]
            newest = whole[: max(self._keep, KEEP_AT_LEAST)]  # what is spared while it is read does not stay
            self._copier.copy([step for step in whole if step in newest or step == self._best], self._best)

    def check(self) -> None:
        """Raise what a save that has ended failed with; nothing is waited for.

        Raises:
            TrainingError: the checkpoint could not be written.
        """
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was given is published. (Its copy may still be on its way.)

        Raises:
            TrainingError: it could not be written.
        """
        try:
            if self._writing:
                self._writing.result()
        except TrainingError:
            self._writing = None  # it is told once
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except TrainingError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # what ended the run is being raised
        finally:
            self._thread.shutdown()
            if self._copier:
                self._copier.close(min(self.patience_s, STOP_PATIENCE_S) if error else self.patience_s)
                if self._spared is not None:
                    self._purge()

    def _write(self, checkpoint: Checkpoint) -> None:
        checkpoints.publish(self._run, checkpoint)
        self.published(checkpoint.step)

    def _guarded(self, step: int, work: Callable[[], None]) -> None:
        run = self._run
        try:
            work()
        except OSError as error:
            left = checkpoints.steps(run)
            raise TrainingError(
                f"{run / 'checkpoints'}: step {step} could not be saved ({type(error).__name__}: {error}). "
                f"Make room or mend the disk; the same command goes on from step {left[0] if left else 0}."
            ) from error

    def _purge(self) -> None:
        self._spared = self._copier.copying if self._copier else None
        checkpoints.purge(self._run, self._keep, known=self._whole, spare={self._best, self._spared})

    def _point_to_best(self) -> int | None:
        """Make BEST name the whole checkpoint with the best figure, and return its step."""
        run, root = self._run, self._run / "checkpoints"
        best = next(
            (step for step in ranked(run, self._keep_best) if checkpoints.is_whole(run, step, self._whole)), None
        )
        if best is not None:
            checkpoints.write_atomically(root / BEST, folder_name(best))
        elif not self._said:
            known = sorted({name for step in checkpoints.steps(run) for name in figures(run, step) if "/" in name})
            self._said = bool(known)
            if known:
                log.warning(
                    "checkpoint.keep_best=%s: no checkpoint has that figure yet; found %s.", self._keep_best, known
                )
        return best


class HostMemory:
    """Copies of tensors in this machine's memory, which is taken once and used again from save to save."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}
        self._former: dict[tuple[Any, ...], Tensor] = {}

    def take(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as it is now, valid until the next call."""
        self._held, self._former = {}, self._held
        taken = Checkpoint(
            step=checkpoint.step,
            model=self._copy(checkpoint.model, ("model",)),
            optimizer=self._copy(checkpoint.optimizer, ("optimizer",)),
            state=json.loads(json.dumps(checkpoint.state)),
            average=None if checkpoint.average is None else self._copy(checkpoint.average, ("average",)),
        )
        self._former = {}
        # Copies from a device are on their way, in the order of its work; one wait for them all.
        if any(tensor.is_pinned() for tensor in self._held.values()):
            torch.cuda.current_stream().synchronize()
        return taken

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), place)
        if isinstance(value, Mapping):
            return {name: self._copy(item, (*place, name)) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, (*place, number)) for number, item in enumerate(value))
        return value

    def _copy_tensor(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        # As it lies in memory: an optimizer's state must lie as its parameter does, or fused kernels refuse it.
        cuda = tensor.device.type == "cuda"
        held = self._former.get(place)
        if held is None or (held.shape, held.dtype, held.is_pinned()) != (tensor.shape, tensor.dtype, cuda):
            held = torch.empty_like(tensor, device="cpu", pin_memory=cuda)
        self._held[place] = held
        return held.copy_(tensor, non_blocking=cuda)


def ranked(run: Path, figure: str) -> list[int]:
    """The steps of the complete checkpoints that have a figure, the best first; of equals the newest."""
    sign = -1 if lower_is_better(figure) else 1
    values = {step: figures(run, step).get(figure) for step in checkpoints.steps(run)}
    known = ((sign * value, step) for step, value in values.items() if value is not None)
    return [step for _, step in sorted(known, reverse=True)]


def lower_is_better(figure: str) -> bool:
    """Whether a better model has less of a figure, by the last part of its name: a loss, a rank, a drop, a distance."""
    return ("_" + figure.rpartition("/")[2]).endswith(("_loss", "_rank", "_drop", "_memorised", "_alignment"))


def figures(run: Path, step: int) -> dict[str, float]:
    """What was measured of a checkpoint: the metrics in its state, and SET/METRIC of each RUN/eval/STEP/SET.json.

    Those of the average of the weights, in RUN/eval/STEP-average, are ema/SET/METRIC. What is not a finite number is
    left out.
    """
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, TypeError, *MALFORMED):
        state = json.loads((run / "checkpoints" / folder_name(step) / STATE).read_text(encoding="utf-8"))
        found |= state["metrics"]
    for prefix, folder in (("", folder_name(step)), (AVERAGED, f"{folder_name(step)}-average")):
        for path in sorted((run / "eval" / folder).glob("*.json")):
            with contextlib.suppress(OSError, TypeError, *MALFORMED):
                metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
                found |= {f"{prefix}{path.stem}/{name}": value for name, value in metrics.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)}

"""Follow a run, and measure each of its checkpoints as it appears."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import checkpoint as checkpoints
from pipeline import exchange, ranks
from pipeline.checkpoint import CheckpointError
from pipeline.evaluate.embed import NotFiniteError
from pipeline.evaluate.measures import choose
from pipeline.evaluate.run import evaluate

log = logging.getLogger(__name__)

POLL_S = 10.0
# As the trainer's: what schedulers send before they end a job, and Ctrl-C, which a shell may have taken away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def watch(
    run: Path,
    data: Path,
    *,
    names: Sequence[str] | None = None,
    class_names: str = "",
    templates: str = "",
    answers: Path | None = None,
    transform: str = "exact",
    poll_s: float = POLL_S,
) -> str:
    """Measure a run's checkpoints, the oldest first, until the run is done and all that are left have results.

    A checkpoint is passed over, with a line in the log, where it is removed before it is read, is damaged, or gives
    embeddings that are not finite; and without one where it has results for these sets. A run that failed, or that was
    asked to stop, may go on, so that it is waited for.

    Args:
        run: the run folder; it need not be there yet.
        data: the dataset, names, class_names, templates, answers, transform: as for `evaluate`; results that are there
            count whatever their transform.
        poll_s: seconds between looks at the run folder.

    Returns:
        "done", or "requeue" where SIGTERM, SIGUSR1 or SIGINT asked for a stop: the same command goes on.

    Raises:
        EvaluationError: a set that was asked for is not there, or cannot be measured.
    """
    said: dict[str, Any] = {"class_names": class_names, "templates": templates, "answers": answers}
    names = [source.name for source in choose(data, names, **said)]
    measure = partial(evaluate, str(run), data, names=names, cache=False, transform=transform, **said)
    try:
        with _interrupted_by_signals():
            _follow(run, names, measure, poll_s)
    except KeyboardInterrupt:  # results are written whole, a file a set, so that nothing is lost
        log.info("%s: stopped; the same command goes on.", run)
        return "requeue"
    return "done"


def _follow(run: Path, names: Sequence[str], measure: Callable[..., Any], poll_s: float) -> None:
    passed_over: set[int] = set()
    said = None
    with ranks.inference():
        while True:
            # The main rank looks: others might see a checkpoint that has just appeared.
            status, step = exchange.from_main(partial(_look, run, names, passed_over))
            if step is not None:
                if not _measure(run, measure, step):
                    passed_over.add(step)
            elif status == "done":
                return
            else:
                if status != said:
                    how = f"it ended as {status} and may go on" if status else "it is not done"
                    log.info("%s: %s; waiting for its checkpoints.", run, how)
                said = status
                time.sleep(poll_s)


def _look(run: Path, names: Sequence[str], passed_over: set[int]) -> tuple[str, int | None]:
    """How the run last ended, and its first checkpoint that is to be measured."""
    # Asked before the checkpoints are listed: a run that is done has saved the last of them.
    status = _status(run)
    listed = set(checkpoints.steps(run)) - passed_over
    return status, min((step for step in listed if not _has_results(run, step, names)), default=None)


def _measure(run: Path, measure: Callable[..., Any], step: int) -> bool:
    """Measure one checkpoint; False where it cannot be."""
    log.info("step %d:", step)
    try:
        measure(step=step)
    except CheckpointError as error:
        if step in checkpoints.steps(run):
            log.warning("%s Passed over.", error)
        else:
            log.info("step %d was removed before it was measured; passed over.", step)
        return False
    except NotFiniteError as error:
        log.warning("step %d: %s Passed over.", step, error)
        return False
    return True


def _has_results(run: Path, step: int, names: Sequence[str]) -> bool:
    folder = run / "eval" / checkpoints.folder_name(step)
    return all((folder / f"{name}.json").is_file() for name in names)


def _status(run: Path) -> str:
    """How the run last ended; empty while it goes on, or has not begun."""
    try:
        return str(json.loads((run / "exit.json").read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError):  # not there, or half written
        return ""


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """What asks for a stop raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

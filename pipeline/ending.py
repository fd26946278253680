"""How training is asked to end, and what is said of how it did: exit codes, and RUN/exit.json (contract 4).

Nothing here loads torch at first, so that a request is heard from the command's first moment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from data_prep.locations import UnreachableError, without_credentials
from data_prep.record import DataError
from pipeline.failure import DONE, FAILED, REQUEUE, USER_MUST_ACT, FailedError, LostRanksError

# How long a rank that lost others lets them say why.
VERDICT_S = 2.0
# Values of such variables are never written down.
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
# Shorter ones would be found in ordinary words.
SECRET_LENGTH = 8
ROOT = Path(__file__).parent.parent


class StopRequest:
    """SIGTERM, SIGUSR1 or SIGINT asks for a stop at the next step, however often; a second SIGINT ends at once.

    One that comes before this is made, in the first moments of Python, ends the process as signals do: nothing has
    begun then, and whoever starts a job again after a death by signal loses nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def code_of(error: Exception) -> int:
    """A server that is out for too long is nobody's mistake: the same command may well go on later."""
    if isinstance(error, DataError):
        return FAILED if isinstance(error, UnreachableError) else USER_MUST_ACT
    return error.code if isinstance(error, FailedError) else FAILED


@contextlib.contextmanager
def recorded(run: Path) -> Iterator[None]:
    """Leave RUN/exit.json behind when training fails, since launchers lose exit codes.

    A rank that lost the others waits for what they have to say, and takes on the code of the one that failed.
    """
    if _rank() == 0:
        (run / "exit.json").unlink(missing_ok=True)
    try:
        yield
    except LostRanksError as error:
        time.sleep(VERDICT_S)
        if not _write(run, "requeue", REQUEUE, str(error)):
            # Half written: it says nothing else than this rank would.
            with contextlib.suppress(OSError, ValueError):
                error.code = int(json.loads((run / "exit.json").read_text(encoding="utf-8"))["code"])
        raise
    except DataError as error:
        _write(run, "failed", code_of(error), str(error))
        raise
    except FailedError as error:
        status = "requeue" if error.code == REQUEUE else "failed"
        _write(run, status, error.code, f"{type(error).__name__}: {error}")
        raise
    except BaseException as error:
        _write(run, "failed", FAILED, f"{type(error).__name__}: {error} ({_place(error)})")
        raise


def ended(run: Path, outcome: str) -> int:
    """Record how training ended on all ranks, "done" or "requeue", and return its exit code."""
    code = REQUEUE if outcome == "requeue" else DONE
    if _rank() == 0:
        _write(run, outcome, code, "")
    return code


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a command as one of several ranks, and exit with its code.

    At once, where it failed: on the way out, torch's threads that wait for a rank that is gone would abort the process
    with a code of their own.
    """
    try:
        code = main()
    except BaseException:  # noqa: BLE001 (as Python itself tells of it)
        traceback.print_exc()
        code = FAILED
    if code:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _write(run: Path, status: str, code: int, reason: str) -> bool:
    """Write exit.json, and say whether this rank is the first to: it is the one that is heard."""
    from pipeline.checkpoint import steps

    run.mkdir(parents=True, exist_ok=True)
    newest, host = max(steps(run), default=0), socket.gethostname()
    record = {"status": status, "code": code, "rank": _rank(), "host": host, "step": newest, "reason": _clean(reason)}
    try:
        with (run / "exit.json").open("x", encoding="utf-8") as file:
            json.dump(record, file)
    except FileExistsError:
        return False
    return True


def _place(error: BaseException) -> str:
    """Where an error comes from: the innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT / "pipeline")]
    frame = (ours or frames)[-1]
    path = Path(frame.filename)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{frame.lineno} in {frame.name}"


def _clean(text: str) -> str:
    """A text without the secrets of addresses and of environment variables."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= SECRET_LENGTH:
            text = text.replace(value, f"${name}")
    return str(without_credentials(text))

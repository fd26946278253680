"""Runs a command of which nothing lives on: not after it ends, nor after SIGTERM, nor after whoever started it dies.

Processes that the command starts stay descendants of the keeper, also those that make a session of their own and those
whose parents end; it kills them with SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
# How soon the death of whoever started it is seen.
WATCH_S = 0.2


class Kept:
    """A command under a keeper, started at once.

    Attributes:
        pid: of the keeper, which is in the namespaces that were asked for, in a session of its own.
    """

    def __init__(
        self, command: Sequence[object], log: Path, env: Mapping[str, str], namespaces: Sequence[str] = ()
    ) -> None:
        """`log` is appended to; `namespaces` are options of unshare."""
        words = [sys.executable, __file__, os.getpid(), *command]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [str(word) for word in (["unshare", *namespaces, *words] if namespaces else words)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def running(self) -> bool:
        """Whether the command still runs."""
        return self._process.poll() is None

    def ask(self) -> None:
        """Have all of it killed, without waiting."""
        self._process.terminate()

    def kill(self) -> None:
        """Have all of it killed, and wait for that."""
        self.ask()
        self._process.wait()


def main(starter: int, command: list[str]) -> int:
    """Run a command for a process and return its exit code, 128 + N after signal N."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")
    watched = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.posix_spawnp(command[0], command, os.environ, setsigmask=[])
    code = None
    while code is None and os.getppid() == starter:
        received = signal.sigtimedwait(watched, WATCH_S)
        if received and received.si_signo != signal.SIGCHLD:
            break
        code = _bury(child, os.WNOHANG)
    while children := psutil.Process().children():
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _bury(child, 0)
    return 128 + signal.SIGTERM if code is None else code if code >= 0 else 128 - code


def _bury(child: int, options: int) -> int | None:
    """Wait for who has ended (for one to end, without WNOHANG); the child's exit code if it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, options))[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
            options = os.WNOHANG
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

"""Runs a job on this machine, as one process or several."""

from __future__ import annotations

import json
import signal
import subprocess
from types import FrameType

from launch.job import Job


def run(job: Job) -> int:
    """Run a job to its end and return the trainer's exit code (torchrun would make it 1; exit.json keeps it).

    A stop request (SIGTERM, Ctrl-C) is passed on; the trainer then saves and the code is 75.
    """
    verdict = job.run / "exit.json"
    verdict.unlink(missing_ok=True)
    with subprocess.Popen(job.command(), start_new_session=True) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGTERM)

        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        code = process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if verdict.is_file():
        return int(json.loads(verdict.read_text(encoding="utf-8"))["code"])
    return code

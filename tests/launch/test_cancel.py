"""How jobs on SLURM are taken back, with a stand-in for its commands."""

from __future__ import annotations

import pytest

from launch import slurm
from launch.cluster import SlurmCluster
from launch.slurm import GoneError
from launch.submission import Submission, Submitted

CLUSTER = SlurmCluster(backend="slurm", time="1:00:00", stop_seconds=30)
FOUND = Submission(CLUSTER, (Submitted("train", "7", ("a", "b", "c")), Submitted("export", "8", ("a", "b", "c"))))
SIGNAL = ("scancel", "--batch", "--signal=USR1")


@pytest.fixture
def site(monkeypatch):
    """site([{task: state}, …]) tells that, one after the other, and returns the list of all commands that were run."""

    def start(*told):
        commands, left = [], list(told)

        def states(found):
            now = left.pop(0) if len(left) > 1 else left[0]
            return [{"stage": "train", "id": id_, "state": state} for id_, state in now.items()]

        def ask(*words):
            commands.append(words)
            if words == (*SIGNAL, "7_2"):
                raise GoneError("Invalid job id specified")
            return ""

        monkeypatch.setattr(slurm, "states", states)
        monkeypatch.setattr(slurm, "ask", ask)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        return commands

    return start


def test_what_waits_goes_first_and_whatever_has_begun_is_asked_once_and_waited_for(site):
    running = {"7_0": "RUNNING", "7_1": "PENDING", "7_2": "RUNNING"}  # 7_2 ends before it is asked
    begun = {"7_0": "RUNNING", "7_1": "RUNNING", "7_2": "FAILED"}
    commands = site(running, begun, begun, {"7_0": "FAILED", "7_1": "FAILED"})
    slurm.cancel(FOUND)
    assert commands[0] == ("scancel", "--state=PENDING", "8", "7")
    assert sorted(commands[1:-1]) == [(*SIGNAL, f"7_{task}") for task in range(3)]
    assert commands[-1] == ("scancel", "8", "7")


def test_who_does_not_wait_for_it_has_it_ended_all_the_same(site, monkeypatch):
    """It would requeue itself once it is saved."""

    def interrupt(seconds):
        raise KeyboardInterrupt

    commands = site({"7_0": "RUNNING"})
    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        slurm.cancel(FOUND)
    assert commands[-1] == ("scancel", "8", "7")

"""What `status` and `logs` make of a scheduler's words and of a run's files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import yaml

from launch import follow, slurm, submission
from launch.__main__ import main
from launch.cluster import SlurmCluster
from launch.submission import Submission, Submitted


def write_run(run, *, step=340, age_s=3.0, steps=1200, verdict=None, **train):
    """A run folder: a step a second of 100 pairs, the last so many seconds ago."""
    run.mkdir(parents=True, exist_ok=True)
    train = {"steps": steps, "samples": None, "epochs": None, "batch_size": 100, **train}
    (run / "config.yaml").write_text(yaml.safe_dump({"train": train}))
    (run / "environment.json").write_text(json.dumps({"samples": 1050}))
    lines = [
        json.dumps({"step": at, "samples_seen": 100 * at, "wall_s": 1.0 * at, "loss": 5 - at / 100})
        for at in range(1, step + 1)
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 34']))
    for name in ("metrics.jsonl", "environment.json"):
        os.utime(run / name, (time.time() - age_s, time.time() - age_s))
    if verdict:
        (run / "exit.json").write_text(json.dumps(verdict))


@pytest.fixture
def run(tmp_path):
    return tmp_path / "my run"


@pytest.fixture
def scheduler(run, monkeypatch):
    """Submit to a scheduler that says what its list says, and whose logs are files."""

    def submit(*states, launcher="srun"):
        site = SlurmCluster(backend="slurm", time="1:00:00", launcher=launcher)
        backend = types.SimpleNamespace(states=lambda found: list(states))
        monkeypatch.setattr("launch.__main__._backend", lambda found: backend)
        logs = submission.folder(run) / submission.LOGS
        logs.mkdir(parents=True)
        jobs = [Submitted(one["stage"], one["id"], (one["run"],)) for one in states]
        submission.record(submission.folder(run), Submission(site, tuple(jobs)))
        return logs

    return submit


def state(run, state="RUNNING", stage="train", number="7", **more):
    return {
        "stage": stage,
        "run": str(run),
        "id": number,
        "state": state,
        "restarts": 0,
        "reason": "",
        "nodes": "",
    } | more


def said(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def test_status_says_where_and_how_far_and_for_how_long(run, scheduler, capsys):
    write_run(run)
    waiting = state(run, "PENDING", "evaluate", "8", reason="Dependency")
    scheduler(state(run, nodes="node[1-2]", restarts=1), waiting)
    train, evaluate = said(capsys, "status", run)
    assert train == (
        f"train {run}: RUNNING, nodes node[1-2], restarts 1, step 340/1200, samples/s 100, loss 1.6000, "
        "ETA 0:14:20, last line 3 s ago"
    )
    assert evaluate == f"evaluate {run}: PENDING (Dependency)"


def test_a_run_that_writes_nothing_is_said_to_be_stalled_unless_it_has_just_begun_again(run, scheduler, capsys):
    write_run(run, age_s=700)
    scheduler(state(run))
    (line,) = said(capsys, "status", run)
    assert "RUNNING, stalled" in line
    assert line.endswith("last line 0:11:40 ago (has written nothing for 0:11:40)")
    assert "ETA" not in line
    os.utime(run / "environment.json")
    (line,) = said(capsys, "status", run)
    assert "stalled" not in line


def test_a_run_that_has_waited_for_its_turn_is_not_said_to_be_stalled(run, scheduler, capsys):
    write_run(run, age_s=5000)
    scheduler(state(run, began=time.time() - 60))
    (line,) = said(capsys, "status", run)
    assert "RUNNING, step 340/1200" in line


@pytest.mark.parametrize(
    ("verdict", "age_s", "expected"),
    [
        ({"status": "failed", "code": 1, "rank": 3, "reason": "KeyError"}, 5, "FAILED"),
        ({"status": "done", "code": 0, "rank": 0, "reason": ""}, 5000, "COMPLETED"),
        ({"status": "requeue", "code": 75, "rank": 0, "reason": ""}, 5000, "INTERRUPTED"),
        (None, 5, "RUNNING"),
        (None, 5000, "ended without a word"),
    ],
)
def test_of_a_run_that_no_scheduler_knows_its_files_tell(run, scheduler, capsys, verdict, age_s, expected):
    write_run(run, verdict=verdict, age_s=age_s)
    alone = said(capsys, "status", run)
    assert alone[0].startswith(f"train {run}: {expected}, step 340/1200")
    assert alone[0].endswith("(KeyError)") == (expected == "FAILED")
    scheduler(state(run, ""))  # one that has forgotten it
    assert said(capsys, "status", run) == alone


@pytest.mark.parametrize(
    ("code", "expected"), [(0, "COMPLETED"), (2, "FAILED"), (75, "INTERRUPTED"), (None, "unknown")]
)
def test_of_a_job_that_slurm_has_forgotten_its_script_tells(run, scheduler, capsys, code, expected):
    scheduler(state(run, "", "evaluate", "8"))
    if code is not None:
        (submission.folder(run) / "ended-8").write_text(f"{code}\n")
        submission.keep(submission.folder(run), {})  # a further submission, which was refused
    assert said(capsys, "status", run) == [f"evaluate {run}: {expected}"]


def test_a_failure_of_before_is_not_told_of_a_run_that_goes_on(run, scheduler, capsys):
    write_run(run, verdict={"status": "requeue", "code": 75, "rank": 0, "reason": "rank 0 lost others"})
    scheduler(state(run))
    assert "lost others" not in said(capsys, "status", run)[0]


def test_every_run_of_a_sweep_has_its_line(run, scheduler, capsys):
    write_run(run / "lr=1", step=10)
    scheduler(state(run / "lr=1", number="7_0"), state(run / "lr=2", "PENDING", number="7_1", reason="Resources"))
    first, second = said(capsys, "status", run)
    assert "lr=1: RUNNING, step 10/1200" in first
    assert second == f"train {run / 'lr=2'}: PENDING (Resources)"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["0-3"], ["PENDING"] * 4),
        (["0-3%2"], ["PENDING"] * 4),
        (["2", "1", "0", "3"], ["RUNNING"] * 4),
        (["1,3%1", "2"], ["", "PENDING", "RUNNING", "PENDING"]),  # task 0 has ended, and is forgotten
        (["2", "1,3"], ["", "PENDING", "RUNNING", "PENDING"]),
        (["0", "1,..."], ["RUNNING", "PENDING", "PENDING", "PENDING"]),
        (["2", "1,..."], ["", "PENDING", "RUNNING", "PENDING"]),
        ([], [""] * 4),
    ],
)
def test_each_task_of_an_array_has_the_state_that_slurm_tells_of_it(monkeypatch, lines, expected):
    """A line of scontrol's for each task that has begun, and one for all that wait."""
    told = "".join(
        f"JobId={7 + number} ArrayJobId=7 ArrayTaskId={tasks} JobName=a b JobState="
        f"{'RUNNING' if tasks.isdigit() else 'PENDING'} Reason=None Restarts=0 "
        f"StartTime={'2026-01-31T09:30:00' if tasks.isdigit() else 'Unknown'} NodeList=(null)\n"
        for number, tasks in enumerate(lines)
    )
    monkeypatch.setattr(slurm, "ask", lambda *words: told)
    site = SlurmCluster(backend="slurm", time="1:00:00")
    found = slurm.states(Submission(site, (Submitted("train", "7", ("a", "b", "c", "d")),)))
    assert [one["state"] for one in found] == expected
    assert [one["id"] for one in found] == ["7_0", "7_1", "7_2", "7_3"]
    assert [one["began"] is not None for one in found] == [one == "RUNNING" for one in expected]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"steps": 12}, 12),
        ({"steps": None, "samples": 250}, 3),
        ({"steps": None, "epochs": 2.0}, 21),
        ({"batch_size": None, "steps": None}, None),
    ],
)
def test_the_length_of_a_run_is_as_its_recipe_has_it(run, train, expected):
    write_run(run, **train)
    assert follow.total(run) == expected


def test_a_huge_file_is_read_from_its_end(run, monkeypatch):
    write_run(run, step=5000)
    monkeypatch.setattr(follow, "METRICS_TAIL", 1000)
    lines = follow.metrics(run)
    assert 5 < len(lines) < 20
    assert [line["step"] for line in lines] == list(range(5001 - len(lines), 5001))


def test_on_a_terminal_there_is_a_table(run, scheduler, capsys, monkeypatch):
    write_run(run)
    scheduler(state(run, nodes="node[1-2]"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    table = "\n".join(said(capsys, "status", run))
    assert "340/1200" in table
    assert "node[1-2]" in table
    assert "restarts" not in table  # there were none


@pytest.mark.parametrize("command", ["status", "logs"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, command):
    assert main([command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


LOG = "".join(
    f"{line}\n"
    for line in (
        " 0: step 1",
        "10: step 1",
        " 1: waiting\r 1: waiting still\r",
        " 3: error: the disk is full",
        " 0: error: rank 0 of 11 lost others",
        "13: error: rank 13",
        "ended with 1",
    )
)
FULL = {"status": "failed", "code": 1, "rank": 3, "host": "node2", "reason": "the disk is full"}


def test_logs_are_those_of_the_rank_that_failed_first(run, scheduler, capsys):
    write_run(run, verdict=FULL)
    logs = scheduler(state(run, "FAILED"), state(run, "PENDING", "evaluate", "8"))
    (logs / "train-7.log").write_text(LOG)
    path, head, *lines = said(capsys, "logs", run)
    assert path == f"--- {logs / 'train-7.log'}"
    assert head == f"--- {run}: rank 3 on node2 ended first: the disk is full"
    assert lines == [" 3: error: the disk is full"]


@pytest.mark.parametrize(("verdict", "launcher"), [(None, "srun"), (FULL, "torchrun"), (FULL | {"rank": 5}, "srun")])
def test_otherwise_logs_are_all_there_is(run, scheduler, capsys, verdict, launcher):
    """Where none failed, torchrun mixes the lines of its ranks, or the rank died before it could write a line."""
    write_run(run, verdict=verdict)
    logs = scheduler(state(run), launcher=launcher)
    (logs / "train-7.log").write_text(LOG)
    assert said(capsys, "logs", run, "--lines", "2")[-2:] == ["13: error: rank 13", "ended with 1"]
    assert " 1: waiting still" in said(capsys, "logs", run)


def test_a_log_is_read_from_its_end(run, scheduler, capsys, monkeypatch):
    logs = scheduler(state(run))
    (logs / "train-7.log").write_text("".join(f"line {number}\n" for number in range(10_000)))
    monkeypatch.setattr(follow, "LOG_TAIL", 500)
    assert said(capsys, "logs", run, "--lines", "3")[1:] == ["line 9997", "line 9998", "line 9999"]


SLEEPS = """
import sys, time, pathlib
from launch import local
from launch.__main__ import main
local.command = lambda stage, task: [sys.executable, "-c", "import time, pathlib, sys; "
    f"pathlib.Path({str(task.run)!r}, 'begun').touch(); time.sleep(60) if {task.run.name.endswith('2')} else None"]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "ended"), [(signal.SIGTERM, "FAILED"), (signal.SIGKILL, "KILLED")])
def test_what_runs_here_is_followed_until_it_ends(run, capsys, number, ended):
    words = ["submit", "--run", run, "--recipe", "demo", "--data", "x", "--sweep", "optim.lr=1,2,3"]
    for name in ("optim.lr=1", "optim.lr=2"):
        (run / name).mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", SLEEPS, *map(str, words)])
    while not (run / "optim.lr=2" / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    where = [f"train {run / f'optim.lr={value}'}: " for value in (1, 2, 3)]
    assert said(capsys, "status", run) == [where[0] + "COMPLETED", where[1] + "RUNNING", where[2] + "PENDING"]
    alone = ["submit", "--run", run / "optim.lr=2", "--recipe", "demo", "--data", "x"]
    for other in (words, alone):  # two would write the same run
        assert main([str(word) for word in other]) == 2
        assert "is being worked on" in capsys.readouterr().err
    if number == signal.SIGTERM:
        assert main(["cancel", str(run)]) == 0
    else:
        process.kill()
    process.wait(30)
    lines = said(capsys, "status", run)
    assert lines[0] == where[0] + "COMPLETED"
    assert lines[1].startswith(where[1] + ended)
    assert lines[2] == where[2] + "CANCELLED"

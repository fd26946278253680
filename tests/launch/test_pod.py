"""What a pod runs, with real processes: exit codes, starting again, stopping, meeting again, parts in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.pod import Pod, keep_running

ROOT = Path(__file__).parent.parent.parent

# Does as each of its starts is told: an exit code, or -N for death by signal N; "json:CODE" also leaves exit.json.
STEPS = """
import json, os, pathlib, signal, sys
run = pathlib.Path(sys.argv[1])
steps = sys.argv[2].split()
starts = run / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
step = steps[min(number, len(steps) - 1)]
if step.startswith("json:"):
    step = step[5:]
    (run / "exit.json").unlink(missing_ok=True)
    (run / "exit.json").write_text(json.dumps({"code": int(step)}))
if int(step) < 0:
    os.kill(os.getpid(), -int(step))
sys.exit(int(step))
"""

# Ranks that sum numbers; the one named dies in its first start, when all have met.
RANKS = """
import datetime, json, os, pathlib, signal, sys
import torch, torch.distributed as dist
run, doomed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
rank, world = dist.get_rank(), dist.get_world_size()
def say(code):
    try:
        with (run / "exit.json").open("x") as file:
            json.dump({"code": code}, file)
    except FileExistsError:
        pass
try:
    dist.barrier()
    if rank == 0:
        (run / "exit.json").unlink(missing_ok=True)
    dist.barrier()
    first = not (run / "died").exists()
    dist.barrier()
    if rank == doomed and first:
        (run / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    total = torch.ones(1)
    dist.all_reduce(total)
except RuntimeError:
    say(75)
    os._exit(75)
(run / f"sum-{rank}").write_text(str(int(total)))
if rank == 0:
    say(0)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """program(source) is a module of that source, which `python -m` finds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(source: str) -> str:
        (tmp_path / "told.py").write_text(source)
        return "told"

    return make


def starts(run: Path) -> int:
    return len((run / "starts").read_text())


@pytest.mark.parametrize(
    ("steps", "code", "count"),
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("1", 1, 1),
        ("75 75 0", 0, 3),
        ("-9 -15 0", 0, 3),
        ("75 2", 2, 2),
        ("75", 1, 4),
        ("-9", 1, 4),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_a_program_is_started_again_where_that_helps_and_only_so_often(tmp_path, program, steps, code, count, trains):
    """75 and death by signal: again, at most three times; else the pod ends with the program's own code."""
    pod = Pod(tmp_path, "job", 0, trains=trains, restarts=3)
    assert keep_running(pod, [program(STEPS), str(tmp_path), steps], pause_s=0) == code
    assert starts(tmp_path) == count


def test_what_the_trainer_says_outweighs_what_torchrun_makes_of_it(tmp_path, program):
    """torchrun's code is 1 for all. An exit.json that was there before says nothing of this start."""
    (tmp_path / "exit.json").write_text('{"code": 2}')
    pod = Pod(tmp_path, "job", 0, processes=2, trains=True, restarts=1)
    source = STEPS.replace("run = path", "if os.environ['RANK'] != '0': sys.exit(0)\nrun = path")
    assert keep_running(pod, [program(source), str(tmp_path), "-9 json:2"], pause_s=0) == 2
    assert starts(tmp_path) == 2


def test_a_pod_that_takes_the_place_of_one_that_was_done_does_nothing(tmp_path, program):
    """Where nodes train together, the others have ended and will not come back to meet it; a new job begins anew."""
    pod = Pod(tmp_path, "job", 0, trains=True)
    words = [program(STEPS), str(tmp_path), "0"]
    assert keep_running(pod, words) == 0
    assert keep_running(pod, words) == 0
    assert keep_running(replace(pod, index=1, nodes=2), words) == 0
    assert starts(tmp_path) == 1
    assert keep_running(replace(pod, job="other"), words) == 0
    assert starts(tmp_path) == 2


def test_a_program_that_cannot_be_found_is_for_the_user(tmp_path, program):
    """Python itself says 1 for a module that is not there: nothing is started again."""
    assert keep_running(Pod(tmp_path, "job", 0, restarts=3), ["no_such_module"], pause_s=0) == 1


WAITS = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_request_to_stop_reaches_the_program_and_the_pod_ends_with_75(tmp_path, program, processes):
    """As Kubernetes sends it: SIGTERM to the pod's first process, which is `python -m launch pod`; through torchrun."""
    words = [program(WAITS), str(tmp_path)]
    options = [f"--run={tmp_path}", f"--processes={processes}", "--restarts=5", "--trains", "--"]
    variables = {"JOB_COMPLETION_INDEX": "0", "JOB_UID": "job", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "launch", "pod", *options, *words]
    with subprocess.Popen(command, env={**os.environ, **variables}, cwd=tmp_path) as process:
        wait_for(lambda: (tmp_path / "ready").exists())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_nodes_meet_again_where_a_rank_of_one_was_killed(tmp_path, program):
    """Two pods of two ranks: the other pod's ranks lose it, and all four meet anew, each pod after one restart."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [program(RANKS), str(tmp_path), "3"]
    options = [f"--run={tmp_path}", "--nodes=2", "--processes=2", "--restarts=5", "--trains", "--"]
    variables = {
        **os.environ,
        **{"JOB_UID": "job", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)},
        **{"PET_LOCAL_ADDR": "127.0.0.1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    command = [sys.executable, "-m", "launch", "pod", *options, *words]
    # The first comes last: the other waits for it.
    pods = []
    for index in (1, 0):
        pods.append(subprocess.Popen(command, env={**variables, "JOB_COMPLETION_INDEX": str(index)}, cwd=tmp_path))
        time.sleep(1)
    try:
        assert [pod.wait(90) for pod in pods] == [0, 0]
    finally:
        for pod in pods:
            pod.terminate()
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(4)] == ["4"] * 4
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 0


def test_the_last_step_of_a_dataset_begins_when_all_parts_are_done(tmp_path, program, monkeypatch):
    """It runs in the pod of the first part, without --part."""
    monkeypatch.setattr("launch.pod._sleep", lambda *_: keep_running(replace(pod, index=1), words))
    source = "import pathlib, sys\nwith open(sys.argv[1] + '/order', 'a') as file: print(*sys.argv[2:], file=file)"
    words = [program(source), str(tmp_path), "build"]
    pod = Pod(tmp_path / "data", "job", 0, parts=2)
    assert keep_running(pod, words) == 0
    assert (tmp_path / "order").read_text().splitlines() == ["build --part 0/2", "build --part 1/2", "build"]
    assert not (tmp_path / "data").exists()  # a dataset is refused that holds what its manifest does not list


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)

"""What a job's script does next, whatever its program ends with: run by bash, with stand-ins for SLURM's commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch import slurm, submission
from launch.cluster import SlurmCluster
from launch.job import Job, stages

SCONTROL = """#!/bin/bash
if [ -n "${DOWN-}" ] && [ "$2" != hostnames ] && ! [ -e "$ASKED-$1-$2" ]; then
  touch "$ASKED-$1-$2"  # what asks the controller is answered the second time
  exit 1
fi
case $1,$2 in
  show,hostnames) echo node1 ;;
  show,node) echo "NodeName=node1 NodeAddr=10.0.0.1 Port=1" ;;
  show,job) echo "JobId=7 JobState=${STATE-RUNNING} Reason=None" ;;
  requeue,*) echo "requeue $2" >>"$ASKED" ;;
esac
"""
# The first step looks at the nodes.
SRUN = """#!/bin/bash
[[ $* = *check-node* ]] && exit "${CHECK-0}"
if [ -n "${HANGS-}" ]; then
  trap '' USR1
  kill -USR1 $PPID
  until [ -e "$ASKED" ]; do sleep; done
fi
if [ -n "${STOP-}" ]; then  # SLURM warns the script, which passes it on
  trap 'exit "$STOP"' USR1
  kill -USR1 $PPID
  for _ in {1..200}; do sleep; done
fi
[ -z "${SAID-}" ] || echo "$SAID" >"$RUN/exit.json"
[[ -n "${first-}" && -z "${FAILS-}" && ${CODE-0} -ne 0 ]] && ln -s "$CODE" "$first"  # as tasks do
exit "${CODE-0}"
"""


@pytest.fixture
def script(tmp_path):
    """script(CODE="75", sweep=…) runs a job's script; (its exit code, what was requeued, what it said)."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("sleep", "#!/bin/bash\n/bin/sleep 0.1")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    run, asked = tmp_path / "run", tmp_path / "asked"

    def script(
        what: str = "train", sweep: tuple[str, ...] = (), restarts: int = 0, site: dict | None = None, **variables: str
    ) -> tuple[int, str, str]:
        cluster = SlurmCluster(backend="slurm", time="1:00:00", max_restarts=3, **(site or {}))
        job = Job(run, what, recipe="demo", data="data", processes=2, sweep=sweep)
        (text,) = slurm.render(job, stages(job, 1), cluster).values()
        (run / "launch" / submission.LOGS).mkdir(parents=True, exist_ok=True)
        asked.unlink(missing_ok=True)
        told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "RUN": str(run)}
        told |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        told |= {"PATH": f"{commands}:{os.environ['PATH']}", "ASKED": str(asked), **variables}
        done = subprocess.run(["bash", "-c", text], env=told, capture_output=True, text=True, timeout=30)
        return done.returncode, asked.read_text().strip() if asked.exists() else "", done.stderr

    script.run = run
    return script


@pytest.mark.parametrize(
    ("variables", "code", "requeued"),
    [
        ({"CODE": "0"}, 0, False),
        ({"CODE": "1"}, 1, False),
        ({"CODE": "2"}, 2, False),
        ({"CODE": "75"}, 75, True),
        ({"CODE": "137"}, 137, True),
        ({"CODE": "1", "FAILS": "srun"}, 128, True),
        ({"CODE": "75", "STATE": "CANCELLED"}, 75, False),
        ({"CODE": "137", "STATE": "COMPLETING"}, 137, False),
        ({"CODE": "75", "restarts": 2}, 75, True),
        ({"CODE": "75", "restarts": 3}, 75, False),
        ({"CODE": "0", "restarts": 4}, 1, False),  # SLURM restarts jobs as well
        ({"CHECK": "2"}, 2, False),
        ({"CHECK": "2", "restarts": 1}, 75, True),
        ({"CHECK": "1"}, 1, False),
        ({"CHECK": "255"}, 2, False),  # Apptainer's
        ({"CODE": "75", "DOWN": "yes"}, 75, True),  # slurmctld is being restarted
        ({"CHECK": "1", "restarts": 1}, 75, True),
        ({"CHECK": "233"}, 233, True),
    ],
)
def test_a_stop_and_a_death_start_a_job_again_and_nothing_else_does(script, variables, code, requeued):
    found, asked, _ = script(**variables)
    assert (found, asked) == (code, "requeue 7" if requeued else "")
    assert (script.run / "launch/ended-7").read_text() == f"{code}\n"


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_job_that_is_asked_to_stop_while_its_site_is_set_up_is_requeued(script, signal):
    found, asked, told = script(site={"setup": [f"kill -{signal} $$"]}, CODE="1")
    assert (found, asked) == (75, "requeue 7")
    assert f"asked to stop (SIG{signal})" in told


@pytest.mark.parametrize(("what", "launcher", "ends"), [("train", "srun", 75), ("evaluate", "torchrun", 1)])
def test_a_warning_reaches_the_program_and_what_it_has_ended_begins_again(script, what, launcher, ends):
    """Training saves and says 75; torchrun says 1, whatever has ended its ranks."""
    assert script(what, site={"launcher": launcher}, STOP=str(ends))[:2] == (75, "requeue 7")


def test_ranks_that_hang_do_not_keep_a_job_until_slurm_ends_it(script):
    site = {"stop_seconds": 6}
    found, asked, told = script(site=site, HANGS="yes", CODE="137", STATE="PENDING")
    assert (found, asked) == (137, "requeue 7")
    assert "not saved after 1 s" in told


def test_of_a_sweep_the_task_alone_is_requeued_though_it_bears_the_id_of_all(script):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert script(sweep=("optim.lr=1,2",), CODE="75", **array)[:2] == (75, "requeue 7_1")
    assert [path.name for path in (script.run / "launch").glob("ended-*")] == ["ended-7_1"]


@pytest.mark.parametrize(
    ("said", "code", "requeued"),
    [
        ({"status": "requeue", "code": 75, "rank": 1}, 75, True),
        ({"status": "failed", "code": 2, "rank": 0}, 2, False),
        ({"status": "failed", "code": 1, "rank": 0}, 1, False),
        ({"status": "failed"}, 128, True),  # as of a disk that is full
        (None, 128, True),  # all ranks were killed before they could say a word
    ],
)
def test_with_torchrun_the_ranks_own_word_counts(script, said, code, requeued):
    variables = {"SAID": json.dumps(said)} if said else {}
    script.run.mkdir()
    (script.run / "exit.json").write_text(json.dumps({"status": "done", "code": 0}))  # of before
    found, asked, _ = script(site={"launcher": "torchrun"}, CODE="1", **variables)
    assert (found, asked) == (code, "requeue 7" if requeued else "")


def test_what_was_said_before_is_gone_though_the_nodes_are_refused(script):
    script.run.mkdir()
    (script.run / "exit.json").write_text(json.dumps({"status": "failed", "code": 1}))
    assert script(CHECK="2")[:2] == (2, "")
    assert not (script.run / "exit.json").exists()


def test_the_site_s_lines_may_name_variables_that_are_not_there(script):
    assert script(site={"setup": ["[ -n $NOT_THERE ]"]})[:2] == (0, "")


def test_nodes_wait_for_each_other_as_long_as_the_cluster_file_says(tmp_path):
    cluster = SlurmCluster(backend="slurm", time="1:00:00", meet_seconds=45)
    job = Job(tmp_path, recipe="demo", data="data")
    (text,) = slurm.render(job, stages(job, 1), cluster).values()
    assert " --meet 45\n" in text


def test_a_killed_script_leaves_no_word_of_an_earlier_attempt(script):
    script(CODE="75")
    assert script(site={"setup": ["kill -9 $$"]}, restarts=1)[0] == -9
    assert not (script.run / "launch/ended-7").exists()


def test_an_evaluation_leaves_what_training_said_of_its_end(script):
    script.run.mkdir()
    verdict: Path = script.run / "exit.json"
    verdict.write_text(json.dumps({"status": "done", "code": 0}))
    assert script("evaluate", site={"launcher": "torchrun"}, CODE="1")[:2] == (1, "")
    assert json.loads(verdict.read_text())["status"] == "done"

"""The cluster that tests of SLURM run on does what a real one does, and goes without a trace."""

from __future__ import annotations

from pathlib import Path

from tests.hosts import until
from tests.slurm_cluster import URGENT

# Waits for its end in the background, so that bash runs its traps at once.
SLEEP = "srun sleep 100 & wait $!"


def lines(folder: Path, job: str) -> list[str]:
    return (folder / f"slurm-{job}.out").read_text().splitlines()


def test_tasks_run_on_hosts_of_their_own(slurm_hosts, tmp_path):
    job = slurm_hosts.sbatch("srun sh -c 'echo $(hostname) $(hostname -i)'", "-N2", folder=tmp_path)
    slurm_hosts.wait(job, "COMPLETED")
    addresses = slurm_hosts.machines.addresses
    assert sorted(lines(tmp_path, job)) == [f"{name} {addresses[name]}" for name in ("node1", "node2")]
    assert addresses["node1"] != addresses["node2"]


def test_a_job_runs_again_after_a_node_has_lost_its_power(slurm, tmp_path):
    job = slurm.sbatch(f"hostname; {SLEEP}", "-N2", "--requeue", "--open-mode=append", folder=tmp_path)
    slurm.wait(job, "RUNNING")
    until(lambda: len(lines(tmp_path, job)) > 0, "the job's first line")
    slurm.kill_node("node1")
    slurm.wait(job, "PENDING")
    found = slurm.wait(job, "RUNNING")
    assert found["Restarts"] == "1"
    assert found["BatchHost"] != "node1"


def test_a_preempted_job_hears_usr1_in_its_script_and_waits_its_turn(slurm, tmp_path):
    script = f"trap 'echo heard' USR1; {SLEEP}; scontrol requeue $SLURM_JOB_ID; sleep 10"
    job = slurm.sbatch(
        script, "-N4", "--exclusive", "--requeue", "--signal=B:USR1@20", "--open-mode=append", folder=tmp_path
    )
    slurm.wait(job, "RUNNING")
    other = tmp_path / "other"
    other.mkdir()
    urgent = slurm.sbatch("true", "-N4", "--exclusive", f"--partition={URGENT}", folder=other)
    slurm.wait(urgent, "COMPLETED")
    assert slurm.wait(job, "RUNNING")["Restarts"] == "1"
    assert "heard" in lines(tmp_path, job)

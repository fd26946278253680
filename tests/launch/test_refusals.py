"""What `submit` refuses on a real SLURM cluster, and what a job's nodes refuse before its program starts.

Each within a minute, with what was found and the fix; nothing of it is tried again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import submission

ROOT = Path(__file__).parent.parent.parent
SITE = {"backend": "slurm", "partition": "main", "time": "1:00:00"}
# It takes a minute at the most where nothing else runs; the rest is for machines where much does.
PATIENCE_S = 240


@pytest.fixture
def submit(slurm, tmp_path):
    """submit(words…, key=value of the cluster file…) → what came of it; the recipe and the data are never looked at."""

    def run(*words, **values):
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE | {"shared": [str(tmp_path)]} | values))
        command = [sys.executable, "-m", "launch", "submit", "--cluster", tmp_path / "site.yaml", "--nodes", "2"]
        command += ["--recipe", "demo", "--data", "nowhere", "--run", tmp_path / "runs/a run", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S, env=slurm.env)

    return run


@pytest.fixture
def refused_by_nodes(slurm, submit, tmp_path):
    """Submit a job on node1 and node2, and return its log once it has ended with exit code 2."""

    def run(**values):
        done = submit(sbatch=["--nodelist=node1,node2"], **values)
        assert done.returncode == 0, done.stderr
        (job,) = submission.recorded(tmp_path / "runs/a run").jobs
        found = slurm.wait(job.id, "FAILED", timeout_s=PATIENCE_S)
        assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
        return (tmp_path / f"runs/a run/launch/logs/train-{job.id}.log").read_text()

    return run


@pytest.mark.parametrize(
    ("words", "values", "said"),
    [
        ([], {"partition": "mian"}, ["mian", "`partition` of the cluster file"]),
        (["--nodes", "9"], {}, ["fewer --nodes", "`sinfo -N -l`"]),
        ([], {"partitoin": "main"}, ["partitoin is no key of it; did you mean partition?"]),
        ([], {"shared": ["/nowhere"]}, ["lies on none of the file systems that nodes share (/nowhere)"]),
    ],
    ids=["partition", "nodes", "typo", "shared"],
)
def test_submit_refuses(submit, tmp_path, words, values, said):
    done = submit(*words, **values)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert [one for one in said if one not in done.stderr] == [], done.stderr
    assert not (tmp_path / "runs/a run/launch/submission.json").exists()


def test_a_host_whose_own_name_is_loopback(slurm_hosts, refused_by_nodes):
    slurm_hosts.machines.name_loopback("node2")
    said = refused_by_nodes()
    assert "node node2: this host's own name, node2, stands for 127.0.1.1 here (/etc/hosts line " in said
    assert "`interface: eth0`" in said


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared(slurm_hosts, refused_by_nodes, tmp_path):
    (tmp_path / "runs").mkdir()
    with slurm_hosts.machines.private("node2", tmp_path / "runs"):
        said = refused_by_nodes()
    assert f"node node2: does not see {tmp_path}/runs/a run/launch as the first node does" in said
    assert "`shared:`" in said


@pytest.mark.slow
def test_a_port_in_use(slurm_hosts, refused_by_nodes, tmp_path):
    """The port follows from the job's number, and every number that the job can get is taken."""
    last = int(slurm_hosts.sbatch("true", folder=tmp_path))
    slurm_hosts.wait(str(last), "COMPLETED")
    ports = [10000 + number % 20000 for number in range(last, last + 20)]
    with slurm_hosts.machines.taken("node1", ports):
        said = refused_by_nodes()
    assert "where the ranks would meet, is in use on this first node (by python" in said
    assert "submit again" in said

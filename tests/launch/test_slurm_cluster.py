"""The cluster that tests of SLURM run on does what a real one does, and goes without a trace."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import slurm_cluster
from tests.hosts import refused, until
from tests.slurm_cluster import URGENT, Cluster

# bash runs its traps while it waits for what is in the background.
SLEEP = "srun sleep 100 & wait $!"
# As daemons do: two sessions of their own, one of a process whose parent has ended.
RUNAWAYS = "srun --overlap bash -c 'setsid sleep 100 & (setsid sleep 100 &); echo away; sleep 100'"


@pytest.fixture(params=["hosts", "processes"])
def hosts(request, _slurm_installed) -> bool:
    """Whether nodes are to be hosts: once so, once not."""
    reason = refused() if request.param == "hosts" else ""
    if reason:
        pytest.skip(reason)
    return request.param == "hosts"


def lines(folder: Path, job: str) -> list[str]:
    """What a job has printed."""
    path = folder / f"slurm-{job}.out"
    return path.read_text().splitlines() if path.exists() else []


def processes(folder: Path) -> list[str]:
    """Those that have to do with a cluster in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in f"{process.cmdline()} {process.environ().get('SLURM_CONF')}":
                found.append(str(process))
    return found


def link(cluster: Cluster) -> str:
    return getattr(cluster.machines, "link", "")


class TestHosts:
    def test_tasks_run_on_hosts_of_their_own(self, slurm_hosts, tmp_path):
        job = slurm_hosts.sbatch("srun sh -c 'echo $(hostname) $(hostname -i)'", "-N2", folder=tmp_path)
        slurm_hosts.wait(job, "COMPLETED")
        addresses = slurm_hosts.machines.addresses
        assert sorted(lines(tmp_path, job)) == [f"{name} {addresses[name]}" for name in ("node1", "node2")]
        assert len(set(addresses.values())) == 4

    def test_a_pulled_cable_cuts_a_node_off(self, slurm_hosts):
        connect = ("node1", "bash", "-c", "echo >/dev/tcp/node2/6818")  # where its slurmd listens
        slurm_hosts.on(*connect)
        slurm_hosts.machines.pull("node2")
        assert slurm_hosts.on("node2", "cat", "/sys/class/net/eth0/carrier") == "0\n"
        with pytest.raises(AssertionError, match=r"not ended after 1 s|No route to host"):
            slurm_hosts.on(*connect, timeout_s=1)
        slurm_hosts.machines.plug("node2")
        slurm_hosts.on(*connect)

    def test_a_host_may_know_itself_by_a_loopback_address(self, slurm_hosts):
        slurm_hosts.machines.name_loopback("node2")
        assert slurm_hosts.on("node2", "getent", "hosts", "node2").split() == ["127.0.1.1", "node2"]
        slurm_hosts.machines.mend()
        address = slurm_hosts.machines.addresses["node2"]
        assert slurm_hosts.on("node2", "getent", "hosts", "node2").split() == [address, "node2"]


class TestFaults:
    @pytest.mark.slow
    def test_a_job_runs_again_after_a_node_has_lost_its_power(self, slurm, tmp_path):
        job = slurm.sbatch(SLEEP, "-N2", "--requeue", "--open-mode=append", folder=tmp_path)
        until(lambda: set(slurm.tasks(job)) == {0, 1}, "both tasks")
        slurm.kill_node("node2")
        slurm.wait(job, "PENDING")
        assert slurm.nodes()["node2"] == "down*"
        found = slurm.wait(job, "RUNNING")
        assert (found["Restarts"], found["NodeList"]) == ("1", "node[3-4]")

    def test_a_killed_task_ends_its_step(self, slurm, tmp_path):
        job = slurm.sbatch("srun -n2 --kill-on-bad-exit=1 sleep 100", "-N2", folder=tmp_path)
        until(lambda: 1 in slurm.tasks(job), "rank 1")
        slurm.kill_task(job, 1)
        slurm.wait(job, "FAILED")
        assert "srun: error: node2: task 1: Killed" in lines(tmp_path, job)

    def test_a_node_may_be_reported_down_before_it_is_missed(self, slurm, tmp_path):
        job = slurm.sbatch(SLEEP, "-N2", "--requeue", folder=tmp_path)
        until(lambda: set(slurm.tasks(job)) == {0, 1}, "both tasks")
        slurm.kill_node("node2")
        slurm.report_down("node2")
        assert slurm.nodes()["node2"] == "down"
        assert slurm.wait(job, "PENDING")["Restarts"] == "1"

    @pytest.mark.slow
    def test_a_preempted_job_hears_usr1_in_its_script_and_is_queued_again_after_its_grace(self, new_cluster, tmp_path):
        cluster = new_cluster(nodes=2, grace_s=2)
        script = f"trap 'echo heard' USR1; echo ready; {SLEEP}; wait $!; echo end"
        job = cluster.sbatch(script, "-N2", "--exclusive", "--requeue", "--signal=B:USR1@60", folder=tmp_path)
        until(lambda: lines(tmp_path, job) == ["ready"], "a first line")
        urgent = cluster.sbatch("true", "-N2", "--exclusive", f"--partition={URGENT}", "-o/dev/null", folder=tmp_path)
        until(lambda: lines(tmp_path, job) == ["ready", "heard"], "the signal")
        assert cluster.wait(job, "PENDING")["Restarts"] == "1"
        cluster.wait(urgent, "COMPLETED")


class TestEnd:
    @pytest.fixture
    def place(self, tmp_path_factory) -> Path:
        """With a short name, as paths of sockets must be."""
        return tmp_path_factory.mktemp("end")

    def test_nothing_is_left_of_a_cluster(self, hosts, place):
        with Cluster(place / "slurm", nodes=2, hosts=hosts) as cluster:
            job = cluster.sbatch(RUNAWAYS, "-N2", folder=place)
            until(lambda: lines(place, job) == ["away", "away"], "two lines")
            assert len(processes(place)) > 10
            assert (link(cluster) in psutil.net_if_addrs()) == hosts
        assert processes(place) == []
        assert link(cluster) not in psutil.net_if_addrs()

    def test_nothing_is_left_after_a_killed_test_run(self, hosts, place):
        code = f"""
import pathlib, time
from tests.launch.test_slurm_cluster import Cluster, link
folder = pathlib.Path({str(place)!r})
with Cluster(folder / "slurm", nodes=2, hosts={hosts}) as cluster:
    cluster.sbatch({RUNAWAYS!r}, "-N2", folder=folder)
    print(link(cluster), flush=True)
    time.sleep(100)
"""
        root = Path(__file__).parents[2]
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as run:
            name = run.stdout.readline().strip()
            until(lambda: lines(place, "1") == ["away", "away"], "two lines")
            assert (name in psutil.net_if_addrs()) == hosts
            run.kill()
        until(lambda: processes(place) == [] and name not in psutil.net_if_addrs(), "all to be gone")


def test_clusters_do_not_see_each_other(new_cluster, tmp_path):
    both = [new_cluster(nodes=1), new_cluster(nodes=1, hosts=False)]
    for number, cluster in enumerate(both):
        job = cluster.sbatch(f"srun echo {number}", f"--output={number}", folder=tmp_path)
        assert job == "1"
        cluster.wait(job, "COMPLETED")
        assert (tmp_path / str(number)).read_text() == f"{number}\n"


def test_it_is_told_when_nodes_cannot_be_hosts(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm_cluster, "refused", lambda: "it is Monday")
    with pytest.warns(UserWarning, match="no hosts: it is Monday"):
        Cluster(tmp_path)

"""What the doctor finds: rules on what SLURM tells, and whole runs on a real SLURM cluster with faults built in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import doctor, doctor_slurm
from launch.cluster import SlurmCluster
from launch.doctor_slurm import Machine, enough, judged, network, partition, stopping

ROOT = Path(__file__).parent.parent.parent
SITE = {"backend": "slurm", "partition": "main", "time": "1:00:00", "stop_seconds": 20}
# A fault must be named within a minute; an all-reduce loads torch twice first.
PATIENCE_S, WHOLE_S = 240, 400


def site(**values):
    return SlurmCluster.model_validate(SITE | values)


# --- This machine


@pytest.mark.parametrize(
    ("needed", "wrong"),
    [
        (["numpy>=2.0", "pillow"], ""),
        (["numpy>=2.2"], "numpy 2.1, needed >=2.2"),
        (["wandb>=0.28"], "wandb not installed, needed >=0.28"),
        (['wandb>=0.28; extra == "wandb"'], ""),
    ],
)
def test_packages_are_held_against_what_the_project_needs(needed, wrong):
    (found,) = doctor.packages(needed, {"numpy": "2.1", "pillow": "12.2"}.get)
    assert found.state == ("fail" if wrong else "ok")
    assert wrong in found.found
    assert bool(found.fix) == bool(wrong)


@pytest.mark.parametrize(
    ("listed", "processes", "torch", "state", "said"),
    [
        (None, 2, "2.10", "ok", "nvidia-smi is not installed"),
        ([], 2, "2.10", "ok", "lists none"),
        (["H100"], 1, "2.10+cu129", "ok", "H100"),
        (["H100"], 1, "2.10+cpu", "fail", "built without CUDA"),
        (["H100"], 2, "2.10+cu129", "fail", "1 for 2 ranks"),
    ],
)
def test_gpus(listed, processes, torch, state, said):
    (found,) = doctor.gpus(listed, processes, torch)
    assert (found.state, said in found.found) == (state, True)


def test_the_doctor_of_this_machine():
    code, said = run_doctor(os.environ, "--cluster", "local")
    assert code == 0
    assert {row[0] for row in said} >= {"python", "packages", "GPUs", "cores", "disk"}


# --- What SLURM tells


@pytest.mark.parametrize(
    ("told", "state", "said"),
    [
        ({"State": "UP"}, "ok", "main is UP"),
        ({"State": "UP", "MaxTime": "01:00:00"}, "ok", "MaxTime = 01:00:00"),
        ({"State": "DRAIN"}, "fail", "main is DRAIN"),
        ({"State": "UP", "MaxTime": "00:30:00"}, "fail", "over main's MaxTime = 00:30:00"),
        ({"State": "UP", "MaxTime": "1-00:00:00", "MaxNodes": "1"}, "fail", "1 nodes at the most"),
    ],
)
def test_a_partition_must_take_such_jobs(told, state, said):
    (found,) = partition({"PartitionName": "main", **told}, site(), nodes=2)
    assert (found.state, said in found.found) == (state, True)


def machine(name, state="idle", cores=8, memory_mb=64_000, gpus=4, reason=""):
    return Machine(name, state, cores, memory_mb, gpus, reason)


@pytest.mark.parametrize(
    ("machines", "values", "state", "said"),
    [
        ([machine("a"), machine("b", "allocated")], {"gpus_per_node": 4, "memory_gb": 64}, "ok", "2 of 2"),
        ([machine("a")], {}, "fail", "1; 2 are wanted"),
        ([machine("a"), machine("b", gpus=2)], {"gpus_per_node": 4}, "fail", "1 of 2 have 4 GPUs; a has 4 GPUs"),
        ([machine("a"), machine("b")], {"gpus_per_node": 4, "cpus_per_process": 3}, "fail", "0 of 2 have 12 cores"),
        ([machine("a"), machine("b")], {"memory_gb": 65}, "fail", "0 of 2 have 65 GB"),
        ([machine("a"), machine("b"), machine("c", "drained", reason="disk")], {}, "warning", "c is drained (disk)"),
        ([machine("a", "idle~"), machine("b", "mixed-")], {}, "ok", "2 of 2"),
        ([machine("a"), machine("b", "down*")], {}, "fail", "1 of 2 are up and suit; b is down*; 2 are wanted"),
    ],
)
def test_there_must_be_as_many_nodes_as_a_job_wants(machines, values, state, said):
    (found,) = enough(machines, site(**values), nodes=2)
    assert (found.state, said in found.found) == (state, True), found


def test_nodes_are_read_as_sinfo_writes_them():
    told = (
        "n1|idle|4|1024|gpu:2|none\nn1|idle|4|1024|gpu:2|none\n"
        "n2|mixed-|64|512000|gpu:a100:4(S:0-1),gpu:t4:1,shard:8|none\nn3|down*|4|1024|(null)|Not responding [a|b]\n"
    )
    assert doctor_slurm._machines(told) == [
        Machine("n1", "idle", 4, 1024, 2, ""),
        Machine("n2", "mixed-", 64, 512000, 5, ""),
        Machine("n3", "down*", 4, 1024, 0, "Not responding [a|b]"),
    ]


@pytest.mark.parametrize(
    ("mode", "grace", "state"),
    [
        ("OFF", 0, "ok"),
        ("GANG,SUSPEND", 0, "ok"),
        ("REQUEUE", 0, "warning"),
        ("CANCEL", 9, "warning"),
        ("REQUEUE", 17, "ok"),
    ],
)
def test_saving_must_fit_into_what_preemption_leaves(mode, grace, state):
    """stop_seconds = 20; KillWait is 3."""
    told = {"PreemptMode": mode, "GraceTime": str(grace)}
    assert stopping(told, {"KillWait": "3 sec"}, site()).state == state


def measured(hosts=("a", "b"), backend="nccl", bus=20.0):
    return {
        "ranks": 2,
        "hosts": list(hosts),
        "backend": backend,
        "latency_us": 31.0,
        "sizes": [{"mb": 256.0, "bus_gb_s": bus}],
    }


@pytest.mark.parametrize(
    ("told", "values", "state", "said"),
    [
        (measured(), {"gpus_per_node": 1, "network": "infiniband"}, "ok", "20.00 GB/s"),
        (measured(bus=1.1), {"gpus_per_node": 1, "network": "infiniband"}, "warning", "Ethernet"),
        (measured(bus=1.1), {"gpus_per_node": 1, "network": "ethernet"}, "ok", "1.10 GB/s"),
        (measured(backend="gloo"), {"gpus_per_node": 1}, "fail", "torch sees no GPU"),
        (measured(hosts=["a"]), {}, "fail", "2 nodes were wanted"),
    ],
)
def test_the_network_is_held_against_the_cluster_file(told, values, state, said):
    found = network(told, site(**values), nodes=2)
    assert (found.state, said in found.found) == (state, True)


@pytest.mark.parametrize(
    ("reason", "state"), [("Resources", "warning"), ("Priority", "warning"), ("PartitionNodeLimit", "fail")]
)
def test_a_job_that_does_not_start_says_why(tmp_path, reason, state):
    found = judged({"JobState": "PENDING", "Reason": reason}, tmp_path / "log", site(), nodes=2)
    assert found.state == state
    assert reason in found.found


def test_a_jobs_errors_are_told_once_without_the_tasks_number(tmp_path):
    (tmp_path / "log").write_text("hello\n1: error: this\n0: error: this\nerror: that\nsrun: error: gone\n")
    found = judged({"JobState": "FAILED", "NodeList": "a"}, tmp_path / "log", site(), nodes=2)
    assert (found.state, found.found) == ("fail", "FAILED on a: error: this\nerror: that")


# --- A real site


def run_doctor(environment, *words, wait_s=PATIENCE_S):
    """(exit code, rows of the table); the table is as wide as it needs to be."""
    command = [sys.executable, "-m", "launch", "doctor", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=wait_s, env={**environment, "COLUMNS": "5000"}
    )
    rows: list[list[str]] = []
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and not cells[0] and rows:  # a cell of several lines goes on
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
        elif cells:
            rows.append(cells)
    return done.returncode, rows or [["error", "fail", done.stderr, ""]]


@pytest.fixture
def examine(slurm, tmp_path):
    """examine(words…, key=value of the cluster file…) → exit code, the rows that are not ok, as text."""

    def run(*words, wait_s=PATIENCE_S, on=slurm, **values):
        lines = [f"{key}: {value}" for key, value in (SITE | {"shared": f"[{tmp_path}]"} | values).items()]
        (tmp_path / "site.yaml").write_text("\n".join(lines))
        words = ("--cluster", str(tmp_path / "site.yaml"), "--folder", str(tmp_path / "runs"), *words)
        code, rows = run_doctor(on.env, *words, wait_s=wait_s)
        return code, "\n".join(" | ".join(row) for row in rows if code == 0 or row[1] == "fail")

    return run


def test_two_hosts_sum_numbers(slurm_hosts, examine, tmp_path):
    """Each in a network namespace of its own: they find each other by address alone."""
    code, said = examine(wait_s=WHOLE_S)
    assert code == 0, said
    assert re.search(r"network \| ok \| 2 ranks on node\d, node\d, by gloo, \d+\.\d\d GB/s", said)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_host_whose_own_name_is_loopback(slurm_hosts, examine):
    for name in slurm_hosts.names:
        slurm_hosts.machines.name_loopback(name)
    code, said = examine()
    assert code == 2
    assert re.search(
        r"own name, node\d, stands for 127\.0\.1\.1 here \(/etc/hosts line \d: 127\.0\.1\.1 node\d\)", said
    )
    assert "`interface: eth0`" in said


@pytest.mark.slow
def test_torchrun_may_start_the_ranks(slurm, examine):
    code, said = examine("--nodes", "3", launcher="torchrun", wait_s=WHOLE_S)
    assert code == 0, said
    assert "3 ranks on node1, node2, node3, by gloo" in said


@pytest.mark.slow
def test_several_nodes_on_one_machine_need_no_names(new_cluster, examine):
    code, said = examine(wait_s=WHOLE_S, on=new_cluster(nodes=2, hosts=False))
    assert code == 0, said


@pytest.mark.slow
def test_an_interface_in_the_cluster_file_helps_such_hosts(slurm_hosts, examine):
    for name in slurm_hosts.names:
        slurm_hosts.machines.name_loopback(name)
    code, said = examine(interface="eth0", wait_s=WHOLE_S)
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "values", "said"),
    [
        ((), {"partition": "mian"}, "'mian' is no partition | say `partition: main`"),
        ((), {"partitoin": "main"}, "partitoin is no key of it; did you mean partition?"),
        (("--nodes", "9"), {}, "4; 9 are wanted | --nodes 4 at the most"),
        ((), {"gpus_per_node": 3}, "0 of 4 have 3 GPUs; node1 has 2 GPUs"),
        ((), {"constraint": "nosuch"}, "Invalid feature specification | `constraint`"),
        ((), {"shared": "[/nowhere]"}, "lies on none of the file systems"),
        ((), {"sbatch": "[--begin=now+1hour]"}, "BeginTime"),
        ((), {"python": "/nowhere/python"}, "/nowhere/python"),
        ((), {"gpus_per_node": 1}, "torch sees no GPU there"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_faults_of_a_cluster_file_are_named(slurm, examine, words, values, said):
    waits = "BeginTime" in said
    code, found = examine("--wait", "5", *words, **values, wait_s=WHOLE_S)
    assert code == (0 if waits else 2)
    assert said in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [("node2", "as the first node does"), ("node1", "on a file system that the nodes share with this machine")],
)
def test_a_folder_that_is_not_shared(slurm_hosts, examine, tmp_path, name, said):
    (tmp_path / "runs").mkdir()
    with slurm_hosts.machines.private(name, tmp_path / "runs"):
        code, found = examine(sbatch='["--nodelist=node1,node2"]')
    assert code == 2
    assert said in found


@pytest.mark.slow
def test_a_port_in_use(slurm_hosts, examine, tmp_path):
    """The port follows from the job's number, and every number that the job can get is taken."""
    last = int(slurm_hosts.sbatch("true", folder=tmp_path))
    ports = [10000 + number % 20000 for number in range(last, last + 20)]
    with slurm_hosts.machines.taken("node1", ports):
        code, found = examine(sbatch='["--nodelist=node1,node2"]')
    assert code == 2
    assert re.search(r"node node1: port \d+, where the ranks would meet, is in use .*\(by python", found)

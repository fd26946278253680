"""Checks of a site with SLURM: its settings against the cluster file, and a job that tries nodes and network."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm, submission
from launch.cluster import SlurmCluster
from launch.doctor import Finding, failed
from launch.job import Job, LaunchError, Stage, Task, seconds

COMMANDS = ("sbatch", "srun", "scontrol", "sinfo", "scancel")
STAGE = "doctor"
# A job that is tried: how long it may take once its nodes have met, what SLURM is told, and how long its log may take
# to be seen here.
RUN_S, RUN_TIME, LOG_S = 180, "00:05:00", 10
# With these a job waits for its turn, and nothing is wrong.
WAITS = {"None", "Resources", "Priority", "Reservation", "BeginTime", "Cleaning"}
# Gone, or not for jobs: what sinfo's long states begin with, and the marks it adds. Nodes of clouds that are switched
# off until a job wants them (~), or are being switched on (#), and those that the next job is to have (-) are for jobs.
UNUSABLE = re.compile(r"down|drain|fail|maint|power_down|powering_down|reserved|unk|future|.*[*!%$@^]$")
# Fast Ethernet carries 10 Gb/s. InfiniBand and EFA have carried 50 and more since FDR (2011), so that less says that
# NCCL took the sockets of another network.
FAST_GB_S = 1.25
FAST_NETWORKS = ("infiniband", "efa")


@dataclass(frozen=True)
class Machine:
    """A node as sinfo shows it."""

    name: str
    state: str
    cores: int
    memory_mb: int
    gpus: int
    reason: str


def findings(cluster: SlurmCluster, folder: Path, nodes: int, wait_s: float) -> Iterator[Finding]:
    """What is found, one after the other; nothing is submitted where it could not run."""
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        yield Finding(
            "commands", "fail", f"{', '.join(missing)} not in PATH", "run this on a login node of the cluster"
        )
        return
    try:
        answer = slurm.ask("scontrol", "ping").strip()
        settings = _settings(slurm.ask("scontrol", "show", "config"))
        partitions = [
            slurm.fields(line) for line in slurm.ask("scontrol", "show", "partition", "--oneliner").splitlines()
        ]
    except LaunchError as error:
        yield Finding("controller", "fail", str(error), "`scontrol ping` must say UP: ask the site")
        return
    yield Finding("controller", "ok", f"{answer}; SLURM {settings.get('SLURM_VERSION', '')}")
    for check in (
        _site(cluster, partitions, settings, nodes),
        _refused(cluster, folder, nodes),
        _tried(cluster, folder, nodes, wait_s),
    ):
        found = list(check)
        yield from found
        if any(one.state == "fail" for one in found):
            return


def _site(
    cluster: SlurmCluster, partitions: list[dict[str, str]], settings: dict[str, str], nodes: int
) -> Iterator[Finding]:
    chosen = {one["PartitionName"]: one for one in partitions}
    default = next((name for name, one in chosen.items() if one.get("Default") == "YES"), "")
    name = cluster.partition or default
    if name not in chosen:
        near = difflib.get_close_matches(name, chosen, n=1)
        found = f"{name!r} is no partition" if name else "the site has no default partition"
        fix = f"`partition: {near[0]}`" if near else f"`partition`, one of {', '.join(sorted(chosen))},"
        yield Finding("partition", "fail", found, f"say {fix} in the cluster file")
        return
    yield from partition(chosen[name], cluster, nodes)
    machines = _machines(slurm.ask("sinfo", "--noheader", "-N", "-p", name, "-o", "%N|%T|%c|%m|%G|%E"))
    yield from enough(machines, cluster, nodes)
    yield stopping(chosen[name], settings, cluster)


def partition(told: dict[str, str], cluster: SlurmCluster, nodes: int) -> Iterator[Finding]:
    """Whether a partition takes jobs of that time and size; `told` is what scontrol shows of it."""
    name, limit = told["PartitionName"], told.get("MaxTime", "UNLIMITED")
    if told.get("State") != "UP":
        yield Finding("partition", "fail", f"{name} is {told.get('State')}", "another `partition`, or ask the site")
    elif limit != "UNLIMITED" and seconds(cluster.time) > seconds(limit):
        fix = f"`time: {limit}` in the cluster file, or another partition"
        yield Finding("partition", "fail", f"time: {cluster.time} is over {name}'s MaxTime = {limit}", fix)
    elif (most := told.get("MaxNodes", "UNLIMITED")) != "UNLIMITED" and nodes > int(most):
        yield Finding("partition", "fail", f"{name} gives a job {most} nodes at the most", f"--nodes {most}")
    else:
        yield Finding("partition", "ok", f"{name} is UP, MaxTime = {limit}, MaxNodes = {most}")


def enough(machines: list[Machine], cluster: SlurmCluster, nodes: int) -> Iterator[Finding]:
    """Whether as many nodes are up as a job is to have, with GPUs, cores and memory as the cluster file says."""
    up = [one for one in machines if not UNUSABLE.match(one.state)]
    down = [one for one in machines if UNUSABLE.match(one.state)]
    cores = cluster.cpus_per_process * cluster.processes
    wanted: dict[str, tuple[str, Callable[[Machine], bool]]] = {
        f"{cluster.gpus_per_node} GPUs": ("gpus_per_node", lambda one: one.gpus >= cluster.gpus_per_node),
        f"{cores} cores": ("cpus_per_process", lambda one: one.cores >= cores),
        f"{cluster.memory_gb or 0} GB": ("memory_gb", lambda one: one.memory_mb >= 1000 * (cluster.memory_gb or 0)),
    }
    if nodes > len(machines):
        yield Finding("nodes", "fail", f"{len(machines)}; {nodes} are wanted", f"--nodes {len(machines)} at the most")
        return
    fits = up
    for what, (key, suits) in wanted.items():
        fits = [one for one in fits if suits(one)]
        if len(fits) < min(nodes, len(up)):
            most = max(up, key=lambda one: (one.gpus, one.cores, one.memory_mb))
            has = f"{most.name} has {most.gpus} GPUs, {most.cores} cores, {most.memory_mb / 1000:.0f} GB"
            fix = f"a lower `{key}` in the cluster file, a `constraint`, or another partition"
            yield Finding("nodes", "fail", f"{len(fits)} of {len(up)} have {what}; {has}", fix)
            return
    told = ", ".join(f"{one.name} is {one.state}" + (f" ({one.reason})" if one.reason else "") for one in down[:5])
    found = f"{len(fits)} of {len(machines)} are up and suit" + (f"; {told}" if told else "")
    if len(up) < nodes:
        yield Finding("nodes", "fail", f"{found}; {nodes} are wanted", "wait for them, or ask the site: `sinfo -R`")
    else:
        yield Finding(
            "nodes", "warning" if down else "ok", found, "`sinfo -R`; a job may wait for them" if down else ""
        )


def stopping(told: dict[str, str], settings: dict[str, str], cluster: SlurmCluster) -> Finding:
    """How long a job may save when others need its nodes; `told` is what scontrol shows of the partition.

    Its tasks are sent SIGTERM at once, and killed GraceTime + KillWait later (slurm.conf(5), GraceTime). A time limit
    is announced stop_seconds before, whatever the site says, and --requeue outweighs JobRequeue.
    """
    mode = told.get("PreemptMode", settings.get("PreemptMode", "OFF"))
    grace, wait = (int(one.split()[0]) for one in (told.get("GraceTime", "0"), settings.get("KillWait", "30 sec")))
    found = (
        f"PreemptMode = {mode}, GraceTime = {grace} s, KillWait = {wait} s, JobRequeue = {settings.get('JobRequeue')}, "
        f"SelectType = {settings.get('SelectType')}"
    )
    if {"REQUEUE", "CANCEL"} & set(mode.split(",")) and grace + wait < cluster.stop_seconds:
        fix = (
            f"saving must take less than {grace + wait} s, not stop_seconds = {cluster.stop_seconds}; else only "
            "checkpoint.every_minutes bounds what is lost. The site can raise GraceTime"
        )
        return Finding("preemption", "warning", found, fix)
    return Finding("preemption", "ok", found)


def _refused(cluster: SlurmCluster, folder: Path, nodes: int) -> Iterator[Finding]:
    """Whether sbatch would take a job with the options of the cluster file: account, QoS, constraint, and so on."""
    job, stage = _job(folder, cluster, nodes)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.sbatch"
        try:
            path.write_text(slurm.render(job, [stage], cluster)[f"{STAGE}.sbatch"], encoding="utf-8")
            slurm.ask("sbatch", "--test-only", str(path))
        except LaunchError as error:
            said = str(error).removeprefix(f"sbatch --test-only {path}: ").replace("--run", "--folder")
            yield failed("options", said)
            return
    said = f"account {cluster.account or 'by default'}, QoS {cluster.qos or 'by default'}"
    yield Finding("options", "ok", f"sbatch takes them: {said}")


def _job(run: Path, cluster: SlurmCluster, nodes: int) -> tuple[Job, Stage]:
    job = Job(run, "export", nodes=nodes)
    task = Task(("pipeline", "network-check"), run)
    return job, Stage(STAGE, (task,), nodes, cluster.processes)


def _tried(cluster: SlurmCluster, folder: Path, nodes: int, wait_s: float) -> Iterator[Finding]:
    """Submit a job that checks each node, and sums numbers over all of them."""
    brief = cluster.model_copy(update={"time": RUN_TIME, "stop_seconds": 10, "max_restarts": 0})
    run = folder.absolute() / f"doctor-{uuid.uuid4().hex[:8]}"
    job, stage = _job(run, brief, nodes)
    kept = submission.keep(job.records, slurm.render(job, [stage], brief))
    try:
        slurm.submit(job, [stage], brief, kept)
    except LaunchError as error:
        yield failed("job", str(error))
        return
    (submitted,) = submission.recorded(run).jobs
    log = kept / submission.LOGS / f"{STAGE}-{submitted.id}.log"
    try:
        verdict = judged(_followed(submitted.id, wait_s, RUN_S + cluster.meet_seconds), log, cluster, nodes)
    finally:
        with contextlib.suppress(LaunchError):  # it has ended, and is forgotten
            slurm.ask("scancel", submitted.id)
    if verdict.state == "ok":
        shutil.rmtree(run)
    yield verdict


def _followed(id_: str, wait_s: float, run_s: float) -> dict[str, str]:
    """What scontrol shows of a job once it has ended, or has waited, or run, for too long."""
    began, running = time.monotonic(), 0.0
    while True:
        told = slurm.fields(slurm.ask("scontrol", "show", "job", id_, "--oneliner"))
        state, now = told["JobState"], time.monotonic()
        running = running or (now if state != "PENDING" else 0.0)
        waited_long = state == "PENDING" and now - began > wait_s
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING") or waited_long:
            return told
        if running and now - running > run_s:
            return told
        time.sleep(1)


def judged(told: dict[str, str], log: Path, cluster: SlurmCluster, nodes: int) -> Finding:
    """What a job's end, as scontrol shows it, and its log say of the site."""
    state, reason, where = told["JobState"], told.get("Reason", "None"), told.get("NodeList", "")
    if state == "PENDING":
        fix = "a higher --wait, or a quieter hour" if reason in WAITS else "`man squeue`, JOB REASON CODES, explains it"
        found = f"it did not start in time, as SLURM says: {reason}"
        return Finding("job", "warning" if reason in WAITS else "fail", found, fix)
    text = _read(log)
    if text is None:
        found = f"{state} on {where} with ExitCode {told.get('ExitCode')}, and {log} is not there"
        fix = "--folder on a file system that the nodes share with this machine (`shared` of the cluster file)"
        return Finding("job", "fail", found, fix)
    measured = re.search(r'^(?:\d+: )?(\{"ranks".*\})$', text, re.MULTILINE)
    if state != "COMPLETED" or not measured:
        # srun puts the task's number before each line.
        lines = [re.sub(r"^\d+: ", "", line) for line in text.splitlines() if line.strip()]
        errors = list(dict.fromkeys(line for line in lines if line.startswith("error:"))) or lines[-8:]
        return Finding("job", "fail", f"{state} on {where}: " + "\n".join(errors), f"the whole log is {log}")
    return network(json.loads(measured[1]), cluster, nodes)


def network(measured: dict[str, Any], cluster: SlurmCluster, nodes: int) -> Finding:
    """What the ranks measured of their network, against what the cluster file says of it."""
    hosts, by, last = measured["hosts"], measured["backend"], (measured["sizes"] or [None])[-1]
    rate = f", {last['bus_gb_s']:.2f} GB/s bus bandwidth, {measured['latency_us']:.0f} µs" if last else ""
    found = f"{measured['ranks']} ranks on {', '.join(hosts)}, by {by}{rate}"
    if len(hosts) != nodes:
        return Finding("network", "fail", f"{found}; {nodes} nodes were wanted", "see `sbatch` of the cluster file")
    if cluster.gpus_per_node and by == "gloo":
        fix = "torch's CUDA build for `python`, `gres`, the driver; with a container, one that has CUDA's torch"
        return Finding("network", "fail", f"{found}; torch sees no GPU there", fix)
    if last and by == "nccl" and nodes > 1 and cluster.network in FAST_NETWORKS and last["bus_gb_s"] < FAST_GB_S:
        fix = f"`environment: {{NCCL_DEBUG: INFO}}` says which network NCCL takes; NET/Socket is not {cluster.network}"
        return Finding("network", "warning", f"{found}: no more than Ethernet's 10 Gb/s", fix)
    return Finding("network", "ok", found)


def _read(log: Path) -> str | None:
    """A log, which other machines write, once it is seen here."""
    until = time.monotonic() + LOG_S
    while not log.is_file():
        if time.monotonic() > until:
            return None
        time.sleep(0.5)
    return log.read_text(encoding="utf-8", errors="replace")


def _machines(told: str) -> list[Machine]:
    rows = dict.fromkeys(line.strip() for line in told.splitlines() if line.strip())
    machines = []
    for row in rows:
        name, state, cores, memory, gres, reason = row.split("|", 5)
        # gpu:4, gpu:a100:4(S:0-1), several kinds with commas between
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)??:(\d+)", gres))
        machines.append(Machine(name, state, int(cores), int(memory), gpus, reason.removeprefix("none")))
    return machines


def _settings(told: str) -> dict[str, str]:
    """scontrol show config: NAME = VALUE lines."""
    return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", told, re.MULTILINE))

"""A SLURM cluster of one's own on this machine, whose tasks, nodes and cables can fail."""

from __future__ import annotations

import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.hosts import Hosts, Machines, refused, until
from tests.keeper import Kept

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# Where daemons are, which not every user's PATH has.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
# Of a Unix socket's path: those of munged, and of the steps that a node runs.
SOCKET_PATH_LIMIT = 107
STEP_SOCKET = "99999.4294967294"
START_S, COMMAND_S = 30, 20

# Partitions: jobs of URGENT take the nodes of jobs of MAIN, which is where a job goes that does not say.
MAIN, URGENT = "main", "urgent"
# A job in one of these will not start again by itself.
ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}

SETTINGS = {
    "ClusterName": "test",
    "AuthType": "auth/munge",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "GresTypes": "gpu",
    "SlurmdParameters": "config_overrides",
    "SlurmctldParameters": "preempt_send_user_signal",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "ReturnToService": 2,
    "SchedulerParameters": "sched_interval=1,bf_interval=1",
    "SlurmdTimeout": 3,
    "MessageTimeout": 4,
    "TCPTimeout": 1,
    "InactiveLimit": 30,
    "KillWait": 3,
    "MailProg": "/bin/true",
}


class Cluster:
    """node1 … nodeN under a slurmctld, from `start` (or `with`) to `stop`.

    Attributes:
        names: of its nodes.
        machines: what the nodes are; Hosts if they can be.
        env: variables for programs that are to find this cluster and no other.
    """

    machines: Machines

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 0,
        grace_s: int = 30,
        hosts: bool | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Nothing is started or written yet.

        Args:
            folder: new, for settings, state and logs.
            nodes: how many.
            cpus: that a node says it has, whatever this machine has.
            gpus: likewise; behind each is /dev/null.
            grace_s: between the signal to a job that must make room for one of URGENT, and its end.
            hosts: whether nodes have addresses of their own; by default if this machine lets them.
            settings: of slurm.conf, over SETTINGS.
        """
        self.folder, self.names = folder, [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus, self._gpus, self._grace_s = cpus, gpus, grace_s
        self._settings, self._kept = dict(settings or {}), dict[str, Kept]()
        if hosts is None and (reason := refused()):
            warnings.warn(f"SLURM's nodes here are processes, no hosts: {reason}", stacklevel=2)
        self._hosts = not refused() if hosts is None else hosts
        others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env = others | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all of it, and return when every node is idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.machines = (Hosts if self._hosts else Machines)(self.folder, self.names)
        try:
            self._configure()
            self._keep("munged", *self._munged())
            until(self._socket.exists, "munged's socket")
            self._keep("slurmctld", "slurmctld", "-D")
            for name in self.names:
                self.start_node(name)
            until(self._answers, "slurmctld to answer")
            self.wait_nodes("idle")
        except BaseException as error:
            error.add_note(self.logs())
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every process that the cluster started, those of jobs too."""
        self.machines.stop()
        for kept in self._kept.values():
            kept.kill()

    def reset(self) -> None:
        """End all jobs, mend what is broken, and return when every node is idle and nothing runs on it."""
        self.machines.mend()
        for name, state in self.nodes().items():
            # A node that was cut off still runs what has begun again elsewhere.
            if state.startswith("down") and self.machines.running(name):
                self.kill_node(name)
            if not self.machines.running(name):
                self.start_node(name)
        self.run("scancel", f"--user={getpass.getuser()}")
        self.wait_nodes("idle")
        until(lambda: all(len(self.machines.processes(name)) == 1 for name in self.names), "every task to end")

    # Jobs

    def run(self, *command: object, folder: Path | None = None, timeout_s: float = COMMAND_S) -> str:
        """What a command such as sbatch or scontrol prints, run on this machine against this cluster.

        Raises:
            AssertionError: it failed, or had not ended after `timeout_s`.
        """
        words = [str(word) for word in command]
        try:
            done = subprocess.run(words, env=self.env, cwd=folder, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{' '.join(words)}: had not ended after {timeout_s} s") from error
        assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: object, folder: Path) -> str:
        """Submit a script, which is kept in `folder` and runs there, and return the job's id.

        It prints into FOLDER/slurm-ID.out, if options say nothing else.
        """
        path = folder / "job.sh"
        path.write_text(script if script.startswith("#!") else f"#!/bin/bash\n{script}\n")
        return self.run("sbatch", "--parsable", *options, path, folder=folder).strip()

    def jobs(self, job: str = "") -> list[dict[str, str]]:
        """What `scontrol show job` says of every job, or of every task of an array."""
        said = self.run("scontrol", "show", "job", "--oneliner", *([job] if job else []))
        found = (dict(re.findall(r"([\w:/]+)=(.*?)(?= [\w:/]+=|$)", line.strip())) for line in said.splitlines())
        return [one for one in found if "JobId" in one]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of one job, or of one task of an array (12_3)."""
        (found,) = self.jobs(job)
        return found

    def wait(self, job: str, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """Wait until a job is in one of some states (by default ENDED), and return what is known of it.

        Raises:
            AssertionError: it ended otherwise, or did not get there in time.
        """
        deadline = time.monotonic() + timeout_s
        while (found := self.job(job))["JobState"] not in (states or ENDED):
            told = f"job {job} is {found['JobState']}, not {' or '.join(states or sorted(ENDED))}: {found}"
            assert found["JobState"] not in ENDED, told
            assert time.monotonic() < deadline, f"after {timeout_s} s {told}"
            time.sleep(0.1)
        return found

    def tasks(self, job: str, step: str = "0") -> dict[int, int]:
        """The process id, on this machine, of each rank that srun has started and that has not ended."""
        found = {}
        for name in filter(self.machines.running, self.names):
            listed = [*self.machines.inside(name), "scontrol", "listpids", f"{job}.{step}", name]
            done = subprocess.run(listed, env=self.env, capture_output=True, text=True, timeout=COMMAND_S)
            for line in done.stdout.splitlines():
                pid, *_, rank = line.split()
                if rank.isdecimal():
                    found[int(rank)] = int(pid)
        return found

    # Faults; `machines` has those of cables and names.

    def kill_task(self, job: str, rank: int, step: str = "0") -> None:
        """SIGKILL what srun started as one rank, and that process only."""
        os.kill(self.tasks(job, step)[rank], signal.SIGKILL)

    def kill_node(self, name: str) -> None:
        """Cut a node's power: slurmd and all tasks are gone, and nobody is told."""
        self.machines.kill(name)

    def report_down(self, name: str) -> None:
        """Tell slurmctld that a node is down, which it would see by itself after some fifteen seconds."""
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=reported")

    def start_node(self, name: str) -> None:
        """Start a node that does not run; see wait_nodes."""
        self.machines.boot(name, ["slurmd", "-D", "-N", name], self.env)

    # Nodes

    def on(self, name: str, *command: object, timeout_s: float = COMMAND_S) -> str:
        """What a command prints that runs on a node, though not in a job; it must succeed."""
        return self.run(*self.machines.inside(name), *command, timeout_s=timeout_s)

    def nodes(self) -> dict[str, str]:
        """Each node's state in sinfo's words: idle, mixed, allocated, completing, down*, …"""
        said = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", f"--partition={MAIN}")
        return dict(line.split() for line in said.splitlines())

    def wait_nodes(self, state: str, *names: str, timeout_s: float = START_S) -> None:
        """Wait until some nodes (by default all) are in a state."""

        def reached() -> bool:
            return {found for name, found in self.nodes().items() if name in (names or self.names)} == {state}

        until(reached, f"{', '.join(names or self.names)} to be {state}", timeout_s)

    def logs(self, lines: int = 30) -> str:
        """The last lines of every log."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in sorted(self.folder.glob("*.log"))
        )

    # How it is set up

    @property
    def _socket(self) -> Path:
        return self.folder / "munge.socket"

    def _keep(self, name: str, *command: object) -> None:
        self._kept[name] = Kept(command, self.folder / f"{name}.log", self.env)

    def _answers(self) -> bool:
        assert self._kept["slurmctld"].running(), "slurmctld has ended"
        ping = subprocess.run(["scontrol", "ping"], env=self.env, capture_output=True, timeout=COMMAND_S)
        return ping.returncode == 0

    def _munged(self) -> list[object]:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(random.randbytes(128))
        files = {"socket": self._socket, "key-file": key}
        files |= {f"{kind}-file": self.folder / f"munge.{kind}" for kind in ("pid", "seed", "log")}
        return [
            "munged",
            "--foreground",
            "--force",
            "--num-threads=2",
            *(f"--{option}={path}" for option, path in files.items()),
        ]

    def _configure(self) -> None:
        """Write slurm.conf and what belongs to it."""
        user, machine = getpass.getuser(), socket.gethostname().partition(".")[0]
        settings = SETTINGS | {
            "SlurmctldHost": f"{machine}({self.machines.login})",
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthInfo": f"socket={self._socket},cred_expire=5",  # the least; one second more is before a requeue
            "StateSaveLocation": self._new_folder("state"),
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdSpoolDir": self.folder / "spool.%n",
            "SlurmdPidFile": self.folder / "slurmd.%n.pid",
        }
        port, *ports = _free_ports(1 + len(self.names))
        settings["SlurmctldPort"] = port
        places = dict.fromkeys(self.names, "")
        if not self._hosts:
            places = {name: f"NodeHostname={machine} Port={port}" for name, port in zip(self.names, ports, strict=True)}
        lines = [f"{name}={value}" for name, value in (settings | self._settings).items()]
        for name in self.names:
            spool = self._new_folder(f"spool.{name}")
            longest = spool / f"{name}_{STEP_SOCKET}"
            assert len(str(longest)) <= SOCKET_PATH_LIMIT, f"{longest}: a socket's path must be shorter"
            has = f"CPUs={self._cpus} RealMemory=1024" + (f" Gres=gpu:{self._gpus}" if self._gpus else "")
            lines.append(f"NodeName={name} NodeAddr={self.machines.addresses[name]} {places[name]} {has}")
        common = "Nodes=ALL MaxTime=INFINITE State=UP"
        lines.append(f"PartitionName={MAIN} {common} Default=YES PriorityTier=1 GraceTime={self._grace_s}")
        lines.append(f"PartitionName={URGENT} {common} PriorityTier=2 PreemptMode=OFF")
        (self.folder / "slurm.conf").write_text("\n".join([*lines, ""]))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = [self.folder / f"gpu{number}" for number in range(self._gpus)]
        for device in devices:
            device.symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))

    def _new_folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir()
        return path


def missing() -> list[str]:
    """Programs of SLURM that this machine does not have."""
    return [program for program in PROGRAMS if not shutil.which(program, path=PATH)]


def _free_ports(count: int) -> list[int]:
    """TCP ports that nothing listened on just now."""
    probes = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports

"""Hosts on this one machine: each has an address, a name, a hosts file and a cable that can be pulled.

As root a host is a set of namespaces (network, UTS, mount) that ends with its processes:

    this machine, "login" ── switch, a bridge in a namespace ─┬─ node1, 198.18.7.1
    198.18.7.254                                              ├─ node2, 198.18.7.2
                                                              └─ …

Where that cannot be (see `refused`), Machines stand in: processes that share this machine's address and name.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.keeper import Kept

# For tests between network devices and no other use (RFC 2544), so that no machine is on them.
SUBNETS = [f"198.{second}.{third}" for second in (18, 19) for third in range(256)]
LOGIN = 254
NAMESPACES = ("--net", "--uts", "--mount")
COMMAND_S = 20

BOOT = """set -e
mount --bind {folder}/hosts.{name} /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
mount -t sysfs sysfs /sys
echo {name} >/proc/sys/kernel/hostname
ip link set lo up
at_switch="nsenter --net=/proc/{switch}/ns/net"
$at_switch ip link delete {name} 2>/dev/null || true # of a host that was killed just now
ip link add eth0 type veth peer name {name} netns {switch}
$at_switch ip link set {name} master switch up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec "$@"
"""


class Machines:
    """Processes that stand for hosts, but share this machine's address and name.

    Attributes:
        login: the address of this machine, as the hosts reach it.
        addresses: of each host.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """`folder` is for hosts' files and logs."""
        self._folder, self._kept = folder, dict[str, Kept]()
        self.login = self._join()
        self.addresses = self._settle(names)

    def _join(self) -> str:
        """Put this machine into the hosts' network; its address there."""
        return _own_address()

    def _settle(self, names: Sequence[str]) -> dict[str, str]:
        """Give each host its address."""
        return dict.fromkeys(names, self.login)

    def boot(self, name: str, command: Sequence[object], env: Mapping[str, str]) -> None:
        """Start a host that runs a command."""
        self._kept[name] = Kept(command, self._folder / f"{name}.log", env)

    def kill(self, name: str) -> None:
        """Cut a host's power: all its processes are gone, and nobody is told."""
        self._kept.pop(name).kill()

    def running(self, name: str) -> bool:
        """Whether a host was started, and its command has not ended."""
        return name in self._kept and self._kept[name].running()

    def processes(self, name: str) -> list[psutil.Process]:
        """What runs on a host."""
        return psutil.Process(self._kept[name].pid).children(recursive=True)

    def inside(self, name: str) -> list[str]:
        """What must stand before a command that is to run on a host."""
        return []

    def mend(self) -> None:
        """Undo what was done to cables and names."""

    def stop(self) -> None:
        """Kill all of it."""
        for kept in self._kept.values():
            kept.ask()
        for kept in self._kept.values():
            kept.kill()


class Hosts(Machines):
    """Real hosts, as far as one kernel can tell. Root only, and not where `refused`.

    Attributes:
        link: this machine's end of its cable to the switch.
    """

    def _join(self) -> str:
        self._switch = Kept(["sleep", "infinity"], self._folder / "switch.log", os.environ, ["--net"])
        mine, other = Path("/proc/self/ns/net").readlink(), Path(f"/proc/{self._switch.pid}/ns/net")
        until(lambda: other.readlink() != mine, "the switch has a namespace")
        self._at_switch("ip link add switch type bridge")
        self._at_switch("ip link set switch up")
        # A link's name is nobody else's in this machine, and with it the subnet.
        for subnet in random.sample(SUBNETS, len(SUBNETS)):
            self.link = "slurm-" + subnet.partition(".")[2]
            added = f"ip link add {self.link} type veth peer name login netns {self._switch.pid}"
            if _run(added.split(), check=False) == 0:
                break
        self._at_switch("ip link set login master switch up")
        _run(f"ip address add {subnet}.{LOGIN}/24 dev {self.link}".split())
        _run(f"ip link set {self.link} up".split())
        return f"{subnet}.{LOGIN}"

    def _settle(self, names: Sequence[str]) -> dict[str, str]:
        subnet = self.login.rpartition(".")[0]
        self.addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, 1)}
        (self._folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        for name in names:
            self.hosts_file(name).write_text(self._names())
        return self.addresses

    def boot(self, name: str, command: Sequence[object], env: Mapping[str, str]) -> None:
        script = BOOT.format(folder=self._folder, name=name, switch=self._switch.pid, address=self.addresses[name])
        words = ["sh", "-c", script, "sh", *command]
        self._kept[name] = Kept(words, self._folder / f"{name}.log", env, NAMESPACES)

    def kill(self, name: str) -> None:
        self.pull(name)
        super().kill(name)

    def inside(self, name: str) -> list[str]:
        return ["nsenter", f"--target={self._kept[name].pid}", *NAMESPACES]

    def pull(self, name: str) -> None:
        """Pull a host's cable; it sees that its link has no carrier."""
        self._at_switch(f"ip link set {name} down")

    def plug(self, name: str) -> None:
        """Plug it in again."""
        self._at_switch(f"ip link set {name} up")

    @contextlib.contextmanager
    def private(self, name: str, folder: Path) -> Iterator[None]:
        """A file system of a host's own lies over a folder."""
        subprocess.run([*self.inside(name), "mount", "-t", "tmpfs", "none", str(folder)], check=True, timeout=COMMAND_S)
        try:
            yield
        finally:
            subprocess.run([*self.inside(name), "umount", "--lazy", str(folder)], check=True, timeout=COMMAND_S)

    @contextlib.contextmanager
    def taken(self, name: str, ports: Sequence[int]) -> Iterator[None]:
        """A process holds some ports of a host."""
        code = f"import socket, time; held = [socket.create_server(('', one)) for one in {list(ports)}]"
        command = [*self.inside(name), sys.executable, "-uc", f"{code}; print(); time.sleep(999)"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == b"\n"
            try:
                yield
            finally:
                holder.kill()

    def hosts_file(self, name: str) -> Path:
        """/etc/hosts of a host; what is written into it counts at once."""
        return self._folder / f"hosts.{name}"

    def name_loopback(self, name: str) -> None:
        """Let a host's own name mean 127.0.1.1 on it, as Debian's installer does."""
        self.hosts_file(name).write_text(self._names(name))

    def _names(self, loopback: str = "") -> str:
        addresses = self.addresses | ({loopback: "127.0.1.1"} if loopback else {})
        return "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())

    def mend(self) -> None:
        for name in self.addresses:
            self.hosts_file(name).write_text(self._names())
        for name in filter(self.running, self._kept):
            self.plug(name)

    def stop(self) -> None:
        _run(f"ip link delete {self.link}".split(), check=False)
        super().stop()
        self._switch.kill()

    def _at_switch(self, command: str, check: bool = True) -> None:
        _run(["nsenter", f"--target={self._switch.pid}", "--net", *command.split()], check)


def refused() -> str:
    """Why this machine cannot have Hosts; empty if it can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    probe = (
        "mount -t sysfs sysfs /sys && ip link add probe type veth peer name other && ip link add name sw type bridge"
    )
    done = subprocess.run(["unshare", *NAMESPACES, "sh", "-c", probe], capture_output=True, text=True)
    return f"namespaces are refused here ({done.stderr.strip()})" if done.returncode else ""


def until(holds: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for: {what}"
        time.sleep(0.02)


def _own_address() -> str:
    """The address that this machine has in its network; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def _run(command: Sequence[str], check: bool = True) -> int:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
    return done.returncode

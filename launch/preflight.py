"""What each node of a job checks before the job's program starts: the run folder, names, addresses and the port."""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# NFS clients believe for some seconds that a file is not there.
FOLDER_S = 10.0
CONNECT_S = 5.0
LOW_DISK_BYTES = 1e9
LINE = 1000
HOSTS = Path("/etc/hosts")

# What a machine with IPv6 compiled in but switched off says.
NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
OWN_NAME = (
    "Let /etc/hosts give that name the address that other nodes see, or name the network in the cluster file, such as "
    "`interface: eth0` (`ip -brief address` lists them)."
)

Resolve = Callable[[str], list[str]]


@dataclass(frozen=True)
class Node:
    """What a node knows of its job.

    Attributes:
        name: its own, by which SLURM knows it.
        hostname: what the machine calls itself.
        first: whether rank 0 runs here.
        folder: what is kept of the job, in its run folder or beside its dataset.
        token: a file there that the first node has written before.
        master: name or address of the first node, where ranks meet.
        port: the port there.
        nodes: how many nodes the job has.
        interface: what GLOO_SOCKET_IFNAME says; "" where it is not set.
    """

    name: str
    hostname: str
    first: bool
    folder: Path
    token: str
    master: str
    port: int
    nodes: int
    interface: str = ""


def this_node(folder: Path, token: str, master: str, port: int, nodes: int) -> Node:
    """The node that this process runs on, as a task of SLURM's."""
    hostname = socket.gethostname()
    return Node(
        name=os.environ.get("SLURMD_NODENAME", hostname),
        hostname=hostname,
        first=os.environ.get("SLURM_NODEID", "0") == "0",
        folder=folder,
        token=token,
        master=master,
        port=port,
        nodes=nodes,
        interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
    )


def addresses(name: str) -> list[str]:
    """What a name stands for on this machine, in the order in which programs try them; [] where it is not known."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def check(
    node: Node, meet_s: float, *, resolve: Resolve = addresses, folder_s: float = FOLDER_S
) -> tuple[list[str], list[str]]:
    """All (problems, warnings) of a node; with a problem, the job's program would fail or hang.

    The first node listens on the port meanwhile, and every node connects to it, the first included.

    Args:
        node: what is to be checked.
        meet_s: seconds that nodes wait for each other; srun starts them one after the other.
        resolve: a name → its addresses.
        folder_s: seconds that a node waits for the token to be seen.
    """
    until = time.monotonic() + meet_s
    problems, warnings = [], []
    met: dict[str, str] = {}
    reached = ""
    with ExitStack() as open_:
        try:
            listening = open_.enter_context(_listen(node.port, node.nodes)) if node.first else None
        except OSError as error:
            problems.append(_taken(node.port, error))
        else:
            pool = open_.enter_context(ThreadPoolExecutor(1))
            answers = pool.submit(_answer, listening, node, until) if listening else None
            reached, said = _reach(node, resolve, until)
            met = answers.result() if answers else {}
            problems += [said] if said else []
    # Several slurmd may share a machine: then names that lead to no other machine are right.
    one_machine = _is_here(reached) if not node.first else len(met) == node.nodes and all(map(_is_here, met.values()))
    if not one_machine:
        problems += _names(node, resolve)
    problems += _folder(node, folder_s)
    others = met.keys() - {node.name}
    if reached and node.first and (silent := node.nodes - 1 - len(others)):
        heard = f"heard from {', '.join(sorted(others)) or 'none'}"
        problems.append(
            f"{silent} of the job's {node.nodes} nodes did not connect to this first node's port {node.port} in "
            f"{meet_s:.0f} s ({heard}). See what they say themselves; one that says nothing is cut off, or down: "
            "`sinfo -N -l` shows its state. Where nodes only begin slowly, raise `meet_seconds` of the cluster file."
        )
    if node.folder.is_dir() and (free := shutil.disk_usage(node.folder).free) < LOW_DISK_BYTES:
        warnings.append(f"only {free / 1e6:.0f} MB are free in {node.folder}. Checkpoints may not fit.")
    return problems, warnings


def _listen(port: int, nodes: int) -> socket.socket:
    """A socket where the job's own will be: on all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=nodes)
        except OSError as error:
            if error.errno not in NO_IPV6:
                raise
    return socket.create_server(("", port), backlog=nodes)


def _answer(listening: socket.socket, node: Node, until: float) -> dict[str, str]:
    """Give each node that connects the token back; {its name: the address that it came from}."""
    met: dict[str, str] = {}
    with ExitStack() as open_:
        while len(met) < node.nodes and (left := until - time.monotonic()) > 0:
            listening.settimeout(left)
            try:
                connection, peer = listening.accept()
                open_.enter_context(connection).settimeout(CONNECT_S)
                token, _, name = connection.makefile().readline(LINE).strip().partition(" ")
                if token == node.token:
                    connection.sendall(f"{token}\n".encode())
                    met[name] = peer[0].removeprefix("::ffff:").partition("%")[0]
            except (OSError, UnicodeError):
                continue  # a time-out, or somebody else's connection
    return met


def _reach(node: Node, resolve: Resolve, until: float) -> tuple[str, str]:
    """(the address at which the first node's check answers, what is wrong if none does)."""
    found, said = resolve(node.master), ""
    while found and (not said or time.monotonic() < until):
        for address in found:
            try:
                with socket.create_connection((address, node.port), timeout=CONNECT_S) as connection:
                    connection.sendall(f"{node.token} {node.name}\n".encode())
                    if connection.makefile().readline(LINE).strip() == node.token:
                        return address, ""
                said = "something else than the first node's check answers there"
            except (OSError, UnicodeError) as error:
                said = f"{type(error).__name__}: {error}"
        time.sleep(0.2)
    if not found:
        return "", (
            f"{node.master}, the first node's address as SLURM gives it, is not known here. Give nodes addresses with "
            "NodeAddr= in slurm.conf, or name them in DNS or in /etc/hosts of every node."
        )
    where = f"{node.master} ({', '.join(found)})" if found != [node.master] else node.master
    if node.first:
        return "", (
            f"this first node does not reach itself at {where}, port {node.port} ({said}). That is where all ranks "
            "meet: NodeAddr in slurm.conf must be an address of this machine."
        )
    return "", (
        f"the first node does not answer at {where}, port {node.port} ({said}). Unless it says what is wrong with "
        "itself: is a cable out, or a firewall between the two? Nodes must reach each other on all TCP ports."
    )


def _names(node: Node, resolve: Resolve) -> Iterator[str]:
    """Whether the first node's name, and the own one, stand for addresses that other nodes can use."""
    if node.nodes == 1:
        return
    found = resolve(node.master)
    if found and _loopback(found[0]):
        yield (
            f"{node.master}, the first node's address as SLURM gives it, stands for {found[0]} here, which each node "
            f"takes for itself{_named_in(node.master, found[0])}. Set NodeAddr= of the first node in slurm.conf to the "
            "address that others see, or let /etc/hosts say it."
        )
    if node.interface:
        yield from _interface(node.interface)
        return
    # As torch's gloo does (ProcessGroupGloo.cpp): the first address of its own name that it can bind, else loopback.
    own = resolve(node.hostname)
    bound = next((address for address in own if _is_here(address)), None)
    if bound is None:
        says = f"stands for {', '.join(own)}, which this machine has not" if own else "is not known here"
        yield (
            f"this host's own name, {node.hostname}, {says}, so that its ranks would offer 127.0.0.1 to the others. "
            f"{OWN_NAME}"
        )
    elif _loopback(bound):
        yield (
            f"this host's own name, {node.hostname}, stands for {bound} here{_named_in(node.hostname, bound)}, which "
            f"its ranks would offer to the others. {OWN_NAME}"
        )


def _interface(names: str) -> Iterator[str]:
    """Whether the interfaces that GLOO_SOCKET_IFNAME names are there, up, and have an address."""
    known, states = psutil.net_if_addrs(), psutil.net_if_stats()
    others = ", ".join(sorted(name for name in known if name != "lo"))
    for name in names.split(","):
        has = [one.address for one in known.get(name, []) if one.family in (socket.AF_INET, socket.AF_INET6)]
        wrong = (
            "is not there"
            if name not in known
            else "is down"
            if name in states and not states[name].isup
            else "has no address"
            if not has
            else "leads nowhere but to this host"
            if all(_loopback(address.partition("%")[0]) for address in has)
            else ""
        )
        if wrong:
            yield f"interface {name} of the cluster file {wrong} on this node. It has {others or 'none but lo'}."


def _folder(node: Node, wait_s: float) -> Iterator[str]:
    """Whether this node sees in the run folder what the first node wrote there, and may write there too."""
    token = node.folder / node.token
    until = time.monotonic() + wait_s
    while not token.is_file():
        if time.monotonic() > until:
            break
        time.sleep(0.2)
        if token.parent.is_dir():
            # NFS asks the server anew when a folder is listed.
            list(token.parent.iterdir())
    else:
        if not os.access(node.folder, os.W_OK):
            yield f"user {os.getuid()} may not write to {node.folder} here. See how it is mounted, and who owns it."
        return
    there = f"it lies on {_mount(node.folder)}" if node.folder.is_dir() else "there is no such folder"
    yield (
        f"does not see {node.folder} as the first node does: {token.name}, just written there, is missing, and here "
        f"{there}. Put --run on a file system that all nodes share (name those under `shared:` in the cluster file)."
    )


def _mount(path: Path) -> str:
    """The file system that a path lies on."""
    mounts = {one.mountpoint: one for one in psutil.disk_partitions(all=True)}
    path = path.resolve()
    for folder in (path, *path.parents):
        if found := mounts.get(str(folder)):
            return f"{found.device} ({found.fstype}), mounted at {found.mountpoint}"
    return "an unknown file system"


def _taken(port: int, error: OSError) -> str:
    listening = (one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
    holders = [one for one in listening if one.laddr.port == port]
    who = f"by a process of another user; as root, `ss -ltnp sport = :{port}` names it" if holders else error.strerror
    with suppress(psutil.Error, StopIteration):
        process = psutil.Process(next(one.pid for one in holders if one.pid))
        who = f"by {process.name()}, process {process.pid} of {process.username()}"
    return (
        f"port {port}, where the ranks would meet, is in use on this first node ({who}). The port follows from the "
        "job's id: submit again, and the job has another one."
    )


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine's; "" is not."""
    if not address:
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _named_in(name: str, address: str, hosts: Path = HOSTS) -> str:
    """Which line of /etc/hosts gives a name that address, as words to append."""
    lines = hosts.read_text(encoding="utf-8", errors="replace").splitlines() if hosts.is_file() else []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words and words[0] == address and name in words[1:]:
            return f" ({hosts} line {number}: {' '.join(words)})"
    return ""


def report(node: Node, problems: Sequence[str], warnings: Sequence[str]) -> str:
    """Lines to print, each with the node's name."""
    lines = [f"error: node {node.name}: {one}" for one in problems]
    return "\n".join([*lines, *(f"warning: node {node.name}: {one}" for one in warnings)])

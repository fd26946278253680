"""Each fault of a node is named with what was found and the fix; a sound node passes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest

from launch import preflight
from launch.preflight import Node, check
from tests.processes import free_port

NAMES = {"node1": ["127.0.0.1"], "stale": ["192.0.2.7"]}


def resolve(name):
    return NAMES.get(name, [])


@pytest.fixture
def node(tmp_path):
    """A job of one node, in whose run folder the token is."""
    (tmp_path / "seen-7-0").touch()
    return Node("node1", "node1", True, tmp_path, "seen-7-0", "node1", free_port(), nodes=1)


def problems(node, **arguments):
    return check(node, **{"resolve": resolve, "meet_s": 0.5, "folder_s": 0.1, **arguments})[0]


def test_a_sound_node_has_no_problems(node):
    assert check(node, 0.5, resolve=resolve) == ([], [])


def test_the_first_nodes_name_must_be_known(node):
    (said,) = problems(replace(node, master="typo"))
    assert said.startswith("typo, the first node's address")
    assert "NodeAddr=" in said


def test_with_several_nodes_the_first_must_not_be_loopback(node):
    said = problems(replace(node, nodes=2))[0]
    assert "node1, the first node's address as SLURM gives it, stands for 127.0.0.1 here" in said
    assert "NodeAddr=" in said
    assert "/etc/hosts" in said


@pytest.mark.parametrize(
    ("hostname", "found"),
    [
        ("node1", "stands for 127.0.0.1 here"),
        ("nobody", "is not known here"),
        ("stale", "stands for 192.0.2.7, which this machine has not"),
    ],
)
def test_the_own_name_must_lead_to_this_host_from_others(node, hostname, found):
    (said,) = [one for one in problems(replace(node, nodes=2, hostname=hostname)) if "own name" in one]
    assert hostname in said
    assert found in said
    assert "`interface: eth0`" in said


def test_the_faulty_line_of_etc_hosts_is_shown(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1\tnode1.site node1 # Debian\n10.0.0.5 node5\n")
    assert preflight._named_in("node1", "127.0.1.1", hosts) == f" ({hosts} line 2: 127.0.1.1 node1.site node1)"
    assert preflight._named_in("node1", "10.0.0.5", hosts) == ""


@pytest.mark.parametrize(("name", "wrong"), [("ib7", "is not there"), ("lo", "leads nowhere but to this host")])
def test_an_interface_must_be_there_and_lead_to_others(node, name, wrong):
    said = problems(replace(node, nodes=2, interface=name))
    assert [one for one in said if f"interface {name} of the cluster file {wrong}" in one]
    assert not [one for one in said if "own name" in one]


@pytest.mark.skipif(set(psutil.net_if_addrs()) <= {"lo"}, reason="this machine has no network")
def test_an_interface_makes_the_own_name_unimportant(node):
    up = next(name for name in psutil.net_if_addrs() if name != "lo" and psutil.net_if_stats()[name].isup)
    said = problems(replace(node, nodes=2, hostname="nobody", interface=up))
    assert not [one for one in said if "interface" in one or "own name" in one]


def test_a_port_in_use_is_named_with_who_holds_it(node):
    with socket.create_server(("127.0.0.1", node.port)):
        (said,) = problems(node)
    assert f"port {node.port}" in said
    assert f"process {os.getpid()}" in said
    assert "submit again" in said


def test_a_folder_that_is_not_shared(node, tmp_path):
    (said,) = problems(replace(node, token="seen-8-0"))
    assert f"does not see {tmp_path} as the first node does: seen-8-0" in said
    assert "mounted at" in said
    assert "shared:" in said
    (said,) = problems(replace(node, folder=tmp_path / "nowhere"))
    assert "there is no such folder" in said


def test_a_token_may_be_seen_late(node, tmp_path):
    late = subprocess.Popen(["sh", "-c", 'sleep .5; touch "$1"', "sh", tmp_path / "late"])
    assert problems(replace(node, token="late"), folder_s=20) == []
    assert late.wait() == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(node, tmp_path):
    tmp_path.chmod(0o555)
    (said,) = problems(node)
    assert "may not write" in said


def test_a_full_disk_is_a_warning(node, monkeypatch):
    monkeypatch.setattr(preflight, "LOW_DISK_BYTES", float("inf"))
    found, (warning,) = check(node, 0.5, resolve=resolve)
    assert found == []
    assert "MB are free" in warning


def in_two_nodes(first, second):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: problems(one, meet_s=3), (first, second)))


def unmet(said):
    return [one for one in said if "did not connect" in one or "does not answer" in one]


def test_two_nodes_meet_and_one_machine_may_be_both(node):
    """Loopback leads from one to the other then, so that no name is wrong."""
    first = replace(node, nodes=2)
    assert in_two_nodes(first, replace(first, first=False, name="node2")) == [[], []]


def test_two_machines_may_not_offer_loopback_to_each_other(node, monkeypatch):
    monkeypatch.setattr(preflight, "_is_here", lambda address: False)
    first = replace(node, nodes=2)
    found = in_two_nodes(first, replace(first, first=False, name="node2"))
    assert [unmet(said) for said in found] == [[], []]
    assert all("the first node's address as SLURM gives it, stands for 127.0.0.1" in said[0] for said in found)


def test_nodes_that_do_not_meet_say_so_on_both_sides(node):
    first = replace(node, nodes=2)
    elsewhere = replace(first, first=False, name="node2", port=free_port())
    (at_first,), (at_second,) = (unmet(said) for said in in_two_nodes(first, elsewhere))
    assert "1 of the job's 2 nodes did not connect" in at_first
    assert "heard from none" in at_first
    assert "ConnectionRefusedError" in at_second
    assert "firewall" in at_second


def test_another_program_at_the_address_is_not_taken_for_the_first_node(node):
    with socket.create_server(("127.0.0.1", node.port)) as server, ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: server.accept()[0].close())
        said = unmet(problems(replace(node, first=False, nodes=2), meet_s=0.01))
        other.result()
    assert len(said) == 1


@pytest.mark.parametrize(("sound", "code"), [(True, 0), (False, 2)])
def test_the_command_exits_as_a_batch_script_needs_it(node, sound, code):
    words = [
        "--folder",
        node.folder,
        "--token",
        node.token,
        "--master",
        "127.0.0.1",
        "--port",
        str(node.port),
        "--nodes",
        "1",
        "--meet",
        "1",
    ]
    environment = {**os.environ, "SLURMD_NODENAME": "node1"}
    with contextlib.nullcontext() if sound else socket.create_server(("127.0.0.1", node.port)):
        command = [sys.executable, "-m", "launch", "check-node", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code
    assert done.stderr.startswith("" if sound else f"error: node node1: port {node.port}")

"""What ranks measure of their network: real ranks over gloo, closed forms, and sums that are made wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from pipeline import network_check
from pipeline.network_check import Network, NetworkError, Size, bandwidths
from tests.processes import free_port, run_ranks


def test_bandwidths_are_those_of_nccl_tests():
    """Two ranks: each sends and receives as much as is summed. Eight: 2 · 7 / 8 of it."""
    assert bandwidths(256_000_000, 0.128, 2) == pytest.approx((2.0, 2.0))
    assert bandwidths(10**9, 0.5, 8) == pytest.approx((2.0, 3.5))


def _measure(rank, world, sizes):
    os.environ["SLURMD_NODENAME"] = f"node{rank // 2}"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return network_check.network_check(sizes)


def test_three_ranks_agree_on_what_they_measured():
    found = run_ranks(3, _measure, [0.1, 1.0])
    assert len({str(one) for one in found}) == 1
    one = found[0]
    assert (one.ranks, one.hosts, one.backend) == (3, ["node0", "node1"], "gloo")
    assert [size.mb for size in one.sizes] == [0.1, 1.0]
    for size in one.sizes:
        assert size.algorithm_gb_s == pytest.approx(size.mb / 1e3 / size.seconds)
        assert size.bus_gb_s == pytest.approx(size.algorithm_gb_s * 4 / 3)


def _spoilt(rank, world):
    real = dist.all_reduce

    def all_reduce(values, *arguments):
        real(values, *arguments)
        if values.dtype == torch.float32 and len(values) > 1 and rank == 1:
            values[17] += 1

    dist.all_reduce = all_reduce
    try:
        _measure(rank, world, [0.1])
    except NetworkError as error:
        return str(error)


def test_a_wrong_sum_ends_all_ranks():
    """Rank 1's copy of one sum is off by one."""
    for said in run_ranks(2, _spoilt):
        assert "1 sums are wrong" in said
        assert "--exclude" in said


def test_the_command_prints_a_line_and_a_sentence():
    port = str(free_port())
    ranks = []
    for rank in range(2):
        names = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "pipeline", "network-check", "--mb", "0.5"]
        ranks.append(subprocess.Popen(command, env=os.environ | names, stdout=-1, stderr=-1, text=True))
    (line, sentence), (nothing, _) = (rank.communicate() for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    found = json.loads(line)
    assert (found["ranks"], found["hosts"]) == (2, [socket.gethostname()])
    assert "2 ranks on 1 host" in sentence
    assert "GB/s at 0.5 MB" in sentence
    assert nothing == ""


def test_the_sentence():
    found = Network(16, ["a", "b"], "nccl", 31.4, [Size(256, 0.1, 102.4, 192.0)])
    assert str(found) == (
        "16 ranks on 2 hosts (a, b) sum rightly by nccl: 192.00 GB/s at 256 MB (bus bandwidth); "
        "31 µs for a single number"
    )


def test_one_rank_has_no_network(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "no network" in str(network_check.network_check())

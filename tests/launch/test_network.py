"""Variables for networks: opt-in, exact names, each with its reason."""

from __future__ import annotations

from typing import get_args

import pytest

from launch import network
from launch.cluster import Network

OPT_IN = {"NCCL_NET", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "FI_PROVIDER"}


def test_by_default_ranks_choose_their_network_and_say_what_fails():
    """Diagnosis is always on; what chooses a network is not."""
    found = network.variables(None)
    assert found["NCCL_DEBUG"] == "WARN"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(found["TORCH_FR_BUFFER_SIZE"]) > 0
    assert not OPT_IN & found.keys()


@pytest.mark.parametrize(("name", "net"), [("ethernet", "Socket"), ("infiniband", "IB"), ("efa", "AWS Libfabric")])
def test_a_profile_names_the_network_that_must_be_there(name, net):
    """NCCL_NET is what keeps NCCL from taking another one silently."""
    found = network.variables(name)
    assert found["NCCL_NET"] == net
    assert found.items() >= network.variables(None).items()
    assert ("FI_PROVIDER" in found) == (name == "efa")


def test_an_interface_is_matched_by_its_whole_name_for_nccl_and_gloo():
    """NCCL takes a name for a prefix (ib1 for ib10) if there is no = before it; gloo knows no =."""
    found = network.variables(None, "ib1")
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("=ib1", "ib1")


def test_every_profile_of_the_cluster_file_exists_and_each_setting_has_one_line_why():
    """A comment in a script must not run over into a command."""
    assert set(network.PROFILES) == set(get_args(Network))
    for one in (setting for name in network.PROFILES for setting in network.explained(name, "eth0")):
        assert one.why
        assert one.why.isprintable()

"""What the processes of a job are told about its network, by environment variables, each with the reason why.

Sources: NCCL's user guide ("Environment Variables"), aws-ofi-nccl's sources and AWS's EFA cheatsheet, torch's
ProcessGroupNCCL.
"""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """A variable."""

    name: str
    value: str
    why: str


# These change no result and no speed.
ALWAYS = (
    Setting("NCCL_DEBUG", "WARN", "NCCL says what failed; without it, only that something did"),
    Setting("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "when a rank waits too long, all write down their last collectives"),
    Setting("TORCH_FR_BUFFER_SIZE", "2000", "… this many of them"),
)

# A network that was asked for and is not there ends the job at once. NCCL by itself would take TCP, which is slow.
PROFILES = {
    "ethernet": (Setting("NCCL_NET", "Socket", "TCP, though nodes have InfiniBand or RoCE cards, which NCCL prefers"),),
    "infiniband": (Setting("NCCL_NET", "IB", "InfiniBand or RoCE; no silent change to TCP where no card is found"),),
    "efa": (
        Setting("NCCL_NET", "AWS Libfabric", "the plugin aws-ofi-nccl; no silent change to TCP where it is not found"),
        Setting("FI_PROVIDER", "efa", "… and of its networks EFA, not TCP where a pod or node was given no EFA device"),
        Setting("FI_EFA_USE_HUGE_PAGE", "0", "huge pages run out when loaders are forked: Cannot allocate memory"),
    ),
}


def explained(network: str | None, interface: str = "") -> list[Setting]:
    """What all processes get, and what a profile and an interface add: with neither, ranks choose by themselves.

    Args:
        network: ethernet, infiniband, efa, or None.
        interface: the network interface that ranks meet on, such as eth0.
    """
    chosen = [*ALWAYS, *(PROFILES[network] if network else ())]
    if interface:
        chosen += [
            Setting("GLOO_SOCKET_IFNAME", interface, "gloo's ranks meet on this interface"),
            Setting("NCCL_SOCKET_IFNAME", f"={interface}", "… and NCCL's; = is for exactly this name"),
        ]
    return chosen


def variables(network: str | None, interface: str = "") -> dict[str, str]:
    """{name: value} of the settings."""
    return {one.name: one.value for one in explained(network, interface)}

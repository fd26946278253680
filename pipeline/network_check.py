"""How fast the ranks of a job sum numbers over its network, and whether the sums are right."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.failure import FailedError
from pipeline.ranks import inference

MB = 1_000_000
# What is summed: a small gradient bucket, a usual one, and one that shows the bandwidth. CPUs' gloo is slower.
SIZES_MB = {"nccl": (1.0, 16.0, 256.0), "gloo": (1.0, 16.0, 64.0)}
# Of each size as many sums as fit into a second, but so many at least, and at most.
SECONDS, FEWEST, MOST = 1.0, 3, 50


class NetworkError(FailedError):
    """Sums over ranks that are wrong."""


@dataclass(frozen=True)
class Size:
    """all_reduce of `mb` megabytes (10^6 bytes): the slowest rank's mean seconds, and bandwidths in GB/s."""

    mb: float
    seconds: float
    algorithm_gb_s: float
    bus_gb_s: float


@dataclass(frozen=True)
class Network:
    """What was measured; `latency_us` is the slowest rank's mean for a single number."""

    ranks: int
    hosts: list[str]
    backend: str
    latency_us: float
    sizes: list[Size]

    def __str__(self) -> str:
        if not self.sizes:
            return "one rank alone has no network to check"
        hosts = f"{len(self.hosts)} host{'s' if len(self.hosts) > 1 else ''} ({', '.join(self.hosts)})"
        rates = ", ".join(f"{size.bus_gb_s:.2f} GB/s at {size.mb:g} MB" for size in self.sizes)
        return (
            f"{self.ranks} ranks on {hosts} sum rightly by {self.backend}: {rates} (bus bandwidth); "
            f"{self.latency_us:.0f} µs for a single number"
        )


def network_check(sizes_mb: Sequence[float] = (), timeout_s: int = 60) -> Network:
    """Measure all_reduce over the ranks that a launcher started, who meet as the trainer's do.

    Bandwidths are those of nccl-tests (doc/PERFORMANCE.md): for S bytes summed over n ranks in t seconds, the algorithm
    bandwidth is S / t; times 2 (n - 1) / n it is the bus bandwidth, what each rank must send and receive whatever n is,
    so that it may be held against what the hardware can do.

    Args:
        sizes_mb: megabytes to sum; by default what suits the backend.
        timeout_s: how long a rank waits for the others.

    Raises:
        RanksError: the ranks do not meet.
        NetworkError: a sum is not what it must be.
    """
    with inference(timeout_s) as (rank, world, device):
        if world == 1:
            return Network(1, [_host()], "none", 0.0, [])
        backend = "nccl" if device.type == "cuda" else "gloo"
        hosts: list[str] = [""] * world
        dist.all_gather_object(hosts, _host())
        latency = _seconds(torch.zeros(1, device=device), MOST)
        sizes = _sizes(sizes_mb or SIZES_MB[backend], rank, world, device)
        return Network(world, sorted(set(hosts)), backend, latency * 1e6, list(sizes))


def bandwidths(size: int, seconds: float, world: int) -> tuple[float, float]:
    """(algorithm, bus) bandwidth of an all_reduce in GB/s, from bytes and seconds."""
    algorithm = size / seconds / 1e9
    return algorithm, algorithm * 2 * (world - 1) / world


def _sizes(sizes_mb: Sequence[float], rank: int, world: int, device: torch.device) -> Iterator[Size]:
    for size in sizes_mb:
        numbers = int(size * MB) // 4
        first = _summed(numbers, rank, world, device)
        taken = _seconds(torch.zeros(numbers, device=device), min(MOST, max(FEWEST, int(SECONDS / first))))
        yield Size(size, taken, *bandwidths(4 * numbers, taken, world))


def _summed(numbers: int, rank: int, world: int, device: torch.device) -> float:
    """Sum small whole numbers, exact in float32, see that it is right, and return the slowest rank's seconds."""
    place = torch.arange(numbers, device=device, dtype=torch.int32) % 7
    values = (place + rank).float()
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    wrong = (values != world * place + world * (world - 1) // 2).sum()
    dist.all_reduce(wrong)
    if wrong.item():
        raise NetworkError(
            f"all_reduce of {numbers} numbers over {world} ranks: {wrong.item()} sums are wrong. A node's memory, GPU "
            "or network adapter changes data. Leave nodes out in turn (`sbatch: [--exclude=NODE]` in the cluster file) "
            "to find which, and tell the site."
        )
    return _slowest(time.perf_counter() - began, device)


def _seconds(values: torch.Tensor, repeats: int) -> float:
    """Mean seconds of one all_reduce, of the slowest rank."""
    dist.all_reduce(values)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(values)
    values[0].item()  # waits for the device
    return _slowest((time.perf_counter() - began) / repeats, values.device)


def _slowest(seconds: float, device: torch.device) -> float:
    most = torch.tensor(seconds, device=device, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def _host() -> str:
    """This host's name, SLURM's if it has one of its own."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())

"""The ranks of a run: how they find each other, and what is said where one is lost."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin

from data_prep.record import DataError
from pipeline.failure import FailedError, LostRanksError

# Seconds after which a rank that waits for others says so.
PATIENCE_S = 30
# In what gloo and nccl raise where a rank is gone; torch gives the one no type of its own.
GLOO, MISUSED = "gloo/transport", "ncclInvalid"

log = logging.getLogger(__name__)


class RanksError(DataError):
    """The processes of a run were not started as they should be, or do not reach each other."""


def start(*, processes: int | None, cpu: bool, precision: str, timeout_s: int) -> Accelerator:
    """Join the other ranks, and refuse to run with fewer than were asked for.

    Args:
        processes: how many there must be; None for any number.
        cpu: leave accelerators alone.
        precision: fp32, bf16, fp16, or fp64.
        timeout_s: how long a rank waits for the others, here and within a step.

    Raises:
        RanksError: a launcher announced more processes than it started, there are not as many as there must be, rank
            0 is not where MASTER_ADDR and MASTER_PORT say, or the precision or a plug-in is one that this cannot use.
    """
    # `accelerate launch --cpu --num_processes N` names a master and then starts one process only.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise RanksError(
            "the launcher set MASTER_ADDR but started a single process. On CPUs, use `torchrun --nproc-per-node N` "
            "or `accelerate launch --multi_gpu --num_processes N`; `--cpu` starts only one."
        )
    for plugin in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise RanksError(
                f"accelerate's configuration asks for {plugin}. Leave it out there, and set train.sharding=fsdp2 to "
                "cut weights over the ranks."
            )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if processes is not None and world != processes:
        raise RanksError(
            f"train.processes = {processes}, but {world} are running. Start them with "
            f"`torchrun --nproc-per-node {processes} -m pipeline train …`, or change the setting."
        )
    cpu = cpu or not torch.accelerator.is_available()
    check_precision(precision, gpu=not cpu)
    if world > 1:
        _meet("gloo" if cpu else "cpu:gloo,cuda:nccl", timeout_s)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever a launcher's variables say
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != world:
        raise RanksError(f"{world} processes were started, but only {accelerator.num_processes} joined.")
    return accelerator


def check_precision(precision: str, *, gpu: bool) -> None:
    """See that the device computes in a precision.

    Raises:
        RanksError: it does not.
    """
    if precision == "fp16" and not gpu:
        raise RanksError("train.precision=fp16 needs a GPU, and there is none here. Take bf16 or fp32.")
    cuda = gpu and torch.cuda.is_available()
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RanksError(f"train.precision=bf16: {torch.cuda.get_device_name()} has no bfloat16. Take fp16 or fp32.")


def _meet(backend: str, timeout_s: int) -> None:
    """Make the process group of all ranks; who waits long says what for."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
    master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    where = (
        f"rank {rank} of {world}: the ranks have not met at {master} (MASTER_ADDR:MASTER_PORT). Is that rank 0's host, "
        f"reachable from here, is the port free there, and were all {world} started with the same address?"
    )
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (OSError, KeyError, ValueError) as error:
        raise RanksError(f"{where} ({type(error).__name__}: {error})") from error
    waiting = threading.Timer(PATIENCE_S, log.warning, ("%s Waiting, for %d s at the most.", where, timeout_s))
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            port = os.environ["MASTER_PORT"]
            raise RanksError(
                f"rank {rank} of {world}: port {port} of {socket.gethostname()} (MASTER_PORT) is in use, by "
                f"{_listener(int(port))}. Set another MASTER_PORT (torchrun: --master-port), the same for all ranks, "
                "or wait until that has ended."
            ) from error
        raise RanksError(f"{where} ({str(error).splitlines()[0]})") from error
    finally:
        waiting.cancel()


def _listener(port: int) -> str:
    """Which process listens on a port of this machine, as far as this user may know."""
    with contextlib.suppress(psutil.Error):
        for one in psutil.net_connections("tcp"):
            if one.pid and one.status == psutil.CONN_LISTEN and one.laddr.port == port:
                return f"{psutil.Process(one.pid).name()}, process {one.pid}"
    return "a process of another user's"


@contextlib.contextmanager
def losses_told() -> Iterator[None]:
    """Name what a collective raises where other ranks are gone or do not answer.

    Raises:
        LostRanksError: that.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or GLOO in text) or isinstance(error, FailedError) or MISUSED in text:
            raise
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        said = re.sub(r"^\[\S+\] ", "", text.splitlines()[0]).partition(". ")[0]
        raise LostRanksError(
            f"rank {rank} of {world} lost others, which died or did not answer ({said}). The same command goes on."
        ) from error


@contextlib.contextmanager
def inference(timeout_s: int = 600) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world, this rank's device) of as many processes as a launcher started; of a single one without.

    Raises:
        RanksError: they do not meet.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    joins = world > 1 and not dist.is_initialized()
    if joins:
        _meet("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout_s)
    try:
        yield rank, world, device
    finally:
        if joins:
            dist.destroy_process_group()

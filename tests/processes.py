"""Real processes for tests: ranks of a gloo group, and trainers that can be killed.

They are forked from a server that has already imported the trainer, which takes seconds, so that a test that starts
ten of them pays for it once.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pipeline.train", "tests.processes"])

WAIT_S = 120


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(rank, world, *args) for each rank], each in a process with a gloo group of all of them."""
    port, results = free_port(), CONTEXT.SimpleQueue()
    processes = [
        CONTEXT.Process(target=_in_group, args=(function, rank, world, port, results, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    collected = [results.get() for _ in range(world)]
    for process in processes:
        process.join(WAIT_S)
    failures = [failure for _, _, failure in collected if failure]
    assert not failures, failures[0]
    return [result for _, result, _ in sorted(collected, key=lambda item: item[0])]


def start_trainer(
    arguments: Sequence[str],
    *,
    rank: int = 0,
    world: int = 1,
    port: int = 0,
    before: Callable[[int], None] | None = None,
) -> BaseProcess:
    """`python -m pipeline train ARGUMENTS` in a process of its own, as one rank of `world`.

    `before` is called there first, with the rank: it may break something.
    """
    process = CONTEXT.Process(target=_train, args=(list(arguments), rank, world, port, dict(os.environ), before))
    process.start()
    return process


def train(
    arguments: Sequence[str],
    *,
    world: int = 1,
    before: Callable[[int], None] | None = None,
    wait_s: float = WAIT_S,
) -> int:
    """Train to the end on `world` ranks, and return the first exit code that is not 0."""
    port = free_port()
    ranks = [start_trainer(arguments, rank=rank, world=world, port=port, before=before) for rank in range(world)]
    return max((finish(process, wait_s) for process in ranks), key=abs)


def finish(process: BaseProcess, wait_s: float = WAIT_S) -> int:
    """Wait for a trainer; its exit code, negative for a signal."""
    process.join(wait_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the trainer was still running after {wait_s} s")
    return process.exitcode


def kill_at_step(arguments: Sequence[str], run: Path, step: int, number: int = signal.SIGKILL) -> int:
    """Start a trainer, send it a signal once its metrics show `step`, and return its exit code."""
    process = start_trainer(arguments)
    deadline = time.monotonic() + WAIT_S
    while last_step(run) < step:
        assert process.is_alive(), f"the trainer ended with {process.exitcode} before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached in {WAIT_S} s"
        time.sleep(0.002)
    os.kill(process.pid, number)
    return finish(process)


def last_step(run: Path) -> int:
    """The last whole line's step in a run's metrics, 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    return 0


def free_port() -> int:
    """A TCP port that nothing listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _in_group(
    function: Callable[..., Any], rank: int, world: int, port: int, results: Any, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        results.put((rank, function(rank, world, *args), None))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put((rank, None, traceback.format_exc()))
        raise


def _train(
    arguments: list[str],
    rank: int,
    world: int,
    port: int,
    variables: dict[str, str],
    before: Callable[[int], None] | None,
) -> None:
    os.environ |= variables  # the server that forks has those of its own start
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
    # As in a trainer started from a shell: loader processes are forked from it, and are its children.
    mp.set_start_method("fork", force=True)
    from pipeline.__main__ import main

    if before:
        before(rank)
    sys.exit(main(["train", *arguments]))

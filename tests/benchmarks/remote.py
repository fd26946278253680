"""Streaming from a server of this machine: the rate once warm, the first batch when cold, and after a resume.

    python -m tests.benchmarks.remote --photos DIR [--rounds 3] [--count 4096] [--latency 0.1]

- warm: photos a second from copies of an HTTP server's tars, beside those from tars on disk, with two processes; the
  median of the rounds' ratios.
- cold: with a latency added to each answer and an empty cache, the seconds to the first batch and the shards that the
  server was asked for until then, by lanes.
- resume: with a warm cache, the seconds from opening the tars to the first batch, at several steps. What Python takes
  to import its libraries is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.data.cache import Cache
from pipeline.data.loader import Augmentation, Stream
from pipeline.data.plan import Plan, Share, layout
from pipeline.data.store import ShardStore
from pipeline.data.tars import open_tars
from pipeline.tokenizer import OpenClipTokenizer
from tests.benchmarks.loading import BATCH, OURS, PASSES, build, rate
from tests.benchmarks.preparation import described
from tests.servers import serving

AUGMENTATION = Augmentation((224, 224), (0.9, 1.0), "bicubic", 0.0, {"captions": 1.0})
LIMIT = 1 << 36
LATE = (0, 100, 10_000, 1_000_000, 100_000_000)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.remote", description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of real photos, JPEG, in any depth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4096, help="photos to cut from them, several from one if need be")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds that the server waits before each answer")
    options = parser.parse_args(argv)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = build(options.photos, options.count, folder, per_shard=128)
        with served(data, 0.0) as address:
            warm(data, address, folder / "cache", options.rounds, PASSES * options.count // BATCH, console)
            late(address, folder / "cache", console)
        with served(data, options.latency) as address:
            cold(address, folder / "cold", options.latency, console)
    return 0


def warm(data: Path, address: str, cache: Path, rounds: int, batches: int, console: Console) -> None:
    here = Path(sys.executable)
    rate(OURS, address, 16, "fast", cache, python=here)  # fetches
    results: dict[str, list[float]] = {"disk": [], "server": []}
    for number in range(rounds):
        for name in list(results) if number % 2 == 0 else reversed(results):
            place = data if name == "disk" else address
            results[name].append(rate(OURS, place, batches, "fast", cache, python=here))
    ratios = [server / disk for disk, server in zip(results["disk"], results["server"], strict=True)]
    table = Table("", "photos/s", "by round", box=None)
    for name, rates in results.items():
        table.add_row(name, *described(rates, ".0f"))
    table.add_row("server / disk", *described(ratios, ".3f"))
    console.print(table)


def first_batch(address: str, cache: Path, step: int, lanes: int | None = None) -> tuple[float, Plan]:
    """Seconds from opening the tars to the first batch of `step`, and the plan."""
    tokenize = OpenClipTokenizer(77)
    began = time.perf_counter()
    tars = open_tars(address, Cache(cache, LIMIT))
    tars.check()
    sizes = tars.shards.numbers("samples")
    found, window = layout(sizes.sum(), len(sizes), BATCH, 1, at_hand=tars.at_hand)
    plan = Plan([Share(tars.fingerprint, sizes)], 0, BATCH, lanes or found, window)
    store = ShardStore([tars], Cache(cache, LIMIT))
    store.bring(plan.shards(step, 0, BATCH, ahead=0))
    with Stream(plan, store, AUGMENTATION, tokenize, 77, (0, BATCH), range(step, step + 4), workers=2) as stream:
        next(iter(stream))
        return time.perf_counter() - began, plan


def late(address: str, cache: Path, console: Console) -> None:
    table = Table("resume at step", "seconds to its batch", box=None)
    for step in LATE:
        table.add_row(f"{step:,}", f"{first_batch(address, cache, step)[0]:.2f}")
    console.print(table)


def cold(address: str, cache: Path, latency: float, console: Console) -> None:
    table = Table("lanes", "shards of the first batch", "a lane", "seconds to the first batch", box=None)
    for lanes in (1, 2, 4):
        shutil.rmtree(cache, ignore_errors=True)
        seconds, plan = first_batch(address, cache, 0, lanes)
        needed = len(plan.shards(0, 0, BATCH, ahead=0))
        table.add_row(str(lanes), str(needed), f"{needed / lanes:g}", f"{seconds:.2f}")
    console.print(f"cold cache, {1000 * latency:.0f} ms before each answer:")
    console.print(table)


@contextmanager
def served(folder: Path, latency_s: float) -> Iterator[str]:
    """The address of a folder's server in a process of its own, which takes no time from what is measured."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(folder, latency_s, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def serve(folder: Path, latency_s: float, connection: Any) -> None:
    with serving(folder) as server:
        server.latency_s = latency_s
        connection.send(server.url)
        time.sleep(1e6)


if __name__ == "__main__":
    sys.exit(main())

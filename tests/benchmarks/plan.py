"""The order of samples at the scale of the largest data: what nodes fetch, what a plan takes, how long a seek lasts.

    python -m tests.benchmarks.plan [--shards 1000000] [--nodes 128] [--batch 32768]

Pure simulation, no data: ten billion samples in a million shards of unequal size, on 128 nodes of 8 ranks.

- read amplification: what all nodes fetch in an epoch over the data's size. Every rank asks its plan every half window
  which shards it needs; a node's ranks share a cache of three windows a rank, whose longest unused shards go first.
- memory: what a fresh process gains by a plan, by the table of its shards, and by drawing.
- seek: from nothing to the batch of a step, the longest of many in the first ten epochs.
- world sizes: the ranks' shares joined, for 1 to 1,000 ranks, against the global batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from data_prep.manifest import Shards
from pipeline.data import plan as planning
from pipeline.data.plan import Plan, Share, layout, rank_bounds

RANKS_PER_NODE = 8
SAMPLE_BYTES = 40_000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32_768)
    options = parser.parse_args(argv)
    ranks, console = options.nodes * RANKS_PER_NODE, Console()
    context = mp.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        found: dict[str, Any] = pool.apply(memory, (options.shards, options.batch, ranks))
    plan = plan_of(options.shards, options.batch, ranks)
    found |= {"samples": plan.samples, "shards": options.shards, "ranks": ranks, "lanes": plan.lanes}
    found |= {"window": plan.window, "seek_s_longest_of_100": max(seek(plan, number) for number in range(100))}
    found["world_sizes_alike"] = alike(plan)
    for nodes in (options.nodes, options.nodes // 2, options.nodes * 15 // 16):
        found[f"read_amplification_{nodes}_nodes"] = amplification(plan, nodes)
    mixed = plan_of(options.shards, options.batch, ranks, weights=(4, 1))
    found[f"read_amplification_{options.nodes}_nodes_mixed_4_1"] = amplification(mixed, options.nodes)
    console.print_json(json.dumps(found))
    return 0


def sizes_of(shards: int) -> NDArray[np.int64]:
    """Samples of each shard: 10,000 on average, as img2dataset leaves them when some downloads fail."""
    return np.random.default_rng(0).integers(9_000, 11_001, shards)


def plan_of(shards: int, batch: int, ranks: int, weights: Sequence[int] = (1,)) -> Plan:
    """All shards as one dataset, or dealt to several by their weights."""
    sizes = sizes_of(shards)
    lanes, window = layout(sizes.sum(), shards, batch, ranks, at_hand=False)
    parts = np.split(sizes, np.cumsum(weights)[:-1] * shards // sum(weights))
    shares = [
        Share(f"{number}", part, weight) for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
    ]
    return Plan(shares, 0, batch, lanes, window)


def memory(shards: int, batch: int, ranks: int) -> dict[str, float]:
    """Megabytes that a plan takes, once it has drawn in two epochs, and the table of its shards."""
    import pyarrow as pa

    before = resident()
    names = [f"train/{number:07d}.tar" for number in range(shards)]
    hashes = [f"{number:064x}" for number in range(shards)]
    sizes = sizes_of(shards)
    columns = {"split": ["train"] * shards, "name": names, "bytes": sizes * SAMPLE_BYTES, "sha256": hashes}
    table = Shards(pa.table(columns | {"samples": sizes, "captions": sizes}))
    taken_by_table = table.table.nbytes / 1e6
    del names, hashes, columns, table, sizes
    pa.default_memory_pool().release_unused()
    before = max(before, resident())
    plan = plan_of(shards, batch, ranks)
    bounds = rank_bounds(batch, ranks)
    rank = ranks // 2
    for step in (0, 1, plan.first_step(1) // 3, plan.first_step(1) - 1, plan.first_step(1), plan.first_step(1) + 100):
        plan.draw(step, bounds[rank], bounds[rank + 1])
        plan.shards(step, bounds[rank], bounds[rank + 1])
    return {"plan_mb": resident() - before, "shard_table_mb": taken_by_table}


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def seek(plan: Plan, number: int) -> float:
    """Seconds to one rank's share of a step, by a plan that is new."""
    rank, step = random.Random(number).randrange(1024), random.Random(number).randrange(10 * plan.first_step(1))
    bounds = rank_bounds(plan.global_batch, 1024)
    began = time.perf_counter()
    fresh = Plan(plan.datasets, plan.seed, plan.global_batch, plan.lanes, plan.window, plan.tail)
    fresh.draw(step, bounds[rank], bounds[rank + 1])
    return time.perf_counter() - began


def alike(plan: Plan) -> int:
    """How many world sizes of 1 to 1,000 give the same global batch, at a step that is another for each."""
    same, planning.KEPT = 0, 1 << 30  # one process stands for all ranks
    steps = random.Random(0).sample(range(plan.first_step(2)), 8)
    batches = {step: plan.global_ids(step) for step in steps}
    for world in track(range(1, 1001), "world sizes", console=Console(stderr=True)):
        step = steps[world * len(steps) // 1001]  # neighbours share a step, and so its windows
        parts = [plan.draw(step, begin, end).ids for begin, end in pairwise(rank_bounds(plan.global_batch, world))]
        same += np.array_equal(np.concatenate(parts), batches[step])
    return same


def amplification(plan: Plan, nodes: int) -> float:
    """Bytes that all nodes fetch in an epoch, over the bytes of the data."""
    bounds, ranks = rank_bounds(plan.global_batch, nodes * RANKS_PER_NODE), nodes * RANKS_PER_NODE
    sizes = np.concatenate([np.asarray(share.sizes) for share in plan.datasets])
    limit = 3 * RANKS_PER_NODE * plan.window
    stride = max(1, plan.window * plan.lanes // plan.global_batch // 2)
    fetched = 0
    for node in track(range(nodes), f"{nodes} nodes", console=Console(stderr=True)):
        cache, taken = OrderedDict[int, int](), 0
        first, last = node * RANKS_PER_NODE, min((node + 1) * RANKS_PER_NODE, ranks)
        for step in range(0, plan.first_step(1), stride):
            for shard in plan.shards(step, bounds[first], bounds[last], ahead=0):
                if shard in cache:
                    cache.move_to_end(shard)
                    continue
                cache[shard] = int(sizes[shard])
                taken += cache[shard]
                fetched += cache[shard]
                while taken > limit:
                    taken -= cache.popitem(last=False)[1]
    return round(fetched / int(sizes.sum()), 4)


if __name__ == "__main__":
    sys.exit(main())

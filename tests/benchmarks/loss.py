"""The loss beside open_clip's: time, memory, and over ranks the bytes that they send each other.

    python -m tests.benchmarks.loss [--pairs 32768] [--ranks 2]

One rank: forward and backward at N × 512, ours and open_clip.loss.ClipLoss in turn, each in a process of its own with
two threads; memory is the peak of the resident set above what it was before. Several ranks (gloo, a thread each, a
quarter of the pairs): ours, which recomputes its block of columns; the same with a reduce-scatter of the texts'
gradients in its place; and open_clip's with local_loss and gather_with_grad. Bytes are those that the loopback
interface carried, so run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.loss import info_nce as module
from pipeline.loss.info_nce import info_nce
from pipeline.loss.tiles import Pairs
from tests.processes import CONTEXT, run_ranks

WIDTH, SCALE = 512, 1 / 0.07
NAMES = {
    "ours": "ours",
    "scatter": "ours, with a reduce-scatter",
    "open_clip": "open_clip (over ranks: local_loss, gather_with_grad)",
}


class Scattered(module._InfoNCE):
    """The other choice: each rank makes its part of all texts' gradients, and they are summed over ranks."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_BD, scale, slope_B, row_B, column_B, *tensors = ctx.saved_tensors
        every = Pairs(*tensors, *ctx.place)
        column_N = module.gather(column_B, ctx.sizes)
        weight = grad / (2 * len(column_N))
        pull_image_BD, pull_text_ND = torch.zeros_like(image_BD), torch.zeros_like(every.text_ND)
        for rows, columns, logit_RC in every.tiles(scale):
            weight_RC = module._weights(logit_RC, row_B[rows], column_N[columns])
            pull_image_BD[rows] += weight_RC @ every.text_ND[columns]
            pull_text_ND[columns] += weight_RC.T @ every.image_ND[rows]
        pull_text_BD = torch.empty_like(text_BD)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(pull_text_BD, pull_text_ND)
        pull_image_BD -= slope_B[:, None] * text_BD
        pull_text_BD -= slope_B[:, None] * image_BD
        scale_grad = weight * (image_BD * pull_image_BD).sum()
        return (weight * scale) * pull_image_BD, (weight * scale) * pull_text_BD, scale_grad, *[None] * 5


def loss_named(name: str, rank: int, world: int) -> Any:
    if name == "open_clip":
        from open_clip.loss import ClipLoss

        return ClipLoss(local_loss=world > 1, gather_with_grad=world > 1, rank=rank, world_size=world)
    if name == "scatter":
        return lambda image, text, scale: Scattered.apply(image, text, scale, False, None, False, None, None)
    return info_nce


def unit_rows(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(SCALE, requires_grad=True)


def one_rank(name: str, count: int, results: Any) -> None:
    """Seconds of the second of two rounds, and the peak of both in bytes."""
    torch.set_num_threads(2)
    loss, process = loss_named(name, 0, 1), psutil.Process()
    loss(*unit_rows(64, 0)).backward()
    inputs = unit_rows(count, 0)
    before, peak, ended = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        began = time.perf_counter()
        value = loss(*inputs)
        value.backward()
        seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    results.put((seconds, peak[0] - before, value.item()))


def on_ranks(rank: int, world: int, count: int, rounds: int) -> dict[str, tuple[float, float]]:
    """For each loss (seconds, bytes on the wire over all ranks) a step."""
    inputs = unit_rows(count // world, rank)
    figures = {}
    for name in NAMES:
        loss = loss_named(name, rank, world)
        loss(*inputs).backward()
        dist.barrier()
        sent, began = carried(), time.perf_counter()
        for _ in range(rounds):
            loss(*inputs).backward()
        dist.barrier()
        figures[name] = (time.perf_counter() - began) / rounds, (carried() - sent) / rounds
    return figures


def carried() -> int:
    """Bytes that the loopback interface has sent."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()

    table = Table("loss, one rank", "seconds", "of open_clip's", "MB more", "of open_clip's", "value", box=None)
    single = {}
    for name in ("open_clip", "ours"):
        results = CONTEXT.SimpleQueue()
        process = CONTEXT.Process(target=one_rank, args=(name, options.pairs, results))
        process.start()
        single[name] = results.get()
        process.join()
        seconds, memory, value = single[name]
        reference = single["open_clip"]
        table.add_row(
            f"{NAMES[name]}, {options.pairs} pairs",
            f"{seconds:.1f}",
            f"{seconds / reference[0]:.2f}",
            f"{memory / 1e6:.0f}",
            f"{memory / reference[1]:.3f}",
            f"{value:.6f}",
        )
    Console().print(table)

    count = options.pairs // 4
    table = Table(f"loss, {options.ranks} ranks", "seconds", "of open_clip's", "MB sent", "of open_clip's", box=None)
    figures = run_ranks(options.ranks, on_ranks, count, 3)[0]
    for name, (seconds, sent) in figures.items():
        slowest, most = figures["open_clip"]
        table.add_row(
            f"{NAMES[name]}, {count} pairs",
            f"{seconds:.2f}",
            f"{seconds / slowest:.2f}",
            f"{sent / 1e6:.1f}",
            f"{sent / most:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

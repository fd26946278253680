"""Pairs a second of the trainer: beside a bare loop of torch, and beside open_clip's trainer.

    python -m tests.benchmarks.trainer --photos DIR [--rounds 5] [--count 2048] [--only loop|tars]

The loop: `pipeline.train.train` with metrics.jsonl and TensorBoard on, its Stream replaced by batches from memory,
against forward, loss, backward and optimizer step on the same batches, with the same towers, loss and optimizer, and
nothing else (no clipping of gradients either). Both take turns in one process, STEPS steps each.

From tars: photos cut from the JPEGs below DIR, as in tests.benchmarks.loading. `python -m pipeline train` against
open_clip_train.main on the same tars with the same towers, tokenizer, batch and optimizer, in float32, without
evaluation; the time between two steps of one run, starts and checkpoints left out. One loader process and one thread
each. One round is each trainer once.

A ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from unittest import mock

from rich.console import Console
from rich.table import Table

from tests import peers
from tests.benchmarks.loading import build
from tests.benchmarks.preparation import described

BATCH, WORKERS, THREADS = 64, 1, 1
# Steps of a turn, and those before the clock starts.
STEPS, WARM = 10, 10
PER_SHARD = 256
BATCHES = 4
# Processor seconds tell what other programs running at the same time hide.
CLOCKS = {"pairs/s": time.perf_counter, "pairs a CPU second": time.process_time}


def vit(width: int, layers: int) -> dict[str, Any]:
    """open_clip's model_cfg: a ViT of 224 / 32, and a text tower of half as many layers with open_clip's vocabulary."""
    return {
        "embed_dim": width,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": width, "layers": layers, "head_width": 32},
        "text_cfg": {"context_length": 32, "width": width, "heads": width // 32, "layers": max(1, layers // 2)},
    }


# The second is so small that a loader process has no rest.
MODELS = {"width 192, 4 layers": vit(192, 4), "width 64, 1 layer": vit(64, 1)}
OPTIM = {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2, "warmup_steps": 10, "clip_norm": 1.0}

# sys.argv: answer, model's file, arguments. The answer is when each step was done.
OPEN_CLIP = """
import json, sys, time
import open_clip
import torch
from open_clip_train.main import main

done, step = [], torch.optim.AdamW.step

def timed(self, *arguments, **named):
    result = step(self, *arguments, **named)
    done.append(time.perf_counter())
    return result

torch.optim.AdamW.step = timed
open_clip.add_model_config(sys.argv[2])
main(sys.argv[3:])
json.dump(done, open(sys.argv[1], "w"))
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of real photos, JPEG, in any depth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=2048, help="photos to cut from them, several from one if need be")
    parser.add_argument("--only", choices=PARTS, help="one of the two comparisons")
    options = parser.parse_args(argv)
    peers.install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(options.photos, options.count, folder, PER_SHARD)
        for part in [options.only] if options.only else PARTS:
            for model_name in MODELS:
                PARTS[part](model_name, options.rounds, folder)
    return 0


def recipe(model_name: str, folder: Path, steps: int) -> dict[str, Any]:
    """A recipe's plain values."""
    return {
        "model": {"config": MODELS[model_name]},
        "data": {"datasets": str(folder / "data"), "workers": WORKERS, "cache": str(folder / "cache")},
        "optim": OPTIM,
        "train": {"steps": steps, "batch_size": BATCH, "threads": THREADS, "device": "cpu"},
        "checkpoint": {"every_steps": steps},
    }


# --- The loop


def beside_a_bare_loop(model_name: str, rounds: int, folder: Path) -> None:
    """In a process of its own, as a trainer's."""
    answer = folder / "loop.json"
    command = ["-c", "import sys; from tests.benchmarks.trainer import take_turns; take_turns(*sys.argv[1:])"]
    run([sys.executable, *command, model_name, str(rounds), str(folder), str(answer)])
    for unit, results in json.loads(answer.read_text()).items():
        report(f"loop, {model_name}", results, "bare loop", unit)


def take_turns(model_name: str, rounds: str, folder: str, answer: str) -> None:
    """Train `rounds` turns of STEPS steps, with as many of the bare loop before or behind each."""
    from pipeline import config, train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: dict[str, dict[str, list[float]]] = {unit: {"ours": [], "bare loop": []} for unit in CLOCKS}
    steps = WARM + int(rounds) * STEPS + 1  # at the last one the turn before it ends
    values = config.parse(recipe(model_name, Path(folder), steps), "the benchmark")
    bare = bare_step(values)

    @contextlib.contextmanager
    def turn(name: str) -> Iterator[None]:
        began = {unit: clock() for unit, clock in CLOCKS.items()}
        yield
        for unit, clock in CLOCKS.items():
            results[unit][name].append(STEPS * BATCH / (clock() - began[unit]))

    class FromMemory:
        """In place of the loader: batches from memory, and the bare loop's turns between them."""

        def __init__(self, *_: object, **__: object) -> None:
            self._batches = itertools.cycle(batches(MODELS[model_name]))

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def memory(self) -> int:
            return 0

        def __iter__(self) -> Iterator[Any]:
            yield from itertools.islice(self._batches, WARM)
            for _ in range(WARM):
                bare(next(self._batches))
            for number in range(int(rounds)):
                # There and back again, so that who comes first does not matter.
                if number % 2 == 0:
                    self._bare_turn()
                with turn("ours"):
                    yield from itertools.islice(self._batches, STEPS)
                if number % 2:
                    self._bare_turn()
            yield next(self._batches)

        def _bare_turn(self) -> None:
            with turn("bare loop"):
                for batch in itertools.islice(self._batches, STEPS):
                    bare(batch)

    with mock.patch.object(train, "Stream", FromMemory):
        train.train(values, Path(folder) / "runs" / "loop" / model_name)
    Path(answer).write_text(json.dumps(results))


def batches(model_cfg: dict[str, Any]) -> list[Any]:
    """Some of the loader's batches, with nothing in them."""
    import torch

    from pipeline.data.loader import Batch

    random = torch.Generator().manual_seed(0)
    size, length = model_cfg["vision_cfg"]["image_size"], model_cfg["text_cfg"]["context_length"]
    made = []
    for number in range(BATCHES):
        image_BSSC = torch.randint(256, (BATCH, size, size, 3), dtype=torch.uint8, generator=random)
        token_BL = torch.randint(1, 49407, (BATCH, length), generator=random)
        id_B = torch.arange(BATCH) + BATCH * number
        made.append(Batch(image_BSSC.permute(0, 3, 1, 2), token_BL, id_B, id_B, []))
    return made


def bare_step(values: Any) -> Callable[[Any], None]:
    """Forward, loss, backward and update, and nothing else."""
    import torch

    from pipeline import begin, layers, model
    from pipeline.data.transforms import normalizer
    from pipeline.loss.info_nce import info_nce

    torch.set_num_threads(THREADS)
    towers = begin.make_towers(values, model.model_cfg("", values.model.config), pretrained=False)
    groups = layers.parameter_groups(towers, lr=values.optim.lr, weight_decay=values.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=values.optim.betas, eps=values.optim.eps, fused=True)
    normalize = normalizer(towers.visual.image_mean, towers.visual.image_std, torch.device("cpu"))
    towers.train()

    def step(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        # Brought into the towers' layout while a pixel is one byte.
        image_BD, text_BD, scale = towers(normalize(batch.image_BCSS.contiguous()), batch.token_BL)
        info_nce(image_BD, text_BD, scale).backward()
        optimizer.step()

    return step


# --- From tars


def beside_open_clip(model_name: str, rounds: int, folder: Path) -> None:
    results: dict[str, list[float]] = {"ours": [], "open_clip_train": []}
    contestants = {"ours": ours, "open_clip_train": open_clip_train}
    steps = WARM + 4 * STEPS
    for number in range(rounds):
        for name in list(contestants) if number % 2 == 0 else reversed(contestants):
            done = contestants[name](recipe(model_name, folder, steps), folder, folder / f"runs/{model_name}/{number}")
            assert len(done) == steps, f"{name} did {len(done)} steps of {steps}"
            results[name].append((steps - WARM) * BATCH / (done[-1] - done[WARM - 1]))
    report(f"from tars, {model_name}", results, "open_clip_train")


def ours(values: dict[str, Any], folder: Path, logs: Path) -> list[float]:
    """When each step was done, in seconds."""
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "recipe.yaml").write_text(json.dumps(values))  # which is YAML too
    run([sys.executable, "-m", "pipeline", "train", str(logs / "recipe.yaml"), str(logs / "ours")])
    return [json.loads(line)["wall_s"] for line in (logs / "ours/metrics.jsonl").read_text().splitlines()]


def open_clip_train(values: dict[str, Any], folder: Path, logs: Path) -> list[float]:
    """When each step was done, in seconds. All steps are of one pass, for each makes its loader begin anew."""
    shards = len(list((folder / "data/train").glob("*.tar")))
    pattern = f"{folder}/data/train/{{00000..{shards - 1:05d}}}.tar"
    samples = sum(json.loads((folder / "data/train/sizes.json").read_text()).values())
    wanted = values["train"]["steps"] * BATCH
    model_file = folder / "benchmarked.json"
    model_file.write_text(json.dumps(values["model"]["config"]))
    options = {
        **{"train-data": "::".join([pattern] * -(-wanted // samples)), "train-num-samples": wanted},
        **{"dataset-type": "webdataset", "batch-size": BATCH, "workers": WORKERS, "epochs": 1},
        **{"lr": OPTIM["lr"], "beta1": 0.9, "beta2": 0.98, "eps": OPTIM["eps"], "wd": OPTIM["weight_decay"]},
        **{"warmup": OPTIM["warmup_steps"], "grad-clip-norm": OPTIM["clip_norm"], "log-every-n-steps": 50},
        **{"model": model_file.stem, "device": "cpu", "precision": "fp32", "report-to": "tensorboard"},
        **{"logs": logs, "name": "open_clip", "save-frequency": 0},
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return peers.ask(OPEN_CLIP, model_file, *words, variables={"OMP_NUM_THREADS": str(THREADS)})  # type: ignore[no-any-return]


def run(command: Sequence[str]) -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(
        command, cwd=peers.ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}"


PARTS: dict[str, Callable[[str, int, Path], None]] = {"loop": beside_a_bare_loop, "tars": beside_open_clip}


def report(title: str, results: dict[str, list[float]], other: str, unit: str = "pairs/s") -> None:
    ratios = [own / its for own, its in zip(results["ours"], results[other], strict=True)]
    table = Table(title, unit, "by round", box=None)
    for name, rates in results.items():
        table.add_row(name, *described(rates, ".1f"))
    table.add_row(f"ours / {other}", *described(ratios, ".3f"))
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())

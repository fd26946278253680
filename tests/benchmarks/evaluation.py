"""An evaluation from start to end: ours with exact and with fast pixels, and CLIP_benchmark's command.

    python -m tests.benchmarks.evaluation --photos DIR [--rounds 3] [--count 4096] [--model …] [--set …] [--amp]

Photos of 640 × 480, JPEG quality 90, are cut from the JPEGs below DIR, and built into a classification set (CLASSES
classes in turn, seven prompts each) and, a quarter of them, into a retrieval set (five captions of 8 to 14 words). Each
model, its weights as they are initialised, is measured on each set by each contestant's command, in processes of its
own: float32 (CLIP_benchmark's --no_amp), THREADS threads, two loader processes, CLIP_benchmark's batches of 64, nothing
cached. Start and end are counted. One round is every contestant once; a ratio is the median of the rounds'.

With --amp CLIP_benchmark is also measured as it is by default, in bfloat16, which CPUs without it only imitate.

What fast pixels change is told too: the largest difference of a figure, and the share of rows (a photo's or a
caption's hit or rank) that differ, which depends less on what a model has learned.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import peers
from tests.benchmarks.loading import WORDS
from tests.benchmarks.preparation import Cost, cut, described, timed

WORKERS, THREADS, CLASSES = 2, 2, 100
TEMPLATES = ["a photo of a {c}.", "a bad photo of the {c}.", "an origami {c}.", "a photo of the large {c}."]
TEMPLATES += ["a {c} in a video game.", "art of the {c}.", "a photo of the small {c}."]
# Of the retrieval set; its captions take longer than its photos.
SHARE_OF_PAIRS = 4
SMALL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 192, "layers": 4, "head_width": 64},
    "text_cfg": {"width": 192, "heads": 3, "layers": 4},
}
# ViT-S-32 is open_clip's: twelve layers of width 384 in both towers.
MODELS = {"small": SMALL, "ViT-S-32": None}
SETS = {"objects": "objects", "pairs": "coco_karpathy_test"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of real photos, JPEG, in any depth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4096, help="photos to cut from them, several from one if need be")
    parser.add_argument("--model", choices=MODELS, action="append", help="by default all")
    parser.add_argument("--set", choices=SETS, action="append", help="by default all")
    parser.add_argument("--amp", action="store_true", help="also CLIP_benchmark in bfloat16, its default")
    options = parser.parse_args(argv)
    peers.install()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(options.photos, options.count, folder)
        for model in options.model or MODELS:
            initialised(model, folder / model)
            for dataset in options.set or SETS:
                images = options.count if dataset == "objects" else options.count // SHARE_OF_PAIRS
                costs = compare(folder / model, SETS[dataset], options.rounds, options.amp, folder)
                console.print(report(f"{model}, {dataset}, {images} photos", costs))
                console.print(difference(folder / "ours, exact", folder / "ours, fast", SETS[dataset]))
    return 0


def build(source: Path, count: int, folder: Path) -> None:
    """The two evaluation sets, in `folder/data`."""
    from data_prep.__main__ import main as data_prep

    photos, words = cut(source, folder / "photos", count), random.Random(0)
    for number, photo in enumerate(photos):
        place = folder / "images/objects" / f"object {number % CLASSES}" / photo.name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(photo, place)
    (folder / "images/objects/templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    images = []
    for number, photo in enumerate(photos[::SHARE_OF_PAIRS]):
        captions = [" ".join(words.choices(WORDS.split(), k=words.randint(8, 14))) for _ in range(5)]
        place = folder / "pairs/val2014" / photo.name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(photo, place)
        about = {"filepath": "val2014", "filename": photo.name, "cocoid": number, "split": "test"}
        images.append({**about, "sentences": [{"raw": caption} for caption in captions]})
    (folder / "pairs/dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    sources = [f"images={folder / 'images'}", f"coco_karpathy={folder / 'pairs'}"]
    assert data_prep(["build", *sources, "--out", str(folder / "data")]) == 0


def initialised(name: str, folder: Path) -> None:
    """A folder that open_clip loads as local-dir."""
    import open_clip
    import torch

    torch.manual_seed(0)
    config = MODELS[name] or open_clip.get_model_config(name)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")


def compare(model: Path, dataset: str, rounds: int, amp: bool, folder: Path) -> dict[str, list[Cost]]:
    """What each contestant takes, by round; ours leave their figures in `folder`."""
    variables = peers.environment() | {"OMP_NUM_THREADS": str(THREADS)}

    def ours(transform: str) -> Cost:
        out = folder / f"ours, {transform}"
        shutil.rmtree(out, ignore_errors=True)
        options = ["--data", folder / "data", "--set", dataset, "--transform", transform, "--out", out]
        return timed([sys.executable, "-m", "pipeline", "evaluate", str(model), *map(str, options)], variables)

    def theirs(*options: str) -> Cost:
        command = peers.clip_benchmark(model, folder / "data/eval" / dataset, folder / "theirs.json")
        return timed([*command, "--num_workers", str(WORKERS), *options], variables)

    contestants: dict[str, Callable[[], Cost]] = {
        "ours, exact": lambda: ours("exact"),
        "ours, fast": lambda: ours("fast"),
        "CLIP_benchmark": lambda: theirs("--no_amp"),
    }
    if amp:
        contestants["CLIP_benchmark, bfloat16"] = theirs
    results: dict[str, list[Cost]] = {name: [] for name in contestants}
    for number in range(rounds):
        # There and back again, so that who comes first does not matter.
        for name in list(contestants) if number % 2 == 0 else reversed(contestants):
            results[name].append(contestants[name]())
    return results


def report(title: str, results: dict[str, list[Cost]]) -> Table:
    """Seconds by the clock and of processor, and × CLIP_benchmark's speed."""
    table = Table(title, "s", "by round", "CPU s", "× its speed", "by round", "× its CPU", box=None)
    for name, costs in results.items():
        pairs = list(zip(costs, results["CLIP_benchmark"], strict=True))
        table.add_row(
            name,
            *described([cost.wall for cost in costs], ".1f"),
            described([cost.processor for cost in costs], ".1f")[0],
            *described([its.wall / own.wall for own, its in pairs], ".2f"),
            described([its.processor / own.processor for own, its in pairs], ".2f")[0],
        )
    return table


def difference(exact: Path, fast: Path, dataset: str) -> str:
    """What fast pixels change."""
    from pipeline.evaluate.result import read_rows

    figures = [json.loads((folder / f"{dataset}.json").read_text())["metrics"] for folder in (exact, fast)]
    shares = [name for name in figures[0] if "@" in name or "acc" in name or "per_class" in name]
    largest = max(shares, key=lambda name: abs(figures[0][name] - figures[1][name]))
    rows = [read_rows(folder / f"{dataset}.parquet") for folder in (exact, fast)]
    counts = [(sum(rows[0][name].values != rows[1][name].values), len(rows[0][name].values)) for name in shares]
    changed, of = (sum(column) for column in zip(*counts, strict=True))
    return (
        f"fast - exact: at the most {100 * (figures[1][largest] - figures[0][largest]):+.2f} points, in {largest}; "
        f"{changed} of {of} rows differ"
    )


if __name__ == "__main__":
    sys.exit(main())

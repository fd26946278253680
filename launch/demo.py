"""The whole road on generated data, stage after stage, each started as a user would start it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.job import LaunchError

IMAGES = 24_000
VOCABULARY = 256
MARKER = "demo.json"

# Evaluation sets that the summary quotes.
UNSEEN, SEEN, RETRIEVAL = "sample_unseen_test", "sample_seen_test", "flickr30k_test"


def demo(run: Path, seed: int, *, images: int = IMAGES, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run every stage into `run`, afresh, and write `run/summary.json` (contract 4).

    Raises:
        LaunchError: `run` holds something else, or a stage failed.
    """
    console = Console(stderr=True)
    start_afresh(run, seed)
    stages = list(commands(run, seed, images, settings))
    seconds: dict[str, float] = {}
    for number, (name, what, arguments) in enumerate(stages, start=1):
        console.rule(f"[bold]{number}/{len(stages)}  {name}[/]  {what}", align="left")
        console.print(f"[dim]python -m {' '.join(arguments)}[/]", soft_wrap=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *arguments]).returncode
        seconds[name] = round(time.monotonic() - began, 1)
        if code:
            raise LaunchError(f"stage {name} ended with exit code {code}; its message is above.")
    summary = summarize(run, seconds)
    (run / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    console.rule("[bold]Done[/]", align="left")
    Console().print(table(run, summary))
    return summary


def commands(run: Path, seed: int, images: int, settings: tuple[str, ...]) -> Iterator[tuple[str, str, list[str]]]:
    """(stage, what it does, arguments of `python -m`) in order."""
    raw, data, vocabulary = run / "raw", run / "data", run / "vocabulary.model"
    yield (
        "sample",
        "generated scenes in the layouts of COCO, Flickr30K and VQA",
        ["data_prep", "sample", str(raw), "--images", str(images), "--seed", str(seed)],
    )
    sources = (f"coco={raw}/mscoco", f"vqa={raw}/mscoco", f"flickr30k={raw}/flickr30k", f"images={raw}/images")
    yield (
        "data",
        "sources → verified, leak-free WebDataset shards and evaluation sets",
        ["data_prep", "build", *sources, "--out", str(data)],
    )
    yield (
        "tokenizer",
        "train captions → a SentencePiece vocabulary",
        ["data_prep", "vocabulary", str(data), "--out", str(vocabulary), "--size", str(VOCABULARY), "--type", "bpe"],
    )
    changes = [f"seed={seed}", f"tokenizer.path={vocabulary}", *settings]
    yield (
        "train",
        "shards → towers, by InfoNCE with a learnable temperature",
        ["pipeline", "train", "demo", str(run), "--data", str(data), *changes],
    )
    yield (
        "evaluate",
        "zero-shot classification and retrieval on held-out data",
        ["pipeline", "evaluate", str(run), "--data", str(data)],
    )
    yield "export", "an open_clip folder, proven equal to the checkpoint", ["pipeline", "export", str(run)]
    yield "report", "one page with curves, tables and pictures", ["pipeline", "report", str(run), "--data", str(data)]


def start_afresh(run: Path, seed: int) -> None:
    """Empty the folder of an earlier demo; refuse one that holds anything else."""
    if run.exists() and any(run.iterdir()):
        if not (run / MARKER).is_file():
            raise LaunchError(f"{run} is not empty and no demo wrote it. Choose another folder with RUN=… (--run).")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / MARKER).write_text(json.dumps({"seed": seed}), encoding="utf-8")


def summarize(run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Gather the figures that the stages wrote."""
    newest = (run / "checkpoints" / "LATEST").read_text(encoding="utf-8")
    unseen, seen, retrieval = (
        json.loads((run / "eval" / newest / f"{name}.json").read_text(encoding="utf-8"))
        for name in (UNSEEN, SEEN, RETRIEVAL)
    )
    parity = json.loads((run / "export" / "parity.json").read_text(encoding="utf-8"))
    return {
        "data": [str(run / "data")],
        "zero_shot": {
            "top1": unseen["metrics"]["acc1"],
            "seen_top1": seen["metrics"]["acc1"],
            "chance": unseen["chance"]["acc1"],
        },
        "retrieval": {name: value for name, value in retrieval["metrics"].items() if "_recall@" in name},
        "seconds": seconds,
        "export": {"parity": {name: figures["max_abs"] for name, figures in parity.items()}},
    }


def table(run: Path, summary: dict[str, Any]) -> Table:
    """What came out, and where it lies."""
    zero_shot, retrieval = summary["zero_shot"], summary["retrieval"]
    rows = Table(show_header=False, box=None)
    rows.add_row("zero-shot top-1, colour-shape pairs never trained on", f"{zero_shot['top1']:.3f}")
    rows.add_row("zero-shot top-1, pairs seen in training", f"{zero_shot['seen_top1']:.3f}")
    rows.add_row("chance", f"{zero_shot['chance']:.3f}")
    for way in ("image", "text"):
        recalls = [f"{retrieval[f'{way}_retrieval_recall@{k}']:.3f}" for k in (1, 5, 10)]
        rows.add_row(f"{way} retrieval R@1 / R@5 / R@10", " / ".join(recalls))
    for name, difference in summary["export"]["parity"].items():
        rows.add_row(f"export {name}: largest difference from the checkpoint", f"{difference:.1e}")
    rows.add_row("seconds", "  ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()))
    rows.add_row("", "")
    for what, path in (
        ("report", run / "report.html"),
        ("exported model", run / "export" / "open_clip"),
        ("checkpoints", run / "checkpoints"),
        ("shards", run / "data"),
        ("figures", run / "summary.json"),
    ):
        rows.add_row(what, str(path))
    return rows

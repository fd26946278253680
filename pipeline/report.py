"""A run as one HTML page: curves, tables, pictures, and what the model cannot do. No network is needed to read it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import jinja2
import numpy as np
from matplotlib import pyplot as plt
from safetensors import safe_open

from data_prep import manifest
from data_prep.manifest import Dataset
from data_prep.record import TRAIN, DataError
from pipeline import checkpoint as checkpoints
from pipeline import report_pictures
from pipeline import trained as loading
from pipeline.evaluate.pictures import address
from pipeline.evaluate.result import newest_results, result_files
from pipeline.evaluate.run import embedder_of, results_folder
from pipeline.evaluate.sources import find
from pipeline.evaluate.words import rows, verdicts
from pipeline.tracking import read_metrics

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
# Images whose words are shown, where none is asked for.
MAPPED = 3
# Buffers that open_clip's towers save beside their parameters.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def write_report(run: Path, data: Path | None, pairs: Sequence[str] = ()) -> Path:
    """Write RUN/report.html from what the run's stages left.

    Args:
        run: the run folder.
        data: a dataset that adds its counts, and pictures: best and worst retrievals, confused classes, word maps.
        pairs: keys of images whose words are shown; empty for some.

    Raises:
        DataError: there is no run there.
    """
    if not (run / "metrics.jsonl").is_file() or not (metrics := read_metrics(run)):
        raise DataError(f"{run}: looked for metrics.jsonl and found no step in it. Train the run first.")
    folder = newest_results(run)
    step = int(folder.name.removeprefix("step-")) if folder else None
    results = [json.loads(path.read_text(encoding="utf-8")) for path in result_files(folder)] if folder else []
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    parity = run / "export" / "parity.json"
    dataset = manifest.read(data) if data else None
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    html = page.render(
        name=run.resolve().name,
        facts=facts(run, metrics, environment),
        counts=counts(dataset, environment) if dataset else None,
        curves=curves(metrics),
        step=step,
        rows=[row for record in results for row in rows(record)],
        classes=[(record["dataset"], weakest_first(record)) for record in results if record.get("classes")],
        verdicts=verdicts(results),
        pictures=pictures(run, dataset, step, pairs) if dataset else None,
        parity=json.loads(parity.read_text(encoding="utf-8")) if parity.is_file() else {},
        recipe=(run / "config.yaml").read_text(encoding="utf-8"),
    )
    checkpoints.write_atomically(run / "report.html", html)
    log.info("%s", run / "report.html")
    return run / "report.html"


def facts(run: Path, metrics: Sequence[dict[str, Any]], environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The line of figures at the top."""
    last = metrics[-1]
    rates = [line["samples_per_s"] for line in metrics if line.get("samples_per_s")]
    figures = [
        ("step", f"{last['step']:,}"),
        ("pairs seen", f"{last['samples_seen']:,}"),
        ("train images", f"{environment['samples']:,}"),
        ("training time", f"{last['wall_s']:,.0f} s"),
        ("pairs / s", f"{np.median(rates):,.0f}" if rates else "–"),
        ("processes", str(environment["world_size"])),
        ("device", environment["devices"]),
    ]
    if steps := checkpoints.steps(run):
        figures.insert(1, ("parameters", f"{parameters(run, steps[0]):,}"))
    return figures


def parameters(run: Path, step: int) -> int:
    """How many numbers a checkpoint's model has learned, read from the weights' header."""
    path = run / "checkpoints" / checkpoints.folder_name(step) / "model.safetensors"
    with safe_open(str(path), "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if not name.endswith(BUFFERS)]  # noqa: SIM118
    return int(sum(np.prod(shape, dtype=np.int64) for shape in shapes))


def counts(dataset: Dataset, environment: dict[str, Any]) -> dict[str, Any]:
    """The dataset's splits, and what was read and dropped by source."""
    known = dataset.manifest["counts"]
    trained_on = TRAIN in dataset.manifest["splits"] and dataset.fingerprint(TRAIN) in environment["datasets"].values()
    return {
        "name": dataset.name,
        "trained_on": trained_on,
        "splits": dataset.manifest["splits"],
        # An image of two sources is dropped under both names, so there are names here that nothing was read from.
        "sources": [
            {
                "name": name,
                "read": known["read"].get(name),
                "dropped": ", ".join(f"{found:,} {why}" for why, found in known["dropped"].get(name, {}).items()),
            }
            for name in sorted(known["read"].keys() | known["dropped"].keys())
        ],
    }


def curves(metrics: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Loss and temperature as pictures: each step pale, their running mean strong."""
    steps = np.array([line["step"] for line in metrics])
    pictures = []
    for name, title in (("loss", "InfoNCE loss"), ("logit_scale", "logit scale (1 / temperature)")):
        values = np.array([np.nan if line[name] is None else line[name] for line in metrics], dtype=float)
        figure, axes = plt.subplots(figsize=(5.2, 2.9), layout="constrained")
        axes.plot(steps, values, color="#b8c7e6", linewidth=0.8)
        finite = np.isfinite(values)
        width = max(1, finite.sum() // 40)
        smooth = np.convolve(values[finite], np.ones(width) / width, mode="valid")
        axes.plot(steps[finite][width // 2 :][: len(smooth)], smooth, color="#2b59c3", linewidth=1.8)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        pictures.append({"title": title, "source": address(buffer.getvalue(), "png")})
    return pictures


def weakest_first(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes that have images, by accuracy."""
    return sorted((found for found in record["classes"] if found["images"]), key=lambda found: found["recall"])


def pictures(run: Path, dataset: Dataset, step: int | None, pairs: Sequence[str]) -> dict[str, Any]:
    """What is shown of single images, on a retrieval set (a test set, where there is one) and on all classifications.

    Args:
        run: the run folder.
        dataset: with evaluation sets.
        step: that was evaluated; None for the newest checkpoint.
        pairs: keys of images of the retrieval set whose words are shown; empty for some, evenly spread.
    """
    sources = find(dataset.path)
    by_name = {source.name: source for source in sources}
    found: dict[str, Any] = {"confusions": [], "retrieval": None, "maps": [], "step": step}
    folder = run / "eval" / checkpoints.folder_name(step or 0)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("confusion") and path.stem in by_name:
            confused = report_pictures.confusion(by_name[path.stem], record, folder)
            found["confusions"].append((path.stem, confused))
    retrieval = [source for source in sources if source.kind == "retrieval"]
    if not retrieval:
        return found
    source = max(retrieval, key=lambda source: (source.name.endswith("test"), source.name))
    trained = loading.load(run, step if step in checkpoints.steps(run) else None)
    found["step"] = trained.step
    found["retrieval"] = report_pictures.retrieval(source, embedder_of(trained, results_folder(trained)))
    items = source.items()
    if unknown := sorted(set(pairs) - {item.key for item in items}):
        raise DataError(f"--pair {unknown[0]}: {source.name} has no such image; its keys are {items[0].key} and so on.")
    evenly = np.linspace(0, len(items) - 1, min(MAPPED, len(items))).astype(int).tolist()
    chosen = [item for item in items if item.key in pairs] or [items[index] for index in evenly]
    found["maps"] = report_pictures.word_maps(trained, chosen, batch_size=trained.batch_size)
    return found

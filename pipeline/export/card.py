"""The model card: what a run knows of its data, its training, its results and their limits, and how to load the model.

Only what was recorded is said. Paths of the machine that trained are left out: of a file or folder the name stays.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import yaml

from data_prep import manifest
from data_prep.record import TRAIN, DataError
from pipeline import checkpoint as checkpoints
from pipeline import model
from pipeline.evaluate.result import result_files
from pipeline.evaluate.words import rows, verdicts
from pipeline.export import preparation
from pipeline.tracking import METRICS, read_metrics
from pipeline.trained import TrainedModel

NAME = "README.md"
UNKNOWN = "unknown"
TEMPLATE = "card.md.jinja"
# Shards whose tables are read to count licences.
TABLES = 1000
# COCO numbers them so (annotations/captions_*.json, `licenses`).
COCO_LICENCES = {
    "1": "CC BY-NC-SA 2.0",
    "2": "CC BY-NC 2.0",
    "3": "CC BY-NC-ND 2.0",
    "4": "CC BY 2.0",
    "5": "CC BY-SA 2.0",
    "6": "CC BY-ND 2.0",
    "7": "no known copyright restrictions",
    "8": "United States Government work",
}
# Task of a result → what is not known without it.
TASKS = {
    "zeroshot_classification": "zero-shot classification",
    "zeroshot_retrieval": "retrieval",
    "zeroshot_vqa": "answers to questions",
    "image_caption_selection": "whether right captions are told from wrong ones",
    "linear_probe": "frozen features (`pipeline probe`)",
    "perturbed_retrieval": "whether the order of a caption's words counts (`evaluate --perturb`)",
    "memorisation": "whether train pairs are matched better than held-out ones (`evaluate --memorisation`)",
}
GROUPS = "differences between groups of images (`evaluate --by`)"
ALWAYS = ("texts in other languages than the sets' above", "harm that comes of what the data show, or leave out")


def write(trained: TrainedModel, name: str, library: str, parity: Mapping[str, Any], license: str = UNKNOWN) -> str:
    """The card of an export that has been proven equal: Markdown, headed by the YAML that model hubs read.

    Args:
        trained: the checkpoint.
        name: the format, whose snippet is shown.
        library: what hubs call the one that loads it.
        parity: its figures.
        license: of the weights, as hubs name it.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        license=license,
        library_name=library,
        tags=["clip", name],
        pipeline_tag="zero-shot-image-classification",
    )
    environment = _read(trained.run / "environment.json")
    records = results(trained, average=parity["weights"] == "average")
    settings = _without_places(trained.recipe.model_dump(mode="json"))
    prepared = preparation.about(trained)
    height, width = prepared["image"]["size"]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        autoescape=False,  # this is Markdown
    )
    snippet = page.get_template(f"snippets/{name}.py.jinja").render(
        square=height == width,
        interpolation=prepared["image"]["interpolation"],
        tokenizer=prepared["text"]["tokenizer"],
    )
    return page.get_template(TEMPLATE).render(
        metadata=metadata.to_yaml().strip(),
        name=trained.run.resolve().name,
        weights=_weights(parity),
        model=_model(trained, prepared),
        snippet=snippet.strip(),
        parity=parity,
        versions=", ".join(f"{package} {version}" for package, version in parity["versions"].items()),
        data=[_data(path, fingerprint, weight) for path, fingerprint, weight in _datasets(trained, environment)],
        imported=_imported_from(trained.run),
        training=_training(trained, environment),
        recipe=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
        rows=[row for record in records for row in rows(record)],
        verdicts=verdicts(records),
        unmeasured=_unmeasured(records),
        license=license,
        unknown=UNKNOWN,
    )


def contents(run: Path, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """RUN/export/README.md: which formats there are, of which weights, and where their cards are."""
    heads = ["| format | step | weights | max difference |", "|---|---|---|---|"]
    lines = [f"# Exports of {run.resolve().name}", "", *heads]
    for name, found in figures.items():
        about = f"{found['step']} | {found['weights']}, {found['chosen']}"
        lines.append(f"| [{name}]({name}/{NAME}) | {about} | {found['max_abs']:.1e} |")
    return "\n".join([*lines, "", "parity.json has all figures of how equal they are to the checkpoint.", ""])


def results(trained: TrainedModel, *, average: bool) -> list[dict[str, Any]]:
    """What `evaluate` and `probe` found for these very weights."""
    folder = trained.run / "eval" / (checkpoints.folder_name(trained.step) + "-average" * average)
    records = [_read(path) for path in result_files(folder)]
    return [record for record in records if record["weights"] == trained.identity]


def _weights(parity: Mapping[str, Any]) -> str:
    what = "The moving average of its weights" if parity["weights"] == "average" else "Its weights"
    return f"{what} after step {parity['step']:,} ({parity['chosen']})."


def _model(trained: TrainedModel, prepared: Mapping[str, Any]) -> list[tuple[str, str]]:
    towers, image, logits = trained.towers, prepared["image"], prepared["logits"]
    height, width = image["size"]
    bias = f" {logits['bias']:+.2f}" if logits["bias"] else ""
    with_text = getattr(towers, "text", towers)
    return [
        ("parameters", f"{sum(parameter.numel() for parameter in towers.parameters()):,}"),
        ("image tower", f"{model.called(towers.visual)}, {height} × {width} pixels"),
        ("pixels", f"{image['interpolation']} resize, mean {image['mean']}, std {image['std']}"),
        ("text tower", f"{type(getattr(with_text, 'transformer', with_text)).__name__}"),
        ("tokens", f"{trained.tokenize.context_length} at most, of {trained.tokenize.vocab_size:,}"),
        ("embedding", f"{trained.model_cfg['embed_dim']} wide"),
        ("temperature", f"cosines × {logits['scale']:.2f}{bias} are its logits"),
    ]


def _datasets(trained: TrainedModel, environment: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    weights = {one.path: one.weight for one in trained.recipe.data.datasets}
    return [(path, found, weights.get(path, 1.0)) for path, found in environment.get("datasets", {}).items()]


def _data(path: str, fingerprint: str, weight: float) -> dict[str, Any]:
    """A dataset as it trained; counts only where what lies there now is still that."""
    found: dict[str, Any] = {"name": Path(path).name, "fingerprint": fingerprint, "weight": weight, "images": 0}
    try:
        dataset = manifest.read(Path(path))
        if dataset.fingerprint(TRAIN) != fingerprint:
            return found
        shards = dataset.split(TRAIN)
        counted: Counter[tuple[str, str | None]] = Counter()
        for shard in islice(shards, TABLES):
            table = manifest.read_table(dataset.path / manifest.table_of(shard.name), ["source", "license"])
            counted.update((row["source"], row["license"]) for row in table)
    except (DataError, OSError):
        return found
    about, counts = dataset.manifest["splits"], dataset.manifest["counts"]
    held_out = sum(known["samples"] for split, known in about.items() if split != TRAIN)
    dropped: Counter[str] = Counter()
    for reasons in counts["dropped"].values():
        dropped.update(reasons)
    return found | {
        "name": dataset.name,
        "images": about[TRAIN]["samples"],
        "captions": about[TRAIN]["captions"],
        "held_out": f"; {held_out:,} images were held out for evaluation" if held_out else "",
        "licences": [
            (source, _licence(source, license), count) for (source, license), count in sorted(counted.items(), key=str)
        ],
        "partly": TABLES if len(shards) > TABLES else 0,
        "dropped": ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()),
    }


def _licence(source: str, license: str | None) -> str:
    if license is None:
        return "not recorded"
    return COCO_LICENCES.get(license, license) if source.startswith("coco") else license


def _training(trained: TrainedModel, environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe, found = trained.recipe, []
    lines = read_metrics(trained.run) if (trained.run / METRICS).is_file() else []
    if line := next((line for line in reversed(lines) if line["step"] <= trained.step), None):
        steps = f"{line['step']:,} of {recipe.train.batch_size:,} pairs, {line['samples_seen']:,} seen in all"
        found += [("steps", steps), ("time", f"{line['wall_s']:,.0f} s")]
    loss, optim = recipe.loss, recipe.optim
    found += [
        ("loss", f"{loss.kind}, positives by {loss.positives}"),
        ("optimizer", f"AdamW, rate {optim.lr:g} ({optim.schedule}), weight decay {optim.weight_decay:g}"),
        ("precision", recipe.train.precision),
        ("began from", Path(recipe.model.pretrained).name or "drawn weights"),
    ]
    if environment:
        found += [
            ("hardware", f"{environment['world_size']} × {environment['devices']} ({environment['machine']})"),
            ("software", ", ".join(f"{name} {version}" for name, version in environment["packages"].items())),
            ("code", str(environment["code"] or "not from a checkout")),
        ]
        found += [
            (f"changed at step {change['step']:,}", "; ".join(change["changes"]))
            for change in environment["accepted_changes"]
        ]
    return found


def _imported_from(run: Path) -> str:
    """What an imported run's weights are from, without places on this machine; empty for one that trained."""
    source = str(_read(run / model.IMPORTED).get("imported", ""))
    return source if source.startswith("hf-hub:") else re.sub("[^,:]*/", "", source)


def _unmeasured(records: Iterable[Mapping[str, Any]]) -> list[str]:
    records = list(records)
    tasks = {record["task"] for record in records}
    grouped = any(record.get("groups") for record in records)
    return [*(what for task, what in TASKS.items() if task not in tasks), *([] if grouped else [GROUPS]), *ALWAYS]


def _without_places(value: Any) -> Any:
    """A recipe in which absolute paths and addresses are names only."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and (value.startswith("/") or "://" in value):
        return f"…/{value.rstrip('/').rpartition('/')[2]}"
    return value


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

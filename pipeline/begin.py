"""Before the first step: the order of samples, its first shards, and the run folder."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import checkpoint as checkpoints
from pipeline import config, exchange, layers, model, tokenizer
from pipeline.checkpoint_copy import fetch_copy
from pipeline.config import Recipe, TrainConfig
from pipeline.data.plan import Plan, Share, layout
from pipeline.data.store import ShardStore
from pipeline.data.tars import TarSet
from pipeline.pretrained import load_pretrained, normalisation

# Whose versions a run records.
PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "accelerate", "numpy", "sentencepiece")

log = logging.getLogger(__name__)


def load_saved(run: Path, copy: str, *, sharded: bool) -> checkpoints.Checkpoint | None:
    """The newest whole checkpoint of a run, the same one on every rank; where it has none, that of its copy.

    Of a sharded run it has no tensors: each rank reads its own part of them (checkpoint_sharded.load_sharded).
    """
    if copy:
        exchange.from_main(lambda: fetch_copy(run, copy))
    if sharded:
        return exchange.from_main(lambda: checkpoints.load_newest(run, checkpoints.load_state))
    newest: list[checkpoints.Checkpoint] = []

    def step_on_main() -> int:
        if found := checkpoints.load_newest(run):
            newest.append(found)
        return newest[0].step if newest else 0

    step = exchange.from_main(step_on_main)
    return newest[0] if newest else checkpoints.load(run, step) if step else None


def stream_of(run: Path, saved: checkpoints.Checkpoint | None) -> dict[str, Any] | None:
    """Where a run stands in its data; None for one that begins.

    Raises:
        RecipeError: its checkpoint was imported, so there is no training to go on with.
    """
    if saved and "imported" in saved.state:
        raise config.RecipeError(
            f"{run} holds imported weights, and no training to go on with. Train from them in another folder, with "
            f"{words_of_import(run)}"
        )
    return saved.state["stream"] if saved else None


def words_of_import(run: Path) -> str:
    """The settings by which another run begins from an imported one's weights, as words of the command line."""
    recipe = config.load_file(run / "config.yaml")
    kind = recipe.tokenizer.kind
    words = {
        "model.name": run / model.IMPORTED,
        "model.pretrained": run / "checkpoints" / checkpoints.folder_name(0) / checkpoints.MODEL,
        "tokenizer.kind": kind,
        "tokenizer.path": tokenizer.kept(kind, run / "tokenizer"),
        "data.interpolation": recipe.data.interpolation,
        "loss.kind": recipe.loss.kind,
    }
    return shlex.join(f"{key}={value}" for key, value in words.items())


def plan_of(recipe: Recipe, sets: Sequence[TarSet], world: int, state: Mapping[str, Any] | None) -> Plan:
    """The order of samples. How the data is cut into lanes is settled when a run begins, and stays.

    Args:
        recipe: with `data` and `train.batch_size`.
        sets: what `data.datasets` names.
        world: ranks.
        state: the stream's, of a run that goes on.

    Raises:
        RecipeError: no data, or fewer pairs in a batch than ranks.
        PlanError: settings or data that no plan can have.
    """
    batch = recipe.train.batch_size
    if not sets:
        raise config.RecipeError("no data: name sharded datasets with --data (DATA=…) or data.datasets.")
    if batch < world:
        raise config.RecipeError(f"train.batch_size = {batch} leaves some of {world} ranks without a pair. Raise it.")
    samples, shards = sum(one.shards.numbers("samples").sum() for one in sets), sum(len(one.shards) for one in sets)
    lanes, window = layout(samples, shards, batch, world, at_hand=all(one.at_hand for one in sets))
    if state:
        lanes, window = state["lanes"], state["window"]
    return Plan(
        [
            Share(one.fingerprint, one.shards.numbers("samples"), asked.weight, asked.path)
            for one, asked in zip(sets, recipe.data.datasets, strict=True)
        ],
        seed=recipe.seed,
        global_batch=batch,
        lanes=recipe.data.lanes or lanes,
        window=recipe.data.window or window,
        tail=recipe.data.tail,
    )


def resolved(recipe: Recipe, run: Path, *, begun: bool) -> Recipe:
    """The recipe with what it leaves to others written out: a model's .json file, and how pixels are normalised.

    Of a run that has begun, that is what its config.yaml says, whatever files or libraries say since.

    Raises:
        ModelError: a model or weights that are not there.
        RecipeError: what was found is no mean or deviation.
    """
    asked = recipe.model
    stored = config.load_file(run / "config.yaml").model if begun else None
    known: tuple[Sequence[float] | None, Sequence[float] | None]
    model_cfg = stored.config if stored and stored.name == asked.name else model.model_cfg(asked.name, asked.config)
    if stored:
        known = stored.image_mean, stored.image_std
    else:
        known = normalisation(model_cfg, name=asked.name, pretrained=asked.pretrained)
    values = recipe.model_dump(mode="json")
    values["model"] |= {"image_mean": asked.image_mean or known[0], "image_std": asked.image_std or known[1]}
    if asked.name.endswith(".json"):
        values["model"]["config"] = model_cfg
    return config.parse(values, asked.name or "model.config")


def make_towers(recipe: Recipe, model_cfg: dict[str, Any], *, pretrained: bool) -> model.Towers:
    """The recipe's towers on the CPU, freshly drawn or with the weights that it begins with.

    Raises:
        ModelError: what cannot be built, loaded, or trained as the recipe says.

    Collective where `pretrained`: every rank calls it.
    """
    torch.manual_seed(recipe.seed)
    towers = model.build(
        model_cfg,
        init_scale=recipe.loss.init_scale,
        init_bias=recipe.loss.init_bias if recipe.loss.kind == "sigmoid" else None,
        patch_dropout=recipe.model.patch_dropout,
        image_mean=recipe.model.image_mean,
        image_std=recipe.model.image_std,
    )
    if pretrained:
        source = {"name": recipe.model.name, "pretrained": recipe.model.pretrained}
        exchange.together(lambda: load_pretrained(towers, model_cfg, **source))
    layers.lock(
        towers,
        image=recipe.model.unlocked_image_groups if recipe.model.lock_image else None,
        text=recipe.model.unlocked_text_groups if recipe.model.lock_text else None,
    )
    towers.logit_scale.requires_grad_(recipe.loss.learn_scale)
    if recipe.model.activation_checkpointing:
        model.checkpoint_activations(towers)
    if recipe.train.micro_batch_size and layers.batch_statistics(towers):
        raise model.ModelError(
            "train.micro_batch_size needs towers without BatchNorm, whose statistics would be those of a part of the "
            "batch. Choose another model, or leave train.micro_batch_size out."
        )
    return towers


def length(train: TrainConfig, plan: Plan) -> int:
    """Steps of the whole run."""
    if train.steps is not None:
        return train.steps
    if train.samples is not None:
        return math.ceil(train.samples / plan.global_batch)
    passes = train.epochs or 0.0
    whole = int(passes)
    rest = (passes - whole) * (plan.first_step(whole + 1) - plan.first_step(whole))
    return max(1, plan.first_step(whole) + round(rest))


def bring_first(plan: Plan, store: ShardStore, step: int, bounds: Sequence[int], accelerator: Accelerator) -> None:
    """See that all shards are there, and let those that this rank's first batch needs arrive.

    Raises:
        DataError: one is missing or damaged, or the cache is too small for what is read at a time.
    """
    rank, first_here = accelerator.process_index, accelerator.process_index - accelerator.local_process_index
    for one in store.sets:
        # What is remote and foreign has just been listed.
        main = accelerator.is_main_process and not (one.remote and one.versions)
        if main or (accelerator.is_local_main_process and not one.remote):
            one.check()
    node = bounds[first_here], bounds[first_here + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
    ahead = store.bytes_of(plan.shards(plan.first_step(1) // 2, *node), remote=True)
    if ahead > store.cache.limit:
        raise config.RecipeError(
            f"data.cache_gb = {store.cache.limit / 1e9:g} is less than the {ahead / 1e9:.1f} GB that this machine's "
            "ranks read at a time. Raise it, or lower data.window."
        )
    began, shards = time.monotonic(), plan.shards(step, bounds[rank], bounds[rank + 1], ahead=0)
    columns = (TextColumn("shards"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=store.bytes_of(shards, remote=False))
        store.bring(shards, lambda size: progress.advance(task, size))
    log.info("%d shards for the first batch are here and verified, after %.1f s", len(shards), time.monotonic() - began)


def accepted_changes(recipe: Recipe, run: Path, plan: Plan, stream: dict[str, Any]) -> list[str]:
    """What differs from the settings and the data that a run was begun with, and is accepted.

    Raises:
        RecipeError: something differs, and `train.accept_changes` does not say that it may.
    """
    found = config.changes(config.load_file(run / "config.yaml"), recipe) + plan.changes(stream)
    if found and not recipe.train.accept_changes:
        raise config.RecipeError(
            f"{run} was begun with other settings or data ({'; '.join(found)}). Give those again, choose another run "
            "folder, or accept another run than the one begun with train.accept_changes=true. What may change is "
            f"{', '.join(config.MAY_CHANGE_ON_RESUME)}."
        )
    return found


def prepare_folder(recipe: Recipe, run: Path, plan: Plan, world: int, saved: checkpoints.Checkpoint | None) -> None:
    """Write what describes a run, tokenizer included, or check a run that goes on against what it began with.

    Raises:
        RecipeError: settings or data differ, and `train.accept_changes` does not say that they may.
    """
    run.mkdir(parents=True, exist_ok=True)
    accepted: list[dict[str, Any]] = []
    if saved:
        accepted = json.loads((run / "environment.json").read_text(encoding="utf-8")).get("accepted_changes", [])
        if found := accepted_changes(recipe, run, plan, saved.state["stream"]):
            log.warning("from step %d on this is another run than the one begun: %s", saved.step, "; ".join(found))
            accepted.append({"step": saved.step, "changes": found})
        elif plan.step_of(saved.state["stream"]) != saved.step:
            raise checkpoints.CheckpointError(f"{run}: step {saved.step} and its stream state disagree.")
    else:
        tokenizer.store(recipe.tokenizer.kind, Path(recipe.tokenizer.path), run / "tokenizer")
        model.keep_text(model.model_cfg(recipe.model.name, recipe.model.config), run)
    checkpoints.write_atomically(run / "config.yaml", recipe.to_yaml())
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "code": code_version(),
        "world_size": world,
        "threads": torch.get_num_threads(),
        "devices": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "datasets": {share.name: share.fingerprint for share in plan.datasets},
        "data_fingerprint": plan.fingerprint,
        "samples": plan.samples,
        "dropped_tail": plan.dropped_tail,
        "lanes": plan.lanes,
        "window": plan.window,
        "accepted_changes": accepted,
    }
    checkpoints.write_atomically(run / "environment.json", json.dumps(environment, indent=1))


def code_version() -> str | None:
    """The commit that runs, with `+` where the tree differs from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

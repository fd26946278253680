"""What a training run would meet in its first minutes, found in seconds: nothing is trained, and RUN stays as it is."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.record import DataError
from pipeline import begin, memory, model, ranks, tokenizer
from pipeline import checkpoint as checkpoints
from pipeline.checkpoint import STATE, Checkpoint, folder_name
from pipeline.checkpoint_copy import fetch_description
from pipeline.checkpoint_writer import AVERAGED
from pipeline.config import Recipe, RecipeError
from pipeline.data.cache import Cache, cache_folder
from pipeline.data.plan import Plan
from pipeline.data.tars import TarSet, open_tars
from pipeline.evaluate.measures import choose, open_set
from pipeline.pretrained import tag_of

# Package → the extra of ours that installs it.
EXTRAS = {"wandb": "wandb", "transformers": "hf"}


@dataclass
class Findings:
    """What was looked at and found, in order, and what is wrong with it."""

    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    def say(self, what: str, value: str) -> None:
        self.rows.append((what, value, True))

    @contextlib.contextmanager
    def problem_with(self, what: str) -> Iterator[None]:
        """Take down what is raised, and go on: all problems are told at once."""
        try:
            yield
        except (DataError, OSError) as error:
            self.rows.append((what, str(error), False))

    @property
    def problems(self) -> list[str]:
        return [value for _, value, fine in self.rows if not fine]


def dry_run(recipe: Recipe, run: Path) -> bool:
    """Print what was found; whether training could begin."""
    found = look(recipe, run)
    table = Table("", "", "", box=None, show_header=False)
    for what, value, fine in found.rows:
        table.add_row(what, escape(value), "ok" if fine else "[bold red]![/]")
    console = Console()
    console.print(table)
    count = len(found.problems)
    console.print("\nTraining could begin." if not count else f"\nTo be mended first: {count}, marked with !.")
    return not count


def look(recipe: Recipe, run: Path) -> Findings:
    """Look at everything that training needs, in the order in which it would come to it."""
    found = Findings()
    if checkpoints.steps(run) or not recipe.checkpoint.copy_to:
        _look(recipe, run, run, found)
        return found
    with tempfile.TemporaryDirectory(prefix="dry-run-") as folder:
        with found.problem_with("copy"):
            fetch_description(recipe.checkpoint.copy_to, Path(folder))
        _look(recipe, run, Path(folder), found)
    return found


def _look(recipe: Recipe, run: Path, begun: Path, found: Findings) -> None:
    """`begun` is where the run has been begun: `run` itself, or what is known of its copy."""
    world = recipe.train.processes or int(os.environ.get("WORLD_SIZE", "1"))
    model_cfg: dict[str, Any] = {}
    with found.problem_with("model"):
        goes_on = bool(checkpoints.steps(begun))
        if goes_on:
            recipe = begin.resolved(recipe, begun, begun=True)
        model_cfg = model.model_cfg(recipe.model.name, recipe.model.config)
        if goes_on:
            model_cfg = model.with_kept_text(model_cfg, begun)
    _device(recipe, world, found)
    _extras(recipe, model_cfg, found)
    sets = _data(recipe, found)
    saved = _run_folder(run, begun, found)
    if sets is not None:
        _plan(recipe, begun, sets, world, saved, found)
    if model_cfg:
        _tokenizer(recipe, begun, model_cfg, saved is not None, found)
        _towers(recipe, model_cfg, world, saved is not None, found)
    _evaluation(recipe, found)


def _device(recipe: Recipe, world: int, found: Findings) -> None:
    cuda = recipe.train.device != "cpu" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "cpu"
    found.say("device", f"{name}, {recipe.train.precision}, {world} {'rank' if world == 1 else 'ranks'}")
    with found.problem_with("precision"):
        ranks.check_precision(recipe.train.precision, gpu=cuda)


def _extras(recipe: Recipe, model_cfg: dict[str, Any], found: Findings) -> None:
    towers = bool(model_cfg.get("text_cfg", {}).get("hf_model_name")) or recipe.tokenizer.kind == "huggingface"
    wanted = {"wandb": bool(recipe.tracking.wandb), "transformers": towers}
    for package in (name for name, asked in wanted.items() if asked):
        with found.problem_with("extra"):
            if importlib.util.find_spec(package) is None:
                raise RecipeError(f"the recipe needs {package}: pip install 'clip-pipeline[{EXTRAS[package]}]'.")
            found.say("extra", package)


def _data(recipe: Recipe, found: Findings) -> list[TarSet] | None:
    """What is trained on; None where some of it cannot be."""
    cache = Cache(cache_folder(recipe.data.cache), int(recipe.data.cache_gb * 1e9))
    sets: list[TarSet] = []
    for asked in recipe.data.datasets:
        with found.problem_with("data"):
            opened = open_tars(asked.path, cache)
            opened.check()
            sets.append(opened)
            samples = int(opened.shards.numbers("samples").sum())
            kind = "foreign" if opened.versions else "sealed"
            found.say("data", f"{asked.path}: {samples:,} samples in {len(opened.shards):,} {kind} shards")
    return sets if len(sets) == len(recipe.data.datasets) else None


def _run_folder(run: Path, begun: Path, found: Findings) -> Checkpoint | None:
    """What a run would go on from, without tensors; None where it would begin."""
    saved: Checkpoint | None = None
    with found.problem_with("run folder"):
        there = next(path for path in (run, *run.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise RecipeError(f"{run} cannot be written: {there} is no folder that may be. Choose another run folder.")
        saved = checkpoints.load_newest(begun, _unverified)
        copy = "" if begun == run else " of its copy"
        found.say(
            "run folder",
            f"{run}: goes on from step {saved.step}{copy}, if its files are whole"
            if saved
            else f"{run}: begins at step 0",
        )
    return saved


def _unverified(run: Path, step: int) -> Checkpoint:
    """As checkpoints.load_state, but in a moment: nothing is hashed."""
    folder = run / "checkpoints" / folder_name(step)
    with checkpoints.reading(folder):
        return Checkpoint(step, {}, {}, json.loads((folder / STATE).read_text(encoding="utf-8")))


def _plan(recipe: Recipe, run: Path, sets: list[TarSet], world: int, saved: Checkpoint | None, found: Findings) -> None:
    with found.problem_with("plan"):
        stream = begin.stream_of(run, saved)
        plan = begin.plan_of(recipe, sets, world, stream)
        total, epoch = begin.length(recipe.train, plan), plan.first_step(1)
        found.say("plan", f"{total:,} steps of {plan.global_batch:,} pairs, {epoch:,} an epoch; {_lanes(plan)}")
        for share, one, (_, places) in zip(plan.datasets, sets, plan.state(0)["mixture"], strict=True):
            passes = total * places / one.shards.numbers("samples").sum()
            found.say("", f"{share.name}: {places:,} pairs of each batch, {passes:.1f} passes")
        if stream:
            begin.accepted_changes(recipe, run, plan, stream)


def _lanes(plan: Plan) -> str:
    whole = "shuffled whole" if plan.window is None else f"shuffled {plan.window:,} at a time"
    return f"{plan.lanes} {'lane' if plan.lanes == 1 else 'lanes'}, {whole}"


def _tokenizer(recipe: Recipe, run: Path, model_cfg: dict[str, Any], begun: bool, found: Findings) -> None:
    kind = recipe.tokenizer.kind
    with found.problem_with("tokenizer"):
        path = tokenizer.kept(kind, run / "tokenizer") if begun else Path(recipe.tokenizer.path)
        made = tokenizer.load(kind, path, model_cfg)
        found.say("tokenizer", f"{kind}, {made.vocab_size:,} ids, {made.context_length} to a text")


def _towers(recipe: Recipe, model_cfg: dict[str, Any], world: int, begun: bool, found: Findings) -> None:
    with found.problem_with("model"):
        towers = memory.towers_without_numbers(recipe, model_cfg)
        sizes = [(value.numel(), value.requires_grad) for value in towers.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        found.say("model", f"{sum(size for size, _ in sizes):,} parameters, {trained:,} of them trained")
        if not begun:
            _pretrained(recipe, found)
        need = memory.of_recipe(recipe, world, model_cfg).peak / 1e9
        found.say("memory", f"{need:.3g} GB a rank at the peak (`python -m pipeline plan-memory` says what for)")
        for there in memory.this_gpu_gb() if recipe.train.device != "cpu" else []:
            if need > there:
                raise RecipeError(
                    f"{need:.3g} GB a rank is more than the GPU's {there:.3g}. Set train.micro_batch_size (see "
                    "`python -m pipeline plan-memory`) or model.activation_checkpointing, or take more ranks."
                )


def _pretrained(recipe: Recipe, found: Findings) -> None:
    if asked := recipe.model.pretrained:
        tag = tag_of(recipe.model.name, asked)
        found.say("weights", f"{asked}, {'fetched when the run begins' if tag else 'a file'}")


def _evaluation(recipe: Recipe, found: Findings) -> None:
    known: list[str] = []
    if recipe.evaluate.data:
        with found.problem_with("evaluation"):
            for source in choose(Path(recipe.evaluate.data), recipe.evaluate.sets, while_training=True):
                opened = open_set(source)
                known.append(source.name)
                found.say("evaluation", f"{source.name}: {len(opened.items):,} images, {len(opened.texts):,} texts")
    with found.problem_with("evaluation"):
        best = recipe.checkpoint.keep_best
        measured = known + [f"{AVERAGED}{name}" for name in known if recipe.optim.ema]
        if best and best != "loss" and recipe.evaluate.data and known and best.rpartition("/")[0] not in measured:
            ways = "" if recipe.optim.ema else f" ({AVERAGED}… with optim.ema)"
            raise RecipeError(
                f"checkpoint.keep_best={best}: measured while training are {', '.join(measured)}{ways}. Name one."
            )

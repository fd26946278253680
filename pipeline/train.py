"""The training loop: one function, read from top to bottom.

It is safe to kill at any moment: the same command goes on from the newest checkpoint with the same samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import checkpoint as checkpoints
from pipeline import config, exchange, model, tokenizer
from pipeline.config import OptimConfig, Recipe, TrainConfig
from pipeline.data.cache import Cache
from pipeline.data.loader import Augmentation, Batch, Stream
from pipeline.data.plan import Plan, Share, batch_sha256, layout, rank_bounds
from pipeline.data.store import ShardStore
from pipeline.data.tars import TarSet, open_tars
from pipeline.data.transforms import normalizer
from pipeline.failure import TrainingError
from pipeline.loss.info_nce import info_nce
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)

# Below so many samples, one bad image would be a bad rate over any threshold.
BAD_RATE_FLOOR = 1000


def train(recipe: Recipe, run: Path) -> str:
    """Train a recipe into a run folder, from its newest checkpoint if it has one (contracts 2 and 3).

    Returns:
        "done", or "requeue" where SIGTERM or SIGINT asked for a stop: the run is saved, the same command goes on.

    Raises:
        DataError: the user must change something.
        TrainingError: too many non-finite steps or unreadable samples.
    """
    # --- Machine
    accelerator = start_processes(recipe.train)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    stop = StopRequest()

    # --- Data, and where the run stands
    cache = Cache(cache_folder(recipe.data.cache), int(recipe.data.cache_gb * 1e9))
    sets = exchange.from_main(lambda: [open_tars(one.path, cache) for one in recipe.data.datasets])
    store = ShardStore(sets, cache, verify=recipe.data.verify)
    saved = load_saved(run)
    step = saved.step if saved else 0
    plan = plan_of(recipe, sets, world, saved.state["stream"] if saved else None)
    bounds = rank_bounds(plan.global_batch, world)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    exchange.from_main(lambda: prepare_folder(recipe, run, plan, world, saved))
    exchange.together(lambda: bring_first(plan, store, step, bounds, accelerator))

    # --- Tokenizer and towers
    model_cfg = model.model_cfg(recipe.model.name, recipe.model.config)
    tokenize = tokenizer.load(recipe.tokenizer.kind, run / "tokenizer" / tokenizer.MODEL_FILE, model_cfg["text_cfg"])
    torch.manual_seed(recipe.seed)
    towers = model.build(model_cfg, init_scale=recipe.loss.init_scale).to(device)
    memory_format = torch.channels_last if recipe.model.channels_last else torch.contiguous_format
    towers = towers.to(memory_format=memory_format)
    if world > 1 and model.has_batch_statistics(towers) and accelerator.is_main_process:
        log.warning("The image tower has BatchNorm: its statistics are a rank's own, so results depend on the ranks.")

    # --- Optimizer
    groups = model.parameter_groups(towers, recipe.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=recipe.optim.betas, eps=recipe.optim.eps)
    skipped_in_row, bad_seen, wall_before = 0, 0, 0.0
    if saved:
        towers.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        skipped_in_row, bad_seen, wall_before = (
            saved.state[name] for name in ("skipped_in_row", "bad_samples", "wall_s")
        )
    parallel, optimizer = accelerator.prepare(towers, optimizer)
    normalize = normalizer(towers.visual.image_mean, towers.visual.image_std, device)

    # --- Stream and tracking
    stream = Stream(
        plan,
        store,
        Augmentation(
            size=model.image_size(towers),
            crop_scale=recipe.data.crop_scale,
            interpolation=recipe.data.interpolation,
            grayscale=recipe.data.grayscale,
            fields=recipe.data.fields,
            decoder=recipe.data.decoder,
        ),
        tokenize,
        tokenize.context_length,
        (bounds[rank], bounds[rank + 1]),
        range(step, recipe.train.steps),
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        timeout_s=recipe.data.timeout_s,
        pin=device.type == "cuda",
    )
    tracker = None
    if accelerator.is_main_process:
        tracker = Tracker(run, step=step, total=recipe.train.steps, **recipe.tracking.model_dump())
    accelerator.wait_for_everyone()  # the tracker has cut quarantine.jsonl back before a rank adds to it

    # --- Loop
    started = stepped = time.monotonic()
    parallel.train()
    with stream, tracker or contextlib.nullcontext():
        batches = iter(stream)
        while step < recipe.train.steps and not stop.agreed:
            batch = next(batches)
            data_wait_s = time.monotonic() - stepped
            rate = learning_rate(step, recipe.optim, recipe.train.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(step_seed(recipe.seed, step, rank))  # dropout, patch dropout

            # Forward, loss over all ranks' pairs, backward
            image_BCSS = normalize(batch.image_BCSS).to(memory_format=memory_format)
            image_BD, text_BD, scale = parallel(image_BCSS, batch.token_BL.to(device, non_blocking=True))
            loss = info_nce(image_BD, text_BD, scale, sizes=sizes, tile=recipe.loss.tile)
            accelerator.backward(loss * world)  # the loss wants gradients summed, DDP takes their mean

            # Update, unless this step's gradient is not finite (all ranks hold the same gradient)
            norm = accelerator.clip_grad_norm_(parallel.parameters(), recipe.optim.clip_norm or math.inf)
            finite = bool(torch.isfinite(norm))
            if finite:
                optimizer.step()
                model.clamp_scale(towers, recipe.loss.max_scale)
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # What happened, agreed among ranks
            told = exchange.report(loss, batch.id_B, bad=len(batch.replaced), stop=stop.asked, sizes=sizes)
            stop.agreed = told.stop
            skipped_in_row = 0 if finite else skipped_in_row + 1
            bad_seen += told.bad
            log_replaced(run, step, batch)
            loader_bytes, now = stream.memory(), time.monotonic()
            if tracker:
                tracker.log(
                    {
                        "step": step,
                        "epoch": plan.epoch(step - 1),
                        "samples_seen": step * plan.global_batch,
                        "wall_s": round(wall_before + now - started, 3),
                        "loss": told.loss,
                        "logit_scale": float(towers.logit_scale.detach().exp()),
                        "lr": rate,
                        "grad_norm": float(norm),
                        "samples_per_s": plan.global_batch / (now - stepped),
                        "data_wait_s": round(data_wait_s, 4),
                        "loader_mb": round(loader_bytes / 1e6, 1),
                        "skipped": int(not finite),
                        "bad_samples": bad_seen,
                        "batch_sha256": batch_sha256(told.ids),
                    }
                )
            stepped = now
            if skipped_in_row >= recipe.train.max_skipped:
                raise TrainingError(
                    f"step {step}: the gradient was not finite {skipped_in_row} times in a row. "
                    f"Resume from the last checkpoint with a lower optim.lr or a longer optim.warmup_steps."
                )
            if bad_seen > recipe.data.max_bad * max(step * plan.global_batch, BAD_RATE_FLOOR):
                raise TrainingError(
                    f"step {step}: {bad_seen} of {step * plan.global_batch} samples were unreadable, more than "
                    f"data.max_bad = {recipe.data.max_bad}. {run / 'quarantine.jsonl'} lists them."
                )

            # Checkpoint
            if step % recipe.checkpoint.every_steps == 0 or step == recipe.train.steps or stop.agreed:
                if accelerator.is_main_process:
                    state = {
                        "stream": plan.state(step),
                        "recipe_sha256": hashlib.sha256(recipe.to_yaml().encode()).hexdigest(),
                        "skipped_in_row": skipped_in_row,
                        "bad_samples": bad_seen,
                        "wall_s": wall_before + now - started,
                        "metrics": {"loss": told.loss if math.isfinite(told.loss) else None},
                    }
                    checkpoints.save(
                        run,
                        checkpoints.Checkpoint(step, towers.state_dict(), optimizer.state_dict(), state),
                        recipe.checkpoint.keep,
                    )
                accelerator.wait_for_everyone()
                stepped = time.monotonic()
    return "done" if step >= recipe.train.steps else "requeue"


class StopRequest:
    """SIGTERM or SIGINT asks for a stop at the next step; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def start_processes(train: TrainConfig) -> Accelerator:
    """Join the other ranks, and refuse to run with fewer than were asked for.

    Raises:
        RecipeError: a launcher announced more processes than it started, or train.processes differs.
    """
    # `accelerate launch --cpu --num_processes N` names a master and then starts one process only.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise config.RecipeError(
            "the launcher set MASTER_ADDR but started a single process. On CPUs, use `torchrun --nproc-per-node N` "
            "or `accelerate launch --multi_gpu --num_processes N`; `--cpu` starts only one."
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if train.processes is not None and world != train.processes:
        raise config.RecipeError(
            f"train.processes = {train.processes}, but {world} are running. Start them with "
            f"`torchrun --nproc-per-node {train.processes} -m pipeline train …`, or change the setting."
        )
    accelerator = Accelerator(
        cpu=train.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision={"fp32": "no", "bf16": "bf16"}[train.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != world:
        raise config.RecipeError(f"{world} processes were started, but only {accelerator.num_processes} joined.")
    if train.threads:
        torch.set_num_threads(train.threads)
    torch.use_deterministic_algorithms(train.deterministic)
    return accelerator


def load_saved(run: Path) -> checkpoints.Checkpoint | None:
    """The newest whole checkpoint of a run, the same one on every rank."""
    newest: list[checkpoints.Checkpoint] = []

    def step_on_main() -> int:
        if found := checkpoints.load_newest(run):
            newest.append(found)
        return newest[0].step if newest else 0

    step = exchange.from_main(step_on_main)
    return newest[0] if newest else checkpoints.load(run, step) if step else None


def cache_folder(asked: str) -> Path:
    """Where copies of remote shards are kept, and what is known of those on this machine."""
    return Path(asked or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clip-pipeline"))


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


def prepare_folder(recipe: Recipe, run: Path, plan: Plan, world: int, saved: checkpoints.Checkpoint | None) -> None:
    """Write config.yaml, environment.json and the tokenizer, or check a run that goes on against what it began with.

    Raises:
        RecipeError: settings or data differ, and `train.accept_changes` does not say that they may.
    """
    run.mkdir(parents=True, exist_ok=True)
    accepted: list[dict[str, Any]] = []
    if saved:
        accepted = json.loads((run / "environment.json").read_text(encoding="utf-8")).get("accepted_changes", [])
        found = config.changes(config.load_file(run / "config.yaml"), recipe) + plan.changes(saved.state["stream"])
        if found and not recipe.train.accept_changes:
            raise config.RecipeError(
                f"{run} was begun with other settings or data ({'; '.join(found)}). Give those again, choose another "
                "run folder, or accept another run than the one begun with train.accept_changes=true. What may change "
                f"is {', '.join(config.MAY_CHANGE_ON_RESUME)}."
            )
        if found:
            log.warning("from step %d on this is another run than the one begun: %s", saved.step, "; ".join(found))
            accepted.append({"step": saved.step, "changes": found})
        elif plan.step_of(saved.state["stream"]) != saved.step:
            raise checkpoints.CheckpointError(f"{run}: step {saved.step} and its stream state disagree.")
    else:
        tokenizer.store(recipe.tokenizer.kind, Path(recipe.tokenizer.path), run / "tokenizer")
    checkpoints.write_atomically(run / "config.yaml", recipe.to_yaml())
    packages = ("torch", "torchvision", "open_clip_torch", "timm", "accelerate", "numpy", "sentencepiece")
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
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


def learning_rate(step: int, optim: OptimConfig, total: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then a cosine to zero or a constant."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    return 0.5 * optim.lr * (1 + math.cos(math.pi * done))


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers inside the model, so that none of their state needs saving."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little")


def log_replaced(run: Path, step: int, batch: Batch) -> None:
    """Add this rank's replaced samples to RUN/quarantine.jsonl; single appended lines, so ranks may do so at once."""
    if batch.replaced:
        with (run / "quarantine.jsonl").open("a", encoding="utf-8") as file:
            for item in batch.replaced:
                file.write(json.dumps({"step": step, **item._asdict()}) + "\n")

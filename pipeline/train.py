"""The training loop: one function, read from top to bottom.

It is safe to kill at any moment: the same command goes on from the newest checkpoint with the same samples.
"""

from __future__ import annotations

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
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs

from data_prep import manifest
from pipeline import checkpoint as checkpoints
from pipeline import config, exchange, model, tokenizer
from pipeline.config import OptimConfig, Recipe, TrainConfig
from pipeline.data.loader import Augmentation, Batch, RankBatches, stream
from pipeline.data.plan import Plan, batch_sha256, rank_bounds
from pipeline.data.store import ShardStore
from pipeline.data.transforms import normalizer
from pipeline.loss.info_nce import info_nce
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)

# Below so many samples, one bad image would be a bad rate over any threshold.
BAD_RATE_FLOOR = 1000


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


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

    # --- Data
    dataset = manifest.read(Path(recipe.data.path))
    shards = dataset.split("train")
    store = ShardStore(dataset.path, shards)
    store.check_files()
    if recipe.data.verify and accelerator.is_local_main_process:
        store.check_hashes()
    accelerator.wait_for_everyone()
    plan = Plan(
        fingerprint=dataset.fingerprint("train"),
        sizes=tuple(shard.samples for shard in shards),
        seed=recipe.seed,
        global_batch=recipe.train.batch_size,
        lanes=recipe.data.lanes,
        window=recipe.data.window,
    )
    bounds = rank_bounds(plan.global_batch, world)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    if min(sizes) == 0:
        raise config.RecipeError(f"train.batch_size = {plan.global_batch} leaves some of {world} ranks without a pair.")

    # --- Run folder
    saved = checkpoints.load_newest(run) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        prepare_folder(recipe, run, plan, world, resumed=saved is not None)
    step = broadcast(saved.step if saved else 0)
    if step and saved is None:
        saved = checkpoints.load(run, step)

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
        if plan.resume(saved.state["stream"]) != step:
            raise checkpoints.CheckpointError(f"{run}: step {step} and its stream state disagree.")
        towers.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        skipped_in_row, bad_seen, wall_before = (
            saved.state[name] for name in ("skipped_in_row", "bad_samples", "wall_s")
        )
    parallel, optimizer = accelerator.prepare(towers, optimizer)
    normalize = normalizer(towers.visual.image_mean, towers.visual.image_std, device)

    # --- Stream and tracking
    batches = stream(
        RankBatches(
            plan,
            store,
            Augmentation(
                size=model.image_size(towers),
                crop_scale=recipe.data.crop_scale,
                interpolation=recipe.data.interpolation,
                grayscale=recipe.data.grayscale,
                fields=recipe.data.fields,
            ),
            tokenize,
            rank,
            world,
        ),
        range(step, recipe.train.steps),
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        timeout_s=recipe.data.timeout_s,
        pin_memory=device.type == "cuda",
    )
    tracker = None
    if accelerator.is_main_process:
        tracker = Tracker(run, step=step, total=recipe.train.steps, **recipe.tracking.model_dump())
    accelerator.wait_for_everyone()  # the tracker has cut quarantine.jsonl back before a rank adds to it

    # --- Loop
    started = stepped = time.monotonic()
    parallel.train()
    try:
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
            now = time.monotonic()
            if tracker:
                tracker.log(
                    {
                        "step": step,
                        "epoch": (step - 1) // plan.steps_per_epoch,
                        "samples_seen": step * plan.global_batch,
                        "wall_s": round(wall_before + now - started, 3),
                        "loss": told.loss,
                        "logit_scale": float(towers.logit_scale.detach().exp()),
                        "lr": rate,
                        "grad_norm": float(norm),
                        "samples_per_s": plan.global_batch / (now - stepped),
                        "data_wait_s": round(data_wait_s, 4),
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
    finally:
        if tracker:
            tracker.close()
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


def prepare_folder(recipe: Recipe, run: Path, plan: Plan, world: int, *, resumed: bool) -> None:
    """Write config.yaml, environment.json and the tokenizer, or check a resumed run against its stored recipe."""
    run.mkdir(parents=True, exist_ok=True)
    if resumed:
        config.refuse_changes(config.load_file(run / "config.yaml"), recipe, run)
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
        "data_fingerprint": plan.fingerprint,
        "samples": plan.samples,
        "dropped_tail": plan.samples % plan.global_batch,
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


def broadcast(value: int) -> int:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return int(box[0])


def log_replaced(run: Path, step: int, batch: Batch) -> None:
    """Add this rank's replaced samples to RUN/quarantine.jsonl; single appended lines, so ranks may do so at once."""
    if batch.replaced:
        with (run / "quarantine.jsonl").open("a", encoding="utf-8") as file:
            for item in batch.replaced:
                file.write(json.dumps({"step": step, **item._asdict()}) + "\n")

"""The training loop: one function, read from top to bottom.

It is safe to kill at any moment: the same command goes on from the newest checkpoint with the same samples.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import begin, exchange, layers, model, ranks, sharding, tokenizer
from pipeline.average import WeightAverage
from pipeline.backward import Contrast, forward_backward, parts_of
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint_copy import STOP_PATIENCE_S
from pipeline.checkpoint_sharded import load_sharded, save_sharded
from pipeline.checkpoint_writer import AVERAGED, Writer
from pipeline.config import OptimConfig, Recipe
from pipeline.data.cache import Cache, cache_folder
from pipeline.data.loader import Augmentation, Batch, Stream
from pipeline.data.plan import batch_sha256, rank_bounds
from pipeline.data.store import ShardStore
from pipeline.data.tars import open_tars
from pipeline.data.transforms import normalizer
from pipeline.ending import StopRequest
from pipeline.evaluate.during import Budget, Evaluators
from pipeline.evaluate.pixels import transformed
from pipeline.failure import TrainingError
from pipeline.loss.info_nce import info_nce
from pipeline.loss.sigmoid import sigmoid
from pipeline.loss.temperature import clamp_scale
from pipeline.loss.tiles import text_key
from pipeline.symptoms import Symptoms
from pipeline.throughput import Throughput, flops_per_sample, peak_flops, peak_memory_mb
from pipeline.tracking import Tracker, is_evaluated
from pipeline.trained import inference_transform

log = logging.getLogger(__name__)

# Below so many samples, one bad image would be a bad rate over any threshold.
BAD_RATE_FLOOR = 1000

LOSSES: dict[str, Contrast] = {
    "info_nce": info_nce,
    "decoupled": functools.partial(info_nce, decoupled=True),
    "sigmoid": sigmoid,
}


def train(recipe: Recipe, run: Path, stop: StopRequest | None = None) -> str:
    """Train a recipe into a run folder, from its newest checkpoint if it has one (contracts 2 and 3).

    Args:
        recipe: what to train.
        run: the run folder.
        stop: by which it is asked to stop; by default one from now on.

    Returns:
        "done", or "requeue" where SIGTERM, SIGUSR1 or SIGINT asked for a stop: the run is saved, the same command goes
        on.

    Raises:
        DataError: the user must change something.
        TrainingError: too many non-finite steps or unreadable samples.
    """
    # --- Machine
    if recipe.train.deterministic:  # cuBLAS reads it when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = ranks.start(
        processes=recipe.train.processes,
        cpu=recipe.train.device == "cpu",
        precision=recipe.train.precision,
        timeout_s=recipe.train.timeout_s,
    )
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    main, stop = accelerator.is_main_process, stop or StopRequest()

    # --- Data, and where the run stands
    cache = Cache(cache_folder(recipe.data.cache), int(recipe.data.cache_gb * 1e9))
    sets = exchange.from_main(lambda: [open_tars(one.path, cache) for one in recipe.data.datasets])
    store = ShardStore(sets, cache, verify=recipe.data.verify)
    sharded = recipe.train.sharding == "fsdp2" and world > 1
    saved = begin.load_saved(run, recipe.checkpoint.copy_to, sharded=sharded)
    step = first_step = saved.step if saved else 0
    recipe = exchange.from_main(lambda: begin.resolved(recipe, run, begun=saved is not None))
    plan = begin.plan_of(recipe, sets, world, exchange.from_main(lambda: begin.stream_of(run, saved)))
    total = begin.length(recipe.train, plan)
    bounds = rank_bounds(plan.global_batch, world)
    sizes = [end - first for first, end in itertools.pairwise(bounds)]
    exchange.from_main(lambda: begin.prepare_folder(recipe, run, plan, world, saved))
    exchange.together(lambda: begin.bring_first(plan, store, step, bounds, accelerator))

    # --- Tokenizer and towers
    model_cfg = model.model_cfg(recipe.model.name, recipe.model.config)
    if saved:
        model_cfg = model.with_kept_text(model_cfg, run)
    tokenize = tokenizer.load(
        recipe.tokenizer.kind, tokenizer.kept(recipe.tokenizer.kind, run / "tokenizer"), model_cfg
    )
    memory_format = torch.channels_last if recipe.model.channels_last else torch.contiguous_format
    dtype = torch.float64 if recipe.train.precision == "fp64" else torch.float32
    towers = begin.make_towers(recipe, model_cfg, pretrained=not saved).to(device, dtype, memory_format=memory_format)
    statistics = layers.batch_statistics(towers)
    if statistics and world > 1 and main:
        log.warning("The image tower has BatchNorm: its statistics are a rank's own, so results depend on the ranks.")

    peak = peak_flops(device, recipe.train.precision) if main else None
    flops = flops_per_sample(towers, model.image_size(towers), tokenize.context_length) if peak else None

    # --- Optimizer
    if sharded:
        sharding.shard(towers)
    groups = layers.parameter_groups(
        towers,
        lr=recipe.optim.lr,
        weight_decay=recipe.optim.weight_decay,
        layer_decay=recipe.optim.layer_decay,
    )
    # Its fused kernel takes `found_inf`, which makes a step undone on the device.
    optimizer = torch.optim.AdamW(
        sharding.apart(groups), lr=recipe.optim.lr, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=True
    )
    average = WeightAverage(towers, recipe.optim.ema) if recipe.optim.ema else None
    progress: dict[str, Any] = {"skipped_in_row": 0, "bad_samples": 0, "wall_s": 0.0, "symptoms": {}}
    if saved:
        if sharded:
            averaged = average.state_dict() if average else None
            load_sharded(run, step, towers, optimizer, average=averaged, verify=False)  # load_saved has
        else:
            towers.load_state_dict(saved.model)
            optimizer.load_state_dict(saved.optimizer)
            if average:
                average.load_state_dict(saved.average or saved.model)  # of a run that was begun without, it begins here
        progress |= {name: saved.state[name] for name in progress}
        if accelerator.scaler and (scaler := saved.state.get("scaler")):
            accelerator.scaler.load_state_dict(scaler)
    accelerator.ddp_handler.broadcast_buffers = bool(statistics)
    trained = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    parallel: Any = torch.compile(towers) if recipe.train.compile else towers
    if not sharded:
        with warnings.catch_warnings():  # of a word that torch has replaced, and Accelerate only knows the old one
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*is deprecated", FutureWarning)
            parallel = accelerator.prepare_model(parallel)
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    normalize = normalizer(towers.visual.image_mean, towers.visual.image_std, device)

    # --- Stream, evaluation, tracking
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
        range(step, total),
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        timeout_s=recipe.data.timeout_s,
        pin=device.type == "cuda",
    )
    evaluators = None
    if recipe.evaluate.data:
        evaluators = Evaluators(
            Path(recipe.evaluate.data),
            recipe.evaluate.sets,
            tokenize=tokenize,
            preprocess=transformed(recipe.evaluate.transform, inference_transform(towers, recipe.data.interpolation)),
            batch_size=recipe.evaluate.batch_size,
            workers=recipe.evaluate.workers,
            rank=rank,
            world=world,
            global_batch=plan.global_batch,
        )
    symptoms = Symptoms(
        warmup_steps=recipe.optim.warmup_steps,
        min_scale=recipe.loss.min_scale,
        max_scale=recipe.loss.max_scale,
        info_nce=recipe.loss.kind != "sigmoid",
        state=progress["symptoms"],
    )
    tracker = writer = None
    if main:
        throughput = Throughput(
            flops_per_sample=flops, peak_flops=peak, devices=world, window=recipe.tracking.log_every_steps
        )
        tracker = Tracker(
            run,
            step=step,
            total=total,
            throughput=throughput,
            settings=recipe.model_dump(mode="json"),
            **recipe.tracking.model_dump(),
        )
        writer = Writer(
            run,
            keep=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
            copy_to=recipe.checkpoint.copy_to,
        )
        if saved:
            writer.resumed(step)
    # Also, the tracker has cut quarantine.jsonl back before a rank adds to it.
    stop.agreed = exchange.any_rank(stop.asked)

    # --- Loop
    started = stepped = saved_at = time.monotonic()
    wall_before, budget = progress["wall_s"], Budget(recipe.evaluate.budget)
    figures: dict[str, float] = {}

    def evaluates(step: int) -> bool:
        return step > 0 and (step % recipe.evaluate.every_steps == 0 or step == total)

    copied = torch.cuda.Event() if device.type == "cuda" else None
    sent = deque[tuple[exchange.Sending, dict[str, Any]]]()
    parallel.train()
    with stream, tracker or contextlib.nullcontext(), writer or contextlib.nullcontext():
        batches = iter(stream)
        due = evaluates(step) and not stop.agreed
        if evaluators and due and exchange.from_main(lambda: not is_evaluated(run, first_step)):
            figures = measure(evaluators, towers, average, device)  # what a stop has left out
            if tracker:
                tracker.log_evaluation(step, figures)
            stepped = time.monotonic()
        while step < total and not stop.agreed:
            if copied:
                copied.synchronize()  # the batch before lies in the loader's memory, which this gives back
            batch = next(batches)
            data_wait_s = time.monotonic() - stepped
            rate = learning_rate(step, recipe.optim, total)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]

            # Forward, loss over all ranks' pairs, backward
            formerly = [buffer.clone() for buffer in statistics]
            image_BCSS, token_BL, photo_B = (
                value.to(device, non_blocking=device.type == "cuda")
                for value in (batch.image_BCSS, batch.token_BL, batch.image_B)
            )
            if copied:
                copied.record()
            key_BK = no_negatives(photo_B, token_BL, recipe.loss.positives)
            loss = forward_backward(
                accelerator,
                parallel,
                image_BCSS,
                token_BL,
                functools.partial(LOSSES[recipe.loss.kind], key_BK=key_BK, sizes=sizes, tile=recipe.loss.tile),
                # Brought into the towers' layout while a pixel is one byte.
                prepare=lambda image: normalize(image.contiguous(memory_format=memory_format)).to(dtype),
                parts=parts_of(sizes, recipe.train.micro_batch_size),
                seed=step_seed(recipe.seed, step, rank),
            )

            # Update; where the gradient is not finite, on the device and so on all ranks, the step changes nothing
            clip_norm = recipe.optim.clip_norm or math.inf
            if sharded:
                norm = sharding.finish_gradients(towers, clip_norm)
            else:
                accelerator.unscale_gradients()
                norm = nn.utils.get_total_norm([one.grad for one in trained if one.grad is not None])
                nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
            skipped = (~norm.isfinite()).float()
            if accelerator.scaler is None:  # else it looks for itself, and gives the optimizer the same word
                optimizer.optimizer.found_inf = skipped
            optimizer.step()
            at_clamp = clamp_scale(towers.logit_scale, recipe.loss.min_scale, recipe.loss.max_scale)
            for buffer, former in zip(statistics, formerly, strict=True):
                buffer.copy_(torch.where(skipped > 0, former, buffer))
            if average:
                average.update(towers)
            step += 1

            # What happened: told to all ranks, and read while the next step is being computed
            unclipped = (norm / clip_norm).clamp(min=1)
            scale_grad = towers.logit_scale.grad * unclipped if recipe.loss.learn_scale else torch.zeros_like(loss)
            numbers = [norm, skipped, towers.logit_scale.exp(), scale_grad, at_clamp & recipe.loss.learn_scale]
            optimizer.zero_grad(set_to_none=True)
            log_replaced(run, step, batch)
            loader_bytes, now = stream.memory(), time.monotonic()
            minutes = recipe.checkpoint.every_minutes
            told = exchange.Sending(
                loss,
                numbers,
                batch.id_B,
                bad=len(batch.replaced),
                stop=stop.asked,
                save=bool(main and minutes and now - saved_at > 60 * minutes),
                sizes=sizes,
            )
            sent.append(
                (
                    told,
                    {
                        "step": step,
                        "epoch": plan.epoch(step - 1),
                        "samples_seen": step * plan.global_batch,
                        "wall_s": round(wall_before + now - started, 3),
                        "lr": rate,
                        "samples_per_s": plan.global_batch / (now - stepped),
                        "data_wait_s": round(data_wait_s, 4),
                        "loader_mb": round(loader_bytes / 1e6, 1),
                        "memory_mb": round(peak_memory_mb(device), 1),
                    },
                )
            )
            stepped = now
            save = step % recipe.checkpoint.every_steps == 0 or step == total
            while sent and (len(sent) > 1 or save or stop.agreed):
                told, line = sent.popleft()
                seen = told.read()
                stop.agreed, save = stop.agreed or seen.stop, save or seen.save
                grad_norm, was_skipped, scale, scale_grad, was_at_clamp = seen.numbers
                progress["skipped_in_row"] = progress["skipped_in_row"] + 1 if was_skipped else 0
                progress["bad_samples"] += seen.bad
                if tracker:
                    for warning in symptoms.check(
                        line["step"],
                        seen.loss,
                        plan.global_batch,
                        scale,
                        bool(was_at_clamp),
                        grad_norm,
                        bool(was_skipped),
                    ):
                        log.warning("%s", warning)
                    tracker.log(
                        line
                        | {
                            "loss": seen.loss,
                            "logit_scale": scale,
                            "logit_scale_grad": scale_grad,
                            "clamp_share": symptoms.clamp_share,
                            "grad_norm": grad_norm,
                            "skipped": int(was_skipped),
                            "bad_samples": progress["bad_samples"],
                            "batch_sha256": batch_sha256(seen.ids),
                        }
                    )
                check(recipe, run, line["step"], progress, plan.global_batch)

            # Evaluation
            figures = {}
            if evaluators and evaluates(step) and stop.agreed and step < total:
                log.info("step %d: asked to stop, so it is measured when the run goes on.", step)
            elif evaluators and evaluates(step):
                began = time.monotonic()
                figures = measure(evaluators, towers, average, device)
                stepped = time.monotonic()
                if tracker:
                    tracker.log_evaluation(step, figures)
                    budget.spent(stepped - began, run_seconds=stepped - started, steps=step - first_step)

            # Checkpoint
            if writer:
                writer.check()
            if save or stop.agreed:
                known = {"loss": seen.loss} | figures
                state = {
                    "stream": plan.state(step),
                    "recipe_sha256": hashlib.sha256(recipe.to_yaml().encode()).hexdigest(),
                    "metrics": {name: value if math.isfinite(value) else None for name, value in known.items()},
                    **progress,
                    "wall_s": wall_before + now - started,
                    "symptoms": symptoms.state(),
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                }
                averaged = average.state_dict() if average else None
                if sharded:
                    save_sharded(run, step, towers, optimizer.optimizer, state, writer=writer, average=averaged)
                elif writer:
                    writer.save(Checkpoint(step, towers.state_dict(), optimizer.state_dict(), state, averaged))
                saved_at = stepped = time.monotonic()
        if writer:
            writer.wait()
            if step < total:
                writer.patience_s = STOP_PATIENCE_S
        accelerator.wait_for_everyone()  # until the last checkpoint is published; only rank 0 waits for its copy
    return "done" if step >= total else "requeue"


def measure(
    evaluators: Evaluators, towers: model.Towers, average: WeightAverage | None, device: torch.device
) -> dict[str, float]:
    """`SET/METRIC` → value of the weights, and as ema/SET/METRIC of their average. Collective: every rank calls it."""

    def of_now() -> dict[str, float]:
        if dist.is_initialized():
            for buffer in layers.batch_statistics(towers):
                dist.broadcast(buffer, src=0)  # as they are saved, and as DDP's next forward pass would
        return evaluators.measure(towers, device)

    figures = of_now()
    if average:
        with average.in_place_of(towers):
            figures |= {f"{AVERAGED}{name}": value for name, value in of_now().items()}
    return figures


def no_negatives(photo_B: Tensor, token_BL: Tensor, positives: str) -> Tensor | None:
    """(B, K) int64: pairs that agree in a column are not each other's negatives; None where only a pair matches."""
    columns = {"pair": (), "image": (photo_B,), "image_and_text": (photo_B, text_key(token_BL))}[positives]
    return torch.stack(columns, dim=1) if columns else None


def check(recipe: Recipe, run: Path, step: int, progress: Mapping[str, Any], batch: int) -> None:
    """Stop a run that has gone wrong.

    Raises:
        TrainingError: too many non-finite steps in a row, or too many unreadable samples.
    """
    if progress["skipped_in_row"] >= recipe.train.max_skipped:
        raise TrainingError(
            f"step {step}: the gradient was not finite {progress['skipped_in_row']} times in a row. "
            f"Resume from the last checkpoint with a lower optim.lr or a longer optim.warmup_steps."
        )
    if progress["bad_samples"] > recipe.data.max_bad * max(step * batch, BAD_RATE_FLOOR):
        raise TrainingError(
            f"step {step}: {progress['bad_samples']} of {step * batch} samples were unreadable, more than "
            f"data.max_bad = {recipe.data.max_bad}. {run / 'quarantine.jsonl'} lists them."
        )


def learning_rate(step: int, optim: OptimConfig, total: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then as optim.schedule says."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
        return 0.5 * optim.lr * (1 + math.cos(math.pi * done))
    if optim.schedule == "wsd":  # Hu et al. 2024, "MiniCPM", with a linear decay
        return optim.lr * min(1.0, (total - step) / max(1.0, optim.decay_share * total))
    return optim.lr


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers inside the model, so that none of their state needs saving."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little")


def log_replaced(run: Path, step: int, batch: Batch) -> None:
    """Add this rank's replaced samples to RUN/quarantine.jsonl; single appended lines, so ranks may do so at once."""
    if batch.replaced:
        with (run / "quarantine.jsonl").open("a", encoding="utf-8") as file:
            for item in batch.replaced:
                file.write(json.dumps({"step": step, **item._asdict()}) + "\n")

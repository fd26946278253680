"""What `gpu-check` runs: each check returns figures, or raises.

The trainer is started as a user starts it, on generated pictures; what lies below it is called directly. On a CPU the
same checks run small, so that a machine without a GPU tests this file.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from open_clip.loss import ClipLoss
from torch import Tensor

from pipeline import memory, model, sharding, tokenizer
from pipeline.backward import forward_backward
from pipeline.checkpoint import MODEL, folder_name, sha256
from pipeline.data.cache import Cache
from pipeline.data.loader import Augmentation, Stream
from pipeline.data.plan import Plan, Share
from pipeline.data.store import ShardStore
from pipeline.data.tars import open_tars
from pipeline.data.transforms import normalizer
from pipeline.gpu_bench import STEPS, Bench, Figures, Skipped, expect
from pipeline.layers import parameter_groups
from pipeline.loss.info_nce import info_nce
from pipeline.loss.tiles import multiply
from pipeline.throughput import flops_per_sample, peak_flops


def trains(precision: str, bench: Bench) -> Figures:
    """The loss falls, and no step is skipped but fp16's first ones, which look for a scale."""
    if precision == "fp16" and bench.device.type == "cpu":
        raise Skipped("torch has no float16 training on a CPU")
    if precision == "bf16" and bench.precision != "bf16":
        raise Skipped("this device has no bfloat16")
    _, lines = bench.train(precision, train={"precision": precision})
    return _fallen(lines)


def compiles(bench: Bench) -> Figures:
    """Compiled towers learn as the others do."""
    _, plain = bench.train("plain", train={"precision": bench.precision})
    _, lines = bench.train("compiled", train={"precision": bench.precision, "compile": True})
    difference = abs(lines[0]["loss"] / plain[0]["loss"] - 1)
    expect(difference < 0.02, f"the first loss differs by {difference:.2%} from the one without torch.compile")
    return {**_fallen(lines), "first_loss_difference": difference, "samples_per_s_plain": plain[-1]["samples_per_s"]}


def trains_otherwise(bench: Bench) -> Figures:
    """The other loss, masked, with activations computed again and an average of the weights: it falls too."""
    _, lines = bench.train(
        "otherwise",
        train={"precision": bench.precision},
        loss={"kind": "sigmoid", "positives": "image_and_text", "init_scale": 10.0},
        model={"activation_checkpointing": True},
        optim={"ema": 0.9},
    )
    return _fallen(lines)


def caches_gradients(bench: Bench) -> Figures:
    """A batch in four parts has the loss and the gradient of the whole one, in float32 without TF32."""
    _, whole = bench.train("whole", train={"steps": 2})
    _, parts = bench.train("parts", train={"steps": 2, "micro_batch_size": bench.size.batch // 4})
    found = {name: abs(parts[0][name] / whole[0][name] - 1) for name in ("loss", "grad_norm")}
    expect(found["loss"] < 1e-5 and found["grad_norm"] < 1e-3, f"relative differences in the first step: {found}")
    return {**found, "memory_mb_whole": whole[-1]["memory_mb"], "memory_mb_parts": parts[-1]["memory_mb"]}


def resumes(precision: str, bench: Bench) -> Figures:
    """Interrupted halfway and resumed from a background checkpoint, a run has the same bits."""
    if precision == "fp16" and bench.device.type == "cpu":
        raise Skipped("torch has no float16 training on a CPU")
    asked = {"precision": precision or bench.precision, "deterministic": True}
    straight, whole = bench.train(f"straight {precision}", train=asked)
    bench.train(f"resumed {precision}", train={**asked, "steps": STEPS // 2})
    resumed, lines = bench.train(f"resumed {precision}", train=asked)
    differing = [one["step"] for one, other in zip(whole, lines, strict=True) if one["loss"] != other["loss"]]
    expect(not differing, f"the losses of steps {differing} differ")
    hashes = [sha256(run / "checkpoints" / folder_name(STEPS) / MODEL) for run in (straight, resumed)]
    expect(hashes[0] == hashes[1], "the losses are equal, the last weights differ")
    return {"steps_bitwise_equal": len(lines)}


def shards_weights(bench: Bench) -> Figures:
    """FSDP2 on one rank: the same gradient norm as without."""
    towers = bench.towers()
    other = copy.deepcopy(towers)
    with tempfile.NamedTemporaryFile() as file:
        backend = "nccl" if bench.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            sharding.shard(other)
            losses = [_step(bench, one, autocast=False) for one in (towers, other)]
            norm = torch.nn.utils.get_total_norm([one.grad for one in towers.parameters() if one.grad is not None])
            sharded = sharding.finish_gradients(other, float("inf"))
        finally:
            dist.destroy_process_group()
    difference = abs(float(sharded / norm) - 1)
    expect(difference < 1e-4, f"the gradient's norm differs by {difference:.1e}")
    return {"loss": losses[0], "loss_sharded": losses[1], "grad_norm_difference": difference}


def undoes_steps(bench: Bench) -> Figures:
    """The fused optimizer leaves all as it is where found_inf says so, and decides that on the device."""
    towers = bench.towers()
    optimizer = torch.optim.AdamW(parameter_groups(towers, lr=1e-3, weight_decay=0.2), lr=1e-3, fused=True)
    before = [value.clone() for value in towers.state_dict().values()]
    changed = []
    for found_inf in (1.0, 0.0):
        _step(bench, towers, autocast=False)
        optimizer.found_inf = torch.tensor(found_inf, device=bench.device)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = towers.state_dict().values()
        changed.append(sum(not torch.equal(old, new) for old, new in zip(before, now, strict=True)))
    expect(changed[0] == 0, f"{changed[0]} tensors were changed by a step that was to be skipped")
    expect(changed[1] > 0, "a step that was not to be skipped changed nothing")
    return {"changed_when_skipped": changed[0], "changed_otherwise": changed[1]}


def loses_at_size(bench: Bench) -> Figures:
    """InfoNCE beside open_clip's: seconds, memory, and relative differences from open_clip's in float32."""
    figures: Figures = {"pairs": bench.size.pairs, "width": bench.size.width}
    reference, allowed = None, {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 5e-2)}
    for name, loss in (("open_clip", ClipLoss()), ("ours", info_nce)):
        for precision in ("fp32", "bf16"):
            try:
                found, seconds, peak = _measured_loss(bench, loss, precision)
            except torch.cuda.OutOfMemoryError:
                expect(name == "open_clip", f"{precision}: out of memory")
                figures[f"{name}_{precision}"] = "out of memory"
                continue
            figures |= {f"{name}_{precision}_s": seconds, f"{name}_{precision}_mb": peak / 1e6}
            reference = found if reference is None else reference
            by_loss, *by_grads = [float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)]
            figures |= {f"{name}_{precision}_loss": by_loss, f"{name}_{precision}_grad": max(by_grads)}
            most = allowed[precision]
            if name == "ours":
                expect(by_loss < most[0] and max(by_grads) < most[1], f"{precision}: {by_loss:.1e}, {by_grads} off")
    return figures


def multiplies(bench: Bench) -> Figures:
    """Products of bfloat16 matrices are summed, and given, in float32."""
    count = min(bench.size.pairs, 4096)
    left, right = (features.detach().bfloat16() for features in _features(bench, count)[:2])
    product = multiply(left, right.T)
    exact = left.double() @ right.double().T
    difference = float((product - exact).abs().max() / exact.abs().max())
    expect(product.dtype == torch.float32, f"the product is {product.dtype}")
    expect(difference < 1e-5, f"{difference:.1e} off, so that sums are rounded to bfloat16")
    return {"difference": difference}


def loads(bench: Bench) -> Figures:
    """Loader processes → the device, out of pinned memory: pictures a second, and bytes a second of the copy alone."""
    size, towers = bench.size, bench.towers()
    cache = Cache(bench.folder / "cache", 1 << 30)
    tars = open_tars(str(bench.data), cache)
    plan = Plan([Share(tars.fingerprint, tars.shards.numbers("samples"))], seed=0, global_batch=size.batch)
    how = Augmentation(model.image_size(towers), (0.9, 1.0), "bicubic", 0.0, {"captions": 1.0})
    tokenize = tokenizer.load("open_clip", Path(), {"text_cfg": size.text_cfg})
    place = (plan, ShardStore([tars], cache), how, tokenize, tokenize.context_length, (0, size.batch), range(STEPS))
    cuda, copy_s, copied = bench.device.type == "cuda", 0.0, 0
    with Stream(*place, workers=size.workers, pin=cuda) as stream:
        for number, batch in enumerate(stream):
            began = time.perf_counter()
            if number == 0:
                first = began  # what happens once is over
            on_device = batch.image_BCSS.to(bench.device, non_blocking=True)
            bench.wait()
            copy_s += time.perf_counter() - began
            copied += batch.image_BCSS.nbytes
            expect(torch.equal(on_device.cpu(), batch.image_BCSS), f"batch {number} arrived with other pixels")
        expect(not cuda or batch.image_BCSS.is_pinned(), "the loader's memory is not pinned")
    figures = {"images_per_s": (STEPS - 1) * size.batch / (time.perf_counter() - first)}
    return figures | ({"copy_bytes_per_s": copied / copy_s} if cuda else {})


def fills_the_device(bench: Bench) -> Figures:
    """Towers of a common size, without a loader: pairs a second, MFU, the peak of memory beside the planned one."""
    size, cuda = bench.size, bench.device.type == "cuda"
    model_cfg = model.model_cfg(size.model, bench.model_config(size.model))
    context_length = int(model_cfg["text_cfg"]["context_length"])
    bench.forget_peak()
    towers = bench.towers(size.model)
    optimizer = torch.optim.AdamW(parameter_groups(towers, lr=1e-4, weight_decay=0.2), lr=1e-4, fused=True)
    planned = memory.of_towers(
        towers,
        width=int(model_cfg["embed_dim"]),
        context_length=context_length,
        precision="bf16",
        pairs=size.model_batch,
        device=bench.device.type,
    )
    for number in range(STEPS):
        if number == STEPS // 2:
            bench.wait()
            began = time.perf_counter()
        _step(bench, towers, autocast=True, pairs=size.model_batch, length=context_length)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    bench.wait()
    per_s = (STEPS - STEPS // 2) * size.model_batch / (time.perf_counter() - began)
    figures: Figures = {"samples_per_s": per_s, "planned_mb": planned.peak / 1e6}
    if cuda:
        figures["peak_mb"] = torch.cuda.max_memory_allocated(bench.device) / 1e6
        ratio = figures["planned_mb"] / figures["peak_mb"]
        expect(0.8 < ratio < 1.3, f"{figures['planned_mb']:.0f} MB were planned, {figures['peak_mb']:.0f} taken")
    if peak := peak_flops(bench.device, "bf16"):
        flops = flops_per_sample(towers, model.image_size(towers), context_length)
        figures["mfu"] = per_s * flops / peak if flops else None
    return figures


CHECKS: dict[str, Callable[[Bench], Figures]] = {
    "multiply": multiplies,
    "loss": loses_at_size,
    "memory and speed": fills_the_device,
    "found_inf": undoes_steps,
    "fsdp2": shards_weights,
    "loader": loads,
    **{f"train {precision}": functools.partial(trains, precision) for precision in ("fp32", "bf16", "fp16")},
    "compile": compiles,
    "micro-batches": caches_gradients,
    "other settings": trains_otherwise,
    "resume": functools.partial(resumes, ""),
    "resume fp16": functools.partial(resumes, "fp16"),
}


def _fallen(lines: list[dict[str, Any]]) -> Figures:
    losses = [line["loss"] for line in lines]
    skipped = sum(line["skipped"] for line in lines)
    expect(None not in losses[-5:], f"losses are not finite: {losses}")
    first, last = losses[0], sum(losses[-5:]) / 5
    expect(last < 0.95 * first, f"the loss went from {first:.3f} to {last:.3f} only, in {len(lines)} steps")
    expect(skipped <= 3, f"{skipped} of {len(lines)} steps were skipped")
    rates = {name: lines[-1][name] for name in ("samples_per_s", "memory_mb")}
    return {"first_loss": first, "last_losses": last, "skipped": skipped, **rates}


def _step(bench: Bench, towers: Any, *, autocast: bool, pairs: int = 0, length: int = 0) -> float:
    """The loss of random pairs, the same each time, and its gradients; to bfloat16, or in float32."""
    generator = torch.Generator().manual_seed(0)
    pairs, length = pairs or bench.size.batch, length or bench.size.text_cfg["context_length"]
    image_BCSS = torch.randint(0, 256, (pairs, 3, *model.image_size(towers)), dtype=torch.uint8, generator=generator)
    token_BL = torch.randint(1, 49407, (pairs, length), generator=generator)
    normalize = normalizer(towers.visual.image_mean, towers.visual.image_std, bench.device)
    batch = image_BCSS.to(bench.device), token_BL.to(bench.device)
    if autocast:
        return float(forward_backward(bench.accelerator, towers, *batch, info_nce, prepare=normalize, parts=1, seed=0))
    loss = info_nce(*towers(normalize(batch[0]), batch[1]))
    loss.backward()
    return float(loss.detach())


def _features(bench: Bench, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(bench.device).manual_seed(0)
    made = [torch.randn(count, bench.size.width, device=bench.device, generator=generator) for _ in range(2)]
    image, text = (F.normalize(features, dim=1).requires_grad_() for features in (made[0], made[0] + made[1]))
    return image, text, torch.tensor(14.3, device=bench.device, requires_grad=True)


def _measured_loss(bench: Bench, loss: Callable[..., Tensor], precision: str) -> tuple[list[Tensor], float, int]:
    """([loss, gradients], seconds of the second of two rounds, most bytes beside the features; 0 on a CPU)."""
    inputs, cuda = _features(bench, bench.size.pairs), bench.device.type == "cuda"
    bench.forget_peak()
    before = torch.cuda.memory_allocated() if cuda else 0
    for _ in range(2):
        for value in inputs:
            value.grad = None
        bench.wait()
        began = time.perf_counter()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = loss(*inputs)
        found.backward()
        bench.wait()
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    grads = [value.grad for value in inputs if value.grad is not None]
    return [value.float().cpu() for value in (found.detach(), *grads)], seconds, peak

"""How fast training goes: pairs a second, waiting for data, the time left, and how much of the device it uses."""

from __future__ import annotations

import logging
import math
import resource
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.blank import blank_copy

log = logging.getLogger(__name__)

# open_clip's CLIP or CustomTextCLIP; open_clip has no type annotations.
Towers = Any

WINDOW = 50
# BatchNorm wants more than one sample.
FLOPS_BATCH = 2
# What open_clip and timm, and Hugging Face, call the switch for activation checkpointing on their modules.
CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")

# Device → what its data sheet (NVIDIA's) gives in dense TFLOP/s, float32 accumulation, without sparsity. The names are
# torch.cuda.get_device_name()'s, whole: a part of an A100 (MIG) or a variant with other clocks is not an A100.
_H100_SXM = {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}
_A100 = {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}
_V100_SXM = {"fp16": 125.0, "fp32": 15.7}
_V100_PCIE = {"fp16": 112.0, "fp32": 14.0}
PEAK_TFLOPS = {
    "NVIDIA B200": {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0, "fp32": 75.0},
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0},
    "NVIDIA H100 NVL": {"bf16": 835.0, "fp16": 835.0, "tf32": 417.5, "fp32": 60.0},
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A10": {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2},
    "NVIDIA A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "NVIDIA L4": {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3},
    "NVIDIA L40S": {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6},
    "NVIDIA GeForce RTX 3090": {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6},
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla T4": {"fp16": 65.0, "fp32": 8.1},
}


class Throughput:
    """Rates over the last steps.

    A process's first step also pays for what happens once (compiling, choosing kernels, filling the loader), so the
    window begins anew after it.

    Args:
        flops_per_sample: of both towers, forward and backward; None where it is not known.
        peak_flops: of one device, a second; None where it is not known.
        devices: how many devices take part in a step.
        window: steps that the rates are taken over.
    """

    def __init__(
        self,
        *,
        flops_per_sample: float | None = None,
        peak_flops: float | None = None,
        devices: int = 1,
        window: int = WINDOW,
    ) -> None:
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._devices = devices
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=window)
        self._added = 0

    def add(self, samples: int, seconds: float, data_wait_s: float) -> None:
        """Take in one step: pairs over all ranks, seconds since the step before, and how many of them data took."""
        self._added += 1
        if self._added == 2:
            self._steps.clear()
        self._steps.append((samples, seconds, data_wait_s))

    @property
    def smooth_samples_per_s(self) -> float:
        """Pairs a second over the window: all its pairs by all its time, so slow steps count for what they took."""
        return sum(samples for samples, _, _ in self._steps) / max(self._seconds, 1e-9)

    @property
    def data_wait_share(self) -> float:
        """Part of the window's time, 0 to 1, that went by waiting for a batch."""
        return sum(wait for _, _, wait in self._steps) / max(self._seconds, 1e-9)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation over the window, 0 to 1 (Chowdhery et al. 2022, appendix B).

        None where the device's peak or the model's count is not known. What is computed twice to save memory, and
        the loss, do not count.
        """
        if self._flops_per_sample is None or self._peak_flops is None:
            return None
        return self._flops_per_sample * self.smooth_samples_per_s / (self._peak_flops * self._devices)

    def eta_s(self, steps_left: int) -> float | None:
        """Seconds that so many steps take at the window's pace, evaluation and saving aside; None before the first."""
        return steps_left * self._seconds / len(self._steps) if self._steps else None

    @property
    def _seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self._steps)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The most floating-point operations a second that a device can do; None for a CPU or a device not in the table.

    Args:
        device: where the model runs.
        precision: fp32, bf16, fp16 or fp64; fp32 counts as TF32 where torch may use that for matrix products.
    """
    if device.type != "cuda":
        return None
    if precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name(device), {}).get(precision)
    return peak * 1e12 if peak else None


def flops_per_sample(
    towers: Towers,
    image_size: int | Sequence[int],
    context_length: int,
    *,
    device: str | torch.device = "meta",
) -> float | None:
    """Floating-point operations that one pair costs, forward and backward through both towers.

    Counted by torch on a copy of the towers without their numbers; the towers, their gradients and the random
    state stay as they are. A multiplication and an addition are two. What is frozen needs no backward pass and costs
    none. The loss (2 · N · D a product) is left out, and so is what activation checkpointing computes again.

    Args:
        towers: as built, before DDP, sharding or torch.compile wrap them.
        image_size: pixels of a side, or (height, width).
        context_length: tokens of a text.
        device: where the copy is. `meta` allocates and computes nothing; a tower that cannot do with that is run
            once on the CPU.

    Returns:
        None, with a line in the log, where that fails too.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    try:
        copied = _without_numbers(towers, device)
        dtype = next(copied.visual.parameters()).dtype
        image_BCHW = torch.zeros(FLOPS_BATCH, 3, height, width, dtype=dtype, device=device)
        token_BL = torch.zeros(FLOPS_BATCH, context_length, dtype=torch.long, device=device)
        # Patch dropout may draw on the CPU, wherever the images are; fused attention has no formula on every device.
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
            total = copied.encode_image(image_BCHW).sum() + copied.encode_text(token_BL).sum()
            if total.requires_grad:
                total.backward()
    except (RuntimeError, TypeError, ValueError) as error:
        if torch.device(device).type == "meta":  # Hugging Face's towers look at the values of their mask
            return flops_per_sample(towers, image_size, context_length, device="cpu")
        log.info("the towers' FLOPs cannot be counted, so no MFU is given: %s", str(error).split("\n")[0])
        return None
    return counter.get_total_flops() / FLOPS_BATCH


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in 10⁶ bytes: of tensors on a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _without_numbers(towers: Towers, device: str | torch.device) -> Towers:
    """A copy that trains what the towers train, with zeros (on `meta`, nothing) in place of the weights."""
    copied = blank_copy(towers, lambda tensor: torch.zeros_like(tensor, device=device, requires_grad=False))
    for module in copied.modules():
        for name in CHECKPOINTING:
            if getattr(module, name, False):
                setattr(module, name, False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # at the same cost, and SyncBatchNorm asks for no GPU
    return copied


def _convolution_backward(
    grad_shape: Sequence[int],
    image_shape: Sequence[int],
    weight_shape: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    """Each of the two gradients costs what the forward pass did.

    torch's own formula counts the weights' gradient as if each input channel met each output channel, which for
    depthwise convolutions is too much by their number of groups.
    """
    places = image_shape if transposed else grad_shape
    forward = 2 * places[0] * math.prod(places[2:]) * math.prod(weight_shape)
    return forward * sum(output_mask[:2])


FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward}

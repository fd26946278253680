"""Rates of training, and the operations that a pair costs, against counts by hand."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import open_clip
import psutil
import pytest
import torch
from torch import nn

from pipeline import throughput
from pipeline.throughput import Throughput, flops_per_sample, peak_flops, peak_memory_mb

SIZE, PATCH, WIDTH, LENGTH, VOCABULARY, EMBED = 32, 8, 64, 12, 100, 48
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 2, "head_width": 16}
TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 4, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}


def towers(vision: dict | None = None, **changes) -> nn.Module:
    return open_clip.CLIP(EMBED, {**(vision or VISION), **changes}, TEXT)


def block(tokens: int) -> int:
    """Multiply-adds of a transformer layer: q, k, v and the output; scores and mixture; two layers of 4 × width."""
    return tokens * WIDTH * WIDTH * (3 + 1) + 2 * tokens * tokens * WIDTH + tokens * WIDTH * 4 * WIDTH * 2


def image_flops(patches: int = (SIZE // PATCH) ** 2) -> int:
    """Forward and backward; pixels need no gradient, so the projection of patches counts twice and not three times."""
    embedding = 3 * PATCH * PATCH * WIDTH * (SIZE // PATCH) ** 2
    return 2 * (2 * embedding + 3 * (2 * block(patches + 1) + WIDTH * EMBED))


def text_flops() -> int:
    return 2 * 3 * (block(LENGTH) + WIDTH * EMBED)


def test_rates_of_a_step_and_of_the_window():
    rates = Throughput(window=2)
    for seconds, wait in ((9.0, 9.0), (4.0, 0.0), (1.0, 0.2), (3.0, 1.0)):
        rates.add(8, seconds, wait)
    assert rates.smooth_samples_per_s == pytest.approx(16 / 4)
    assert rates.data_wait_share == pytest.approx(1.2 / 4)
    assert rates.eta_s(10) == pytest.approx(20)


def test_the_first_step_counts_until_there_is_a_second():
    """It pays for what happens once, and would bend every estimate for a window."""
    rates = Throughput()
    rates.add(8, 40.0, 30.0)
    assert rates.eta_s(2) == 80
    for _ in range(3):
        rates.add(8, 2.0, 0.0)
    assert rates.smooth_samples_per_s == 4
    assert rates.data_wait_share == 0
    assert rates.eta_s(2) == 4


def test_before_the_first_step_nothing_is_known():
    rates = Throughput(flops_per_sample=1.0, peak_flops=1.0)
    assert rates.smooth_samples_per_s == rates.data_wait_share == 0
    assert rates.eta_s(5) is None


def test_mfu_is_the_share_of_all_devices_peak():
    rates = Throughput(flops_per_sample=50e9, peak_flops=100e12, devices=4)
    rates.add(4000, 1.0, 0.0)
    assert rates.mfu == pytest.approx(50e9 * 4000 / 400e12)


@pytest.mark.parametrize("known", [{"flops_per_sample": 1.0}, {"peak_flops": 1.0}])
def test_mfu_is_not_guessed(known):
    rates = Throughput(**known)
    rates.add(8, 1.0, 0.0)
    assert rates.mfu is None


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp64", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
    ],
)
def test_the_peak_of_a_device_by_its_whole_name(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda"), precision)
    assert found == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_fp32_counts_as_tf32_where_that_is_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert peak_flops(torch.device("cuda"), "fp32") == 156e12
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_every_peak_is_plausible():
    """Tensor cores beat the others, and TF32 is never above bf16."""
    for name, peaks in throughput.PEAK_TFLOPS.items():
        assert peaks["fp32"] < peaks["fp16"], name
        assert peaks["fp32"] <= peaks.get("tf32", peaks["fp32"]) <= peaks["fp16"], name
        assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"], name


def test_a_vit_costs_what_is_counted_by_hand():
    assert flops_per_sample(towers(), SIZE, LENGTH) == image_flops() + text_flops()


def test_patch_dropout_costs_less():
    found = flops_per_sample(towers(patch_dropout=0.5), SIZE, LENGTH)
    assert found == image_flops((SIZE // PATCH) ** 2 // 2) + text_flops()


def test_what_is_frozen_costs_its_forward_pass():
    model = towers()
    model.visual.requires_grad_(False)
    embedding = 3 * PATCH * PATCH * WIDTH * (SIZE // PATCH) ** 2
    forward = 2 * (embedding + 2 * block((SIZE // PATCH) ** 2 + 1) + WIDTH * EMBED)
    assert flops_per_sample(model, SIZE, LENGTH) == forward + text_flops()
    model.requires_grad_(False)
    assert flops_per_sample(model, SIZE, LENGTH) == forward + text_flops() // 3


def test_what_is_computed_twice_counts_once():
    model = towers()
    model.set_grad_checkpointing()
    assert flops_per_sample(model, SIZE, LENGTH) == image_flops() + text_flops()
    assert model.transformer.grad_checkpointing


def test_the_count_is_the_same_where_numbers_are_computed():
    assert flops_per_sample(towers(), SIZE, LENGTH, device="cpu") == image_flops() + text_flops()


@pytest.mark.parametrize(
    ("vision", "size"),
    [
        (RESNET, 64),
        ({"timm_model_name": "resnet18", "image_size": 64, "timm_pool": "", "timm_proj": "linear"}, 64),
        (
            {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "token", "timm_proj": "linear"},
            224,
        ),
    ],
    ids=["ModifiedResNet", "timm resnet", "timm vit"],
)
def test_other_image_towers_are_counted_too(vision, size):
    """Nearly three times the forward pass: all but the first layer's gradient by its pixels."""
    model = towers(vision)
    whole = flops_per_sample(model, (size, size), LENGTH)
    forward = flops_per_sample(model.requires_grad_(False), (size, size), LENGTH)
    assert 2.8 * forward < whole < 3 * forward


def test_a_depthwise_convolution_costs_three_times_its_forward_pass():
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 1)
            self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)

        def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            return self.depthwise(self.stem(image_BCHW)).mean((2, 3))

    model = open_clip.CLIP(32, VISION, TEXT)
    model.visual = Image()
    found = flops_per_sample(model, 8, LENGTH)
    model.visual.requires_grad_(False)
    text = flops_per_sample(model, 8, LENGTH) - 2 * 8 * 8 * (3 * 32 + 32 * 9)
    assert found - text == 2 * 8 * 8 * (2 * 3 * 32 + 3 * 32 * 9)


def test_counting_leaves_the_towers_and_the_random_state_alone():
    model = towers(patch_dropout=0.5).eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert flops_per_sample(model, SIZE, LENGTH)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())
    assert not model.training


def test_batch_statistics_stay_as_they_are():
    model = towers(RESNET)
    assert flops_per_sample(model, 64, LENGTH)
    assert not any(int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked"))


class Curious(nn.Linear):
    """Looks at a value before it goes on, as Hugging Face's towers do at their mask."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) if inputs.sum().item() >= 0 else inputs


def test_a_tower_that_looks_at_values_is_run_once():
    model = towers()
    model.transformer.resblocks[0].mlp.c_proj = Curious(4 * WIDTH, WIDTH)
    assert flops_per_sample(model, SIZE, LENGTH) == image_flops() + text_flops()


def test_a_tower_that_cannot_be_counted_is_no_reason_to_stop(caplog):
    caplog.set_level(logging.INFO)
    model = towers()
    model.transformer.resblocks[0].mlp.c_proj = nn.Linear(WIDTH, WIDTH)
    assert flops_per_sample(model, SIZE, LENGTH) is None
    assert "no MFU" in caplog.text


def test_peak_memory_lies_between_what_is_held_and_what_there_is():
    held = psutil.Process().memory_info().rss / 1e6
    assert 0.99 * held <= peak_memory_mb(torch.device("cpu")) <= psutil.virtual_memory().total / 1e6


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_knows_the_systems_units(monkeypatch, platform, unit):
    monkeypatch.setattr(throughput.sys, "platform", platform)
    monkeypatch.setattr(throughput.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5_000_000))
    assert peak_memory_mb(torch.device("cpu")) == 5 * unit


def test_a_cuda_device_is_asked_for_its_own_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000)
    assert peak_memory_mb(torch.device("cuda")) == 3

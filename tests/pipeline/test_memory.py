"""The memory plan beside what real tensors take."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from pipeline import activations, layers, memory, model
from pipeline.__main__ import main
from pipeline.activations import Activations, Alive, Line, run, run_fake
from pipeline.loss.info_nce import info_nce
from pipeline.memory import Memory
from tests.pipeline.towers import CONFIGS, TEXT

LENGTH = 8
KINDS = ["vit", "resnet", "timm vit", "timm resnet", "bert"]


@pytest.fixture
def towers(request, tmp_path):
    name = request.param
    if name != "bert":
        return model.build(CONFIGS[name])
    from transformers import BertConfig

    BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12,
    ).save_pretrained(tmp_path)  # fmt: skip
    text_cfg = {"hf_model_name": str(tmp_path), "context_length": LENGTH, "hf_pooler_type": "cls_pooler"}
    return model.build({**CONFIGS["vit"], "text_cfg": text_cfg})


def each(*names):
    return pytest.mark.parametrize("towers", names, indirect=True)


@each(*KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensors_without_content_keep_what_real_ones_keep(towers, precision):
    planned = run_fake(towers, 3, LENGTH, precision=precision, device="cpu")
    assert all(parameter.grad is None for parameter in towers.parameters())
    real = run(towers.train(), 3, LENGTH, precision=precision)
    # In bfloat16 a CPU keeps attention's sums, and BatchNorm's, in another type than tensors without content have.
    assert planned.kept == pytest.approx(real.kept, rel=0 if precision == "fp32" else 1e-2)
    assert planned.peak == pytest.approx(real.peak, rel=2e-2)
    assert planned.peak > planned.kept > 1000


@each("vit", "timm vit", "bert")
def test_a_block_that_is_recomputed_keeps_its_input_alone(towers):
    before = run_fake(towers, 16, LENGTH, precision="fp32", device="cpu")
    model.checkpoint_activations(towers)
    after = run_fake(towers, 16, LENGTH, precision="fp32", device="cpu")
    assert after.kept < 0.5 * before.kept
    assert after.peak - after.kept > 0.02 * before.kept  # the block of the moment, whole
    assert after.kept == run(towers.train(), 16, LENGTH, precision="fp32").kept


@each("vit")
def test_a_locked_tower_keeps_nothing(towers):
    whole = run_fake(towers, 16, LENGTH, precision="fp32", device="cpu").kept
    layers.lock(towers, image=0, text=None)
    assert run_fake(towers, 16, LENGTH, precision="fp32", device="cpu").kept < 0.7 * whole


@each("vit", "resnet")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bytes_are_a_line_in_the_number_of_pairs(towers, device):
    """Of a CUDA device, too, which need not be there."""
    found = activations.activations(towers, LENGTH, precision="bf16", device=device)
    third = run_fake(towers, 1000, LENGTH, precision="bf16", device=device, backward=False)
    assert found.kept.at(1000) == pytest.approx(third.kept, rel=1e-3)
    assert found.kept.fixed > 0  # weights in bfloat16


def test_on_cuda_attention_keeps_no_scores():
    """They would be heads × tokens² numbers a layer."""
    attention, kept = F.scaled_dot_product_attention, {}
    for length in (32, 64, 128):
        towers = model.build({**CONFIGS["vit"], "text_cfg": {**TEXT, "context_length": length}})
        kept[length] = run_fake(towers, 256, length, precision="fp32", device="cuda", backward=False).kept
    assert F.scaled_dot_product_attention is attention
    assert kept[128] - kept[64] == pytest.approx(2 * (kept[64] - kept[32]), rel=1e-2)


def test_memory_that_is_given_back_counts_no_more():
    alive = Alive(set())
    with alive:
        first = torch.zeros(1000)
        view = first[10:]
        del first
        assert weakref.ref(view.untyped_storage())() is not None
        del view
        torch.zeros(500)
    assert alive.most == 4000


def features(pairs, width, dtype=torch.float32):
    image, text = (F.normalize(torch.randn(pairs, width, dtype=dtype), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(10.0, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("pairs", "tile"), [(300, 300), (512, 128), (300, 1000)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_the_loss_takes_what_was_planned(pairs, tile, precision):
    inputs, alive = features(pairs, 64, torch.float64 if precision == "fp64" else torch.float32), Alive(set())
    with alive, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        torch.autograd.grad(info_nce(*inputs, tile=tile), inputs)
    planned = memory.loss_bytes(pairs, pairs, 64, precision=precision, tile=tile, device="cpu")
    assert planned == pytest.approx(alive.most, rel=0.35)


def test_open_clips_loss_takes_what_it_does():
    inputs, alive = features(512, 64), Alive(set())
    with alive:
        total = ClipLoss()(*inputs)
    planned = memory.open_clip_loss_bytes(512, 512, 64, precision="fp32")
    assert planned == pytest.approx(alive.most, rel=0.3)
    assert total > 0
    ours = memory.loss_bytes(65536, 65536, 512, precision="fp32", tile=None, device="cuda")
    assert ours < 0.1 * memory.open_clip_loss_bytes(65536, 65536, 512, precision="fp32")


def planned(**changes) -> Memory:
    towers = model.build(CONFIGS["vit"])
    settings = {"width": 16, "context_length": LENGTH, "precision": "fp32", "pairs": 64, "device": "cpu"}
    return memory.of_towers(towers, **{**settings, **changes})


def test_weights_and_their_companions_are_counted():
    towers = model.build(CONFIGS["vit"])
    weights = 4 * sum(value.numel() for value in (*towers.parameters(), *towers.buffers()))
    trained = 4 * sum(value.numel() for value in towers.parameters())
    found = planned(average=True)
    assert (found.weights, found.average, found.gradients, found.optimizer) == (weights, weights, trained, 2 * trained)
    assert planned().average == 0
    cut = planned(sharded=True, world=4)
    assert (cut.weights, cut.optimizer) == (weights / 4, trained / 2)


lines = st.builds(Line, st.floats(0, 1e6), st.floats(1, 1e4))


@given(kept=lines, passing=lines, loss=st.floats(0, 1e6), features=st.floats(0, 1e5), capacity=st.floats(0, 3e6))
def test_the_largest_micro_batch_fits_and_one_pair_more_does_not(kept, passing, loss, features, capacity):
    found = Memory(1.0, 1.0, 2.0, 0.0, 5.0, features, Activations(kept, passing), loss, 100, None)
    most = found.largest_micro_batch(capacity)

    def peak(pairs):
        return dataclasses.replace(found, micro_batch=pairs).peak

    assert most == 0 or peak(most) <= capacity
    # With all pairs at once no features are kept: that may fit where a pair fewer does not.
    assert most == 100 or (peak(most + 1) > capacity and peak(100) > capacity)


def test_the_loss_comes_beside_all_activations_or_between_passes():
    found = Memory(0.0, 0.0, 0.0, 0.0, 0.0, 7.0, Activations(Line(0, 1), Line(0, 0.1)), 50.0, 100, None)
    assert found.peak == 100 + 50
    assert dataclasses.replace(found, micro_batch=10).peak == 7 + 50
    assert dataclasses.replace(found, micro_batch=80).peak == 7 + 88


def test_the_command_names_parts_and_what_fits(recipe, capsys):
    path = str(recipe())
    assert main(["plan-memory", path, "train.batch_size=64", "--gpu-gb", "24", "--world", "2"]) == 0
    said = capsys.readouterr().out
    assert "a rank of 2, 32 of 32 pairs at a time" in said
    assert "activations that are kept" in said
    assert "all 32" in said
    assert main(["plan-memory", path, "--gpu-gb", "0.001"]) == 0
    assert "not one pair" in capsys.readouterr().out

"""Warnings about a run that goes wrong quietly: once each, and none on a healthy run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest

from pipeline.symptoms import Symptoms

BATCH = 4096
UNIFORM = math.log(BATCH)
WARMUP = 1000


def healthy(step: int) -> float:
    """A loss like those of large runs: at ln N while it warms up, then down as a power of the step, with noise."""
    noise = random.Random(step).gauss(0, 0.08)
    return UNIFORM * max(1.0, step / 400) ** -0.35 + noise


def feed(symptoms: Symptoms, steps: Iterator[int] | range, loss=healthy, **changes) -> list[str]:
    """All warnings over some steps; a change is a value, or a function of the step."""
    found = []
    for step in steps:
        values = {"global_batch": BATCH, "logit_scale": 30.0, "at_clamp": False, "grad_norm": 0.5, "skipped": False}
        values |= {name: change(step) if callable(change) else change for name, change in changes.items()}
        found += symptoms.check(step, loss=loss(step), **values)
    return found


def collapsed(step: int) -> float:
    return UNIFORM + random.Random(step).gauss(0, 0.02)


def test_a_healthy_run_is_left_alone():
    """As is one whose scale reaches its clamp for a while, and that skips a step now and then."""
    symptoms = Symptoms(warmup_steps=WARMUP)
    found = feed(
        symptoms,
        range(1, 20_001),
        at_clamp=lambda step: step % 3000 > 2600,
        logit_scale=lambda step: 100.0 if step % 3000 > 2600 else 60.0,
        skipped=lambda step: step % 50 == 0,
    )
    assert found == []


def test_collapse_is_told_once_with_the_way_out():
    symptoms = Symptoms(warmup_steps=WARMUP)
    assert feed(symptoms, range(1, WARMUP + 501), collapsed) == []
    (warning,) = feed(symptoms, range(WARMUP + 501, WARMUP + 5000), collapsed)
    assert f"step {WARMUP + 501}" in warning
    assert f"ln N = {UNIFORM:.3f}" in warning
    assert "optim.lr" in warning


def test_it_is_told_again_after_a_recovery():
    symptoms = Symptoms(warmup_steps=0)
    assert len(feed(symptoms, range(1, 2000), collapsed)) == 1
    assert feed(symptoms, range(2000, 4000)) == []
    assert len(feed(symptoms, range(4000, 6000), collapsed)) == 1


@pytest.mark.parametrize("distance", [0.97, 1.03])
def test_a_loss_beside_ln_n_is_no_collapse(distance):
    """Above it too: embeddings that are wrong are not embeddings without information."""
    assert feed(Symptoms(warmup_steps=0), range(1, 3000), lambda step: UNIFORM * distance) == []


def test_one_spike_does_not_hide_a_collapse():
    symptoms = Symptoms(warmup_steps=0)
    assert len(feed(symptoms, range(1, 1000), lambda step: UNIFORM * (1.5 if step == 250 else 1))) == 1


def test_a_batch_of_one_and_the_sigmoid_loss_have_no_such_mark():
    assert feed(Symptoms(warmup_steps=0), range(1, 2000), lambda step: 0.0, global_batch=1) == []
    assert feed(Symptoms(warmup_steps=0, info_nce=False), range(1, 2000), collapsed) == []


@pytest.mark.parametrize(("scale", "word"), [(100.0, "upper clamp, 100"), (1.0, "lower clamp, 1,")])
def test_a_scale_at_its_clamp_is_told_by_side_and_once(scale, word):
    symptoms = Symptoms(warmup_steps=0)
    assert feed(symptoms, range(1, 501), at_clamp=True, logit_scale=scale) == []
    (warning,) = feed(symptoms, range(501, 3000), at_clamp=True, logit_scale=scale)
    assert word in warning
    assert feed(symptoms, range(3000, 3002)) == []
    assert len(feed(symptoms, range(3002, 4000), at_clamp=True, logit_scale=scale)) == 1


def test_a_break_starts_the_count_anew():
    found = feed(Symptoms(warmup_steps=0), range(1, 3000), at_clamp=lambda step: step % 500 != 0, logit_scale=100.0)
    assert found == []


def test_many_skipped_steps_are_told_once():
    """Their loss is not a number, and must not become the smoothed one."""
    symptoms = Symptoms(warmup_steps=0)
    found = feed(
        symptoms,
        range(1, 2000),
        lambda step: math.nan if step % 8 == 0 else healthy(step),
        skipped=lambda step: step % 8 == 0,
    )
    assert len(found) == 1
    assert "skipped" in found[0]
    assert math.isfinite(symptoms.state()["loss"])


def test_a_gradient_scaler_may_search_for_its_scale():
    found = feed(Symptoms(warmup_steps=0), range(1, 500), skipped=lambda step: step <= 9)
    assert found == []


def test_steps_count_and_not_lines():
    """A run that is looked at each 50th step warns at the same step."""
    found = feed(Symptoms(warmup_steps=0), range(50, 2001, 50), collapsed)
    assert [warning.split(":")[0] for warning in found] == ["step 550"]


def test_the_smoothed_loss_follows_steps_and_not_lines():
    often, seldom = Symptoms(warmup_steps=0), Symptoms(warmup_steps=0)
    for symptoms, each in ((often, 1), (seldom, 50)):
        feed(symptoms, range(each, 501, each), lambda step: 6.0 if step > 50 else 8.0)
    assert seldom.state()["loss"] == pytest.approx(often.state()["loss"])
    assert 6 < seldom.state()["loss"] < 6.1


def test_the_share_of_steps_at_the_clamp():
    symptoms = Symptoms(warmup_steps=0)
    assert symptoms.clamp_share == 0
    feed(symptoms, range(1, 101), at_clamp=lambda step: step > 75)
    assert symptoms.clamp_share == 0.25


def test_a_resumed_run_goes_on_as_if_never_stopped():
    """Whatever had been told stays told, and what was on its way comes at the same step."""
    curves = {"at_clamp": lambda step: step > 300, "logit_scale": 100.0}
    whole, first = Symptoms(warmup_steps=0), Symptoms(warmup_steps=0)
    expected = feed(whole, range(1, 2000), collapsed, **curves)
    assert len(expected) == 2
    found = feed(first, range(1, 600), collapsed, **curves)
    assert len(found) == 1
    second = Symptoms(warmup_steps=0, state=json.loads(json.dumps(first.state())))
    assert found + feed(second, range(600, 2000), collapsed, **curves) == expected
    assert second.state() == whole.state()
    assert second.clamp_share == whole.clamp_share

"""Half an hour in which something dies every five minutes: what of the machine's time is left for training.

make endurance
"""

from __future__ import annotations

import itertools
import statistics
import time

import pytest

from tests.launch.test_slurm import Site, kill_task, lines_of, same_steps, steps_of
from tests.processes import last_step

__all__ = ["steps_of"]

MINUTES, EVERY_MINUTES = 30, 5
# Seconds a step, most of it asleep, so that two ranks on a small machine have what two nodes have.
STEP_S = 0.5
LOST_S, GOODPUT = 45, 0.85


@pytest.mark.endurance
def test_goodput_under_kills(new_cluster, dataset, steps_of, tmp_path, capsys):
    site = Site(new_cluster(nodes=3), tmp_path, dataset, step_s=STEP_S)
    site.describe(max_restarts=20)
    run = tmp_path / "run"
    constant = "optim.schedule=constant"  # so that the rate does not depend on how far the run was meant to go
    job = site.submit(run, "checkpoint.every_steps=10", "train.timeout_s=60", constant, steps=100_000)
    site.reach(job, run, 1)
    began, lost = time.monotonic(), []
    for number in itertools.count():
        due = began + 60 * EVERY_MINUTES * (number + 1)
        if due >= began + 60 * MINUTES:
            break
        time.sleep(due - time.monotonic())
        killed = time.monotonic()
        if number % 2:
            node = site.slurm.job(job)["BatchHost"]
            site.slurm.kill_node(node)
        else:
            node = ""
            kill_task(site, job)
        step, restarted = last_step(run), False
        while not restarted or last_step(run) <= step:
            if not restarted:  # the last steps before it may be written after the kill
                restarted, step = int(site.slurm.job(job)["Restarts"]) > number, max(step, last_step(run))
            assert time.monotonic() - killed < 120, site.said(run)
            time.sleep(0.2)
        lost.append(time.monotonic() - killed)
        if node:
            site.slurm.start_node(node)
    time.sleep(max(0.0, began + 60 * MINUTES - time.monotonic()))
    steps, spent = last_step(run) - 1, time.monotonic() - began
    assert site.launch("cancel", run).returncode == 0
    site.slurm.wait(job, "CANCELLED")
    lines = lines_of(run)
    # What a step takes while nothing happens, from the trainer's own clock.
    step_s = statistics.median(after["wall_s"] - before["wall_s"] for before, after in itertools.pairwise(lines))
    goodput = steps * step_s / spent
    with capsys.disabled():
        told = ", ".join(f"{seconds:.0f}" for seconds in lost)
        print(f"\n{steps} steps in {spent:.0f} s, {goodput:.1%} of undisturbed; lost by each kill: {told} s")  # noqa: T201
    same_steps(run, steps_of(2, len(lines), constant))
    assert goodput >= GOODPUT
    assert max(lost) <= LOST_S

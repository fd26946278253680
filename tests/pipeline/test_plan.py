"""The order of samples: pure, complete, the same for every topology, and never changed unnoticed."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import plan as planning
from pipeline.data.philox import SampleUniforms
from pipeline.data.plan import Plan, PlanError, Share, batch_sha256, layout, rank_bounds

# Raised together with PLAN_VERSION, and never else: an old run would resume in another order.
GOLDEN = "b06c48d283cff13eb118eac81cd9254d817b5fa33b8bf535dcdd85b731673584"
GOLDEN_SIZES = (40, 3, 25, 1, 60, 17)


def one(sizes, seed, batch, lanes=1, window=None, tail="drop", fingerprint="f"):
    return Plan([Share(fingerprint, sizes)], seed, batch, lanes, window, tail)


def order(plan, steps):
    return np.concatenate([plan.global_ids(step) for step in steps])


@st.composite
def plans(draw, tails=("drop", "pad", "wrap"), most=3):
    """One to three datasets in any lanes, windows and weights."""
    batch = draw(st.integers(3 * most, 24))
    shares = []
    for number in range(draw(st.integers(1, most))):
        sizes = draw(st.lists(st.integers(0, 50), min_size=1, max_size=12))
        if sum(sizes) < batch:
            sizes.append(batch)
        shares.append(Share(f"{number}", tuple(sizes), draw(st.floats(1, 3))))
    lanes = draw(st.integers(1, batch))
    return Plan(
        shares,
        draw(st.integers(0, 2**40)),
        batch,
        lanes,
        draw(st.none() | st.integers(1, 80)),
        draw(st.sampled_from(tails)),
    )


@settings(max_examples=150, deadline=None)
@given(plan=plans(tails=("drop", "pad"), most=1), epoch=st.integers(0, 3))
def test_an_epoch_has_each_sample_once_but_for_its_tail(plan, epoch):
    """`drop` leaves out less than a batch, `pad` repeats less than one."""
    ids = order(plan, range(plan.first_step(epoch), plan.first_step(epoch + 1)))
    times = np.bincount(ids, minlength=plan.samples)
    assert len(times) == plan.samples
    if plan.tail == "drop":
        assert times.max() <= 1
        assert plan.samples - len(ids) == plan.dropped_tail < plan.global_batch
    else:
        assert times.min() >= 1
        assert times.max() <= 2
        assert len(ids) - plan.samples < plan.global_batch


@settings(max_examples=100, deadline=None)
@given(plan=plans(tails=("wrap",)))
def test_wrapping_leaves_out_nothing_and_repeats_nothing(plan):
    """Every sample of every dataset comes once in each time through its dataset, without a gap between these."""
    steps = range(plan.first_step(3) + 1)
    draws = [plan.draw(step, 0, plan.global_batch) for step in steps]
    ids, epochs = (np.concatenate(column) for column in zip(*draws, strict=True))
    first = plan.datasets[0]
    for epoch in range(3):
        drawn = np.sort(ids[(epochs == epoch) & (ids < sum(first.sizes))])
        assert np.array_equal(drawn, np.arange(sum(first.sizes)))
    assert len(set(zip(ids.tolist(), epochs.tolist(), strict=True))) == len(ids)


@settings(max_examples=150, deadline=None)
@given(plan=plans(), world=st.integers(1, 13), step=st.integers(0, 200))
def test_ranks_are_disjoint_and_their_union_is_the_plan(plan, world, step):
    bounds = rank_bounds(plan.global_batch, world)
    shares = [plan.draw(step, begin, end).ids for begin, end in itertools.pairwise(bounds) if begin < end]
    assert np.array_equal(np.concatenate(shares), plan.global_ids(step))
    assert max(np.diff(bounds)) - min(np.diff(bounds)) <= 1


@settings(max_examples=100, deadline=None)
@given(plan=plans(), step=st.integers(0, 200))
def test_seeking_equals_iterating(plan, step):
    """A plan that comes from another process, asked for a late step, and one that has been asked for those before."""
    fresh = pickle.loads(pickle.dumps(plan))
    for earlier in range(max(0, step - 5), step):
        plan.global_ids(earlier)
    for ours, theirs in zip(plan.draw(step, 0, plan.global_batch), fresh.draw(step, 0, plan.global_batch), strict=True):
        assert np.array_equal(ours, theirs)
    assert plan.step_of(plan.state(step)) == step


@settings(max_examples=100, deadline=None)
@given(plan=plans(), step=st.integers(0, 200), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_announced_shards_hold_the_samples_drawn(plan, step, cut):
    begin, end = sorted(int(at * (plan.global_batch - 1)) for at in cut)
    announced = plan.shards(step, begin, end + 1, ahead=0)
    drawn, _ = plan.locate(plan.draw(step, begin, end + 1).ids)
    assert set(drawn) <= set(announced)
    assert set(announced) <= set(plan.shards(step, begin, end + 1, ahead=2))


@settings(max_examples=100, deadline=None)
@given(plan=plans(), step=st.integers(0, 50))
def test_every_batch_holds_the_mixture_exactly(plan, step):
    """Largest remainder: within one place of the weight's share, and the same in each batch."""
    starts = np.cumsum([0, *(sum(share.sizes) for share in plan.datasets)])
    counts, _ = np.histogram(plan.global_ids(step), starts)
    assert counts.tolist() == [count for _, count in plan.state(0)["mixture"]]
    weights = np.array([share.weight for share in plan.datasets])
    assert np.abs(counts - plan.global_batch * weights / weights.sum()).max() < 1


@pytest.mark.parametrize("weights", [(1,), (4, 1), (7, 3), (5, 3, 1)])
def test_where_there_are_as_many_lanes_as_ranks_each_rank_reads_its_own(weights):
    """Of every dataset: no two ranks have a shard in common but at a lane's border."""
    shares = [Share(f"{number}", (10,) * 400, weight) for number, weight in enumerate(weights)]
    plan = Plan(shares, 0, 96, lanes=8, window=40)
    bounds = rank_bounds(96, 8)
    read = [
        {shard for step in range(40) for shard in plan.shards(step, begin, end, ahead=0)}
        for begin, end in itertools.pairwise(bounds)
    ]
    assert sum(map(len, read)) <= len(set().union(*read)) + 8 * len(weights)


@given(plan=plans())
def test_locate_inverts_the_numbering(plan):
    sizes = [size for share in plan.datasets for size in share.sizes]
    places = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    assert list(zip(*(column.tolist() for column in plan.locate(range(plan.samples))), strict=True)) == places


def test_epochs_seeds_and_datasets_differ():
    plan = one((64,), 0, 64)
    others = plan.global_ids(1), one((64,), 1, 64).global_ids(0), one((64,), 0, 64, fingerprint="g").global_ids(0)
    assert not any(np.array_equal(plan.global_ids(0), other) for other in others)


def test_an_epoch_longer_than_narrow_types_reach_is_whole():
    plan = one((9000,) * 20, 0, 1000, lanes=2, window=50_000)
    assert np.array_equal(np.sort(order(plan, range(plan.first_step(1)))), np.arange(plan.samples))


def test_one_window_is_an_even_shuffle():
    """Over many epochs, each sample comes first about equally often."""
    plan = one((3, 7), 0, 10)
    first = np.bincount([plan.global_ids(epoch)[0] for epoch in range(4000)], minlength=10)
    assert first.min() > 320
    assert first.max() < 480


def test_a_window_reads_few_shards_at_a_time():
    plan = one((100,) * 50, 0, 20, lanes=1, window=200)
    for step in range(plan.first_step(1)):
        assert len(np.unique(plan.locate(plan.global_ids(step))[0])) <= 5
        assert len(plan.shards(step, 0, 20, ahead=0)) <= 6


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_the_first_batch_needs_two_shards_a_lane_at_the_most(lanes):
    plan = one((100,) * 60, 0, 24, lanes=lanes, window=800)  # where there are eight lanes, all of a lane
    assert len(plan.shards(0, 0, 24, ahead=0)) <= 2 * lanes
    assert len(plan.shards(0, 0, 24, ahead=1)) > 2 * lanes


def test_lanes_do_not_cross_into_new_windows_together():
    plan = one((10,) * 400, 0, 16, lanes=8, window=80)
    windows = [[tuple(plan.shards(step, 2 * lane, 2 * lane + 2, ahead=0)) for lane in range(8)] for step in range(100)]
    changed = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(windows[12:])]
    assert max(changed) <= 4


def test_a_seek_to_a_late_step_of_a_large_plan_permutes_no_whole_epoch():
    """400M samples in 40,000 shards; `make bench-plan` tells the seconds."""
    sizes = np.full(40_000, 10_000)
    plan = one(sizes, 0, 8192, *layout(sizes.sum(), len(sizes), 8192, 64, at_hand=False))
    plan.draw(1_000_000, 0, 128)
    (kept,) = plan._orders[0]._kept.values()
    assert len(kept) <= plan.window


def golden() -> str:
    digest = hashlib.sha256()
    for lanes, window, tail in ((1, None, "drop"), (2, 32, "pad"), (5, 10, "wrap")):
        mixed = [Share("f", GOLDEN_SIZES), Share("g", (30, 9), 0.5)]
        for shares in (mixed[:1], mixed):
            plan = Plan(shares, 7, 12, lanes, window, tail)
            digest.update(batch_sha256(order(plan, range(2 * plan.first_step(1) + 1))).encode())
            digest.update(str([plan.substitute(sample, 9 * (sample % 2)) for sample in range(20)]).encode())
    digest.update(SampleUniforms(7, 10)([1, 0], [5, 2]).tobytes())
    return digest.hexdigest()


def test_the_order_is_the_committed_one():
    assert golden() == GOLDEN


def test_the_order_does_not_depend_on_the_hash_seed():
    code = "from tests.pipeline.test_plan import golden; print(golden())"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {GOLDEN}


def test_a_state_of_another_order_is_told_by_what_differs():
    plan = one((30, 30), 3, 8)
    state = plan.state(17)
    assert plan.changes(state) == []
    assert plan.step_of(state) == 17
    assert one((30, 30), 3, 8, fingerprint="g").changes(state)[0] == "fingerprint: 'f' -> 'g'"
    assert one((30, 30), 4, 8).changes(state) == ["seed: 3 -> 4"]
    assert one((30, 30), 3, 8, window=10).changes(state) == ["window: None -> 10"]
    assert plan.changes({**state, "plan_version": 1}) == ["plan_version: 1 -> 2"]


def test_settings_that_cannot_work_are_refused_with_the_fix():
    with pytest.raises(PlanError, match=r"data\.lanes = 9 is more than train\.batch_size = 8"):
        one((100,), 0, 8, lanes=9)
    with pytest.raises(PlanError, match="has 5 samples, fewer than the 8"):
        one((5,), 0, 8)
    with pytest.raises(PlanError, match=r"small: weight 0\.01 gives it none of the 8 places"):
        Plan([Share("f", (50,)), Share("g", (50,), 0.01, "small")], 0, 8)
    with pytest.raises(PlanError, match="listed twice"):
        Plan([Share("f", (50,)), Share("f", (50,))], 0, 8)
    assert len(one((5,), 0, 8, tail="wrap").global_ids(0)) == 8


def test_rank_bounds_cover_the_batch():
    assert rank_bounds(10, 3) == [0, 3, 6, 10]


def test_a_run_s_layout_follows_the_size_of_the_data_and_where_it_lies():
    assert layout(1_000_000, 100, 1024, 8, at_hand=True) == (1, None)
    assert layout(10_000_000, 1000, 1024, 8, at_hand=True) == (8, planning.WHOLE)
    assert layout(10_000_000, 1000, 1024, 8, at_hand=False) == (8, 80_000)
    assert layout(1000, 3, 4, 8, at_hand=False) == (4, 8 * 334)


def test_a_sample_s_numbers_are_its_own_whatever_was_drawn_before():
    numbers = SampleUniforms(5, 7)
    places = [(epoch, sample) for sample in (9, 3, 10, 4) for epoch in range(6)]  # more epochs than are kept open
    drawn = numbers(*zip(*places, strict=True))
    for place, values in zip(places, drawn, strict=True):
        assert np.array_equal(SampleUniforms(5, 7)(*([one] for one in place))[0], values)
    assert len({values.tobytes() for values in drawn}) == len(places)
    assert drawn.min() >= 0
    assert drawn.max() < 1

"""What a run leaves behind of each step, and what of it goes elsewhere."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from data_prep.locations import without_credentials
from data_prep.record import DataError
from pipeline.tracking import Tracker, read_metrics


def line(step: int, **changes: Any) -> dict[str, Any]:
    values = {"step": step, "epoch": 0, "samples_seen": 8 * step, "loss": 4.0 - step / 10, "logit_scale": 14.0}
    values |= {"lr": 1e-3, "samples_per_s": 80.0, "data_wait_s": 0.02, "skipped": 0, "batch_sha256": "ab" * 32}
    return values | changes


def track(run, steps, *, step=0, total=100, tensorboard=False, **settings) -> None:
    run.mkdir(exist_ok=True)
    with Tracker(run, step=step, total=total, tensorboard=tensorboard, **settings) as tracker:
        for number in steps:
            tracker.log(line(number))


def points(run) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: name → (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class FakeWandb(ModuleType):
    """Stands in for the package: keeps what it is told, and can refuse."""

    def __init__(self, refusals: tuple[str, ...] = ()) -> None:
        super().__init__("wandb")
        self.errors = SimpleNamespace()
        self.errors.Error = type("Error", (Exception,), {})
        self.errors.CommError = type("CommError", (self.errors.Error,), {})
        self.errors.AuthenticationError = type("AuthenticationError", (self.errors.CommError,), {})
        self.refusals = list(refusals)
        self.begun: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.axes: dict[str, Any] = {}
        self.exit_codes: list[int] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings

    def init(self, **settings: Any) -> FakeWandb:
        self.begun.append(settings)
        if self.refusals:
            raise getattr(self.errors, self.refusals.pop(0))("refused")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)

    def teardown(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_each_step_is_on_disk_before_the_next_one(tmp_path):
    with Tracker(tmp_path, step=0, total=9, tensorboard=False) as tracker:
        for step in (1, 2):
            tracker.log(line(step))
            assert read_metrics(tmp_path)[-1] == line(step)
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    with Tracker(tmp_path, step=0, total=9, tensorboard=False) as tracker:
        tracker.log(line(1, loss=value, skipped=1))
        tracker.log_evaluation(1, {"set/acc1": value})
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"step": 1, "set/acc1": None}


def test_going_on_cuts_back_what_was_said_of_later_steps(tmp_path):
    with Tracker(tmp_path, step=0, total=9, tensorboard=False) as tracker:
        for step in range(1, 6):
            tracker.log(line(step))
            tracker.log_evaluation(step, {"set/acc1": step / 10})
    (tmp_path / "quarantine.jsonl").write_text('{"step": 2, "key": "a"}\n{"step": 4, "key": "b"}\n{"step": 3, "ke')
    track(tmp_path, [4], step=3)
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 2, 3, 4]
    evaluated = [json.loads(text) for text in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert evaluated == [{"step": step, "set/acc1": step / 10} for step in (1, 2, 3)]
    assert (tmp_path / "quarantine.jsonl").read_text() == '{"step": 2, "key": "a"}\n'


def test_a_log_line_sums_up_its_steps(tmp_path, caplog):
    """Batches of 8 in 0.1 s and, each fourth, in 0.4 s: 32 pairs in 0.7 s. Means of rates would say 65 / s."""
    caplog.set_level(logging.INFO)
    with Tracker(tmp_path, step=0, total=24, tensorboard=False, log_every_steps=8) as tracker:
        for step in range(1, 19):
            slow = step % 4 == 0
            tracker.log(line(step, samples_per_s=20.0 if slow else 80.0, data_wait_s=0.28 if slow else 0.0))
    first, second, rest = caplog.messages
    assert first.startswith("step 8/24  loss 3.5500  scale 14.00  lr 0.001")
    assert second.startswith("step 16/24  loss 2.7500")
    assert "45.71 samples/s  waiting 40%" in second
    assert second.endswith("ETA 0:00:01")  # 8 steps of 0.175 s
    assert rest.startswith("step 18/24  loss 2.2500")


def test_a_skipped_step_spoils_no_mean(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Tracker(tmp_path, step=0, total=3, tensorboard=False) as tracker:
        for step, loss in ((1, 1.0), (2, math.nan), (3, 2.0)):
            tracker.log(line(step, loss=loss, skipped=int(step == 2)))
    assert "loss 1.5000" in caplog.text
    assert "skipped 1" in caplog.text


def test_a_window_without_a_loss_has_a_line_all_the_same(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Tracker(tmp_path, step=0, total=1, tensorboard=True) as tracker:
        tracker.log({"step": 1, "loss": math.nan, "skipped": 1})
    assert "step 1/1  skipped 1" in caplog.text


def test_a_terminal_has_a_bar_and_no_lines(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    track(tmp_path, range(41, 51), step=40, total=50)
    assert not caplog.messages
    assert "50/50" in terminal.getvalue()
    assert "loss" in terminal.getvalue()


def test_tensorboard_has_a_point_a_window(tmp_path):
    track(tmp_path, range(1, 11), tensorboard=True, log_every_steps=4)
    shown = points(tmp_path)
    assert [step for step, _ in shown["loss"]] == [4, 8, 10]
    assert [value for _, value in shown["loss"]] == pytest.approx([3.75, 3.35, 3.05])
    assert [value for _, value in shown["samples_per_s"]] == pytest.approx([80.0] * 3)
    assert shown["samples_seen"][-1] == (10, 80)
    assert "batch_sha256" not in shown
    assert "step" not in shown


def test_tensorboard_forgets_what_is_done_anew(tmp_path):
    track(tmp_path, range(1, 9), tensorboard=True, log_every_steps=2)
    with Tracker(tmp_path, step=4, total=100, log_every_steps=2) as tracker:
        tracker.log(line(5))
        tracker.log(line(6, loss=9.5))
        tracker.log_evaluation(6, {"set/acc1": 0.25})
    shown = points(tmp_path)
    assert [step for step, _ in shown["loss"]] == [2, 4, 6]
    assert shown["loss"][-1][1] == pytest.approx((3.5 + 9.5) / 2)
    assert shown["set/acc1"] == [(6, 0.25)]


def test_wandb_gets_the_recipe_and_a_row_a_window(tmp_path, wandb):
    settings = {"optim": {"lr": 1e-3}}
    with Tracker(tmp_path, step=0, total=4, tensorboard=False, wandb="p", log_every_steps=2, settings=settings) as one:
        for step in range(1, 5):
            one.log(line(step))
        one.log_evaluation(4, {"set/acc1": 0.5})
    (begun,) = wandb.begun
    assert begun["project"] == "p"
    assert begun["config"] == settings
    assert [row["step"] for row in wandb.rows] == [2, 4, 4]
    assert wandb.rows[0]["loss"] == pytest.approx(3.85)
    assert wandb.rows[2] == {"step": 4, "set/acc1": 0.5}
    assert wandb.axes == {"step": None, "*": "step"}
    assert wandb.exit_codes == [0]


def test_wandb_goes_on_with_its_run_and_a_new_project_has_a_new_one(tmp_path, wandb):
    for project in ("p", "p", "q"):
        track(tmp_path, [], wandb=project)
    first, second, other = (begun["id"] for begun in wandb.begun)
    assert first == second != other
    assert all(begun["resume"] == "allow" for begun in wandb.begun)
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"project": "q", "id": other}


def test_wandb_hears_that_a_run_failed(tmp_path, wandb):
    with pytest.raises(KeyError), Tracker(tmp_path, step=0, total=4, tensorboard=False, wandb="p"):
        raise KeyError
    assert wandb.exit_codes == [1]


@pytest.mark.parametrize("found", [None, ModuleType("wandb")], ids=["nothing", "an empty folder of that name"])
def test_wandb_missing_is_said_with_the_command(tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(DataError, match=r"pip install 'clip-pipeline\[wandb\]'"):
        track(tmp_path, [], wandb="p")


@pytest.mark.parametrize("error", ["Error", "AuthenticationError"])
def test_without_a_login_the_run_does_not_begin(tmp_path, wandb, error):
    wandb.refusals = [error]
    with pytest.raises(DataError, match="wandb login"):
        track(tmp_path, [], wandb="p")


def test_an_outage_of_wandb_keeps_its_figures_here(tmp_path, wandb, caplog):
    wandb.refusals = ["CommError"]
    track(tmp_path, [1], wandb="p")
    asked, instead = wandb.begun
    assert "mode" not in asked  # wandb's own variables decide
    assert instead["mode"] == "offline"
    assert instead["id"] == asked["id"]
    assert "wandb sync" in caplog.text
    assert len(wandb.rows) == 1


def test_wandb_is_not_touched_unasked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    track(tmp_path, [1])
    assert not (tmp_path / "wandb.json").exists()


def test_tokens_reach_no_tracker(tmp_path, wandb, monkeypatch, caplog):
    """Those of the environment, of the command line, and of addresses in the recipe; nor does wandb collect them."""
    caplog.set_level(logging.DEBUG)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "S3CRET")
    monkeypatch.setattr(sys, "argv", ["pipeline", "--data", "https://me:S3CRET@host/data?sig=S3CRET"])
    settings = {"data": {"datasets": [{"path": "https://me:S3CRET@host/data?sig=S3CRET", "weight": 1.0}]}}
    track(tmp_path, range(1, 5), tensorboard=True, wandb="p", settings=settings)
    assert wandb.begun[0]["config"] == {"data": {"datasets": [{"path": "https://host/data", "weight": 1.0}]}}
    collects = wandb.begun[0]["settings"]
    assert collects["x_disable_meta"] is collects["disable_git"] is collects["disable_code"] is True
    assert collects["console"] == "off"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3
    assert not any(b"S3CRET" in content for content in written)
    assert "S3CRET" not in f"{wandb.begun}{wandb.rows}{caplog.text}"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://host/a.tar?X-Amz-Signature=1", "https://host/a.tar"),
        ("s3://a@2 https://token@host/b?c=d e", "s3://a@2 https://host/b e"),
        ("s3://bucket/0000?.tar", "s3://bucket/0000?.tar"),
        ("/data/what?/me@home", "/data/what?/me@home"),
        (["gs://bucket/a", 3, None], ["gs://bucket/a", 3, None]),
    ],
)
def test_addresses_lose_what_may_be_secret(given, kept):
    assert without_credentials(given) == kept

"""Training jobs on a real SLURM: several nodes give what one gives, and whatever befalls a job, it goes on exactly."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.slurm import GoneError, ask
from tests.conftest import RECIPE
from tests.processes import last_step, train
from tests.slurm_cluster import URGENT, Cluster

# What a start, which is mostly imports, may take on a busy machine, and then some hundred steps.
WAIT_S = 240
STEPS = 200
# Of the job's steps; the first one checks the nodes.
TRAINING = "1"


@pytest.fixture(scope="module")
def steps_of(dataset, tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """steps_of(world, steps, *settings): the metrics of as many ranks, on this machine and undisturbed."""
    folder, known = tmp_path_factory.mktemp("undisturbed"), {}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def steps_of(world: int, steps: int = STEPS, *settings: str) -> list[dict[str, Any]]:
        run = folder / f"{world}-{steps}"
        if run not in known:
            words = (f"train.steps={steps}", *settings)
            arguments = [str(folder / "recipe.yaml"), str(run), "--data", str(dataset), *words]
            assert train(arguments, world=world) == 0
            known[run] = lines_of(run)
        return known[run]

    return steps_of


# A trainer whose steps take their time, so that there is one in which to disturb them; it starts as fast as ever.
SLOW = """import runpy, sys, threading, time

def slow_down():
    while not hasattr(sys.modules.get("pipeline.train"), "train"):
        time.sleep(0.01)
    module = sys.modules["pipeline.train"]
    inner = module.forward_backward
    module.forward_backward = lambda *args, **options: time.sleep(STEP_S) or inner(*args, **options)

threading.Thread(target=slow_down, daemon=True).start()
sys.argv = sys.argv[2:]
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


class Site:
    """A cluster and its cluster file, submitted to as a user would."""

    def __init__(self, slurm: Cluster, folder: Path, dataset: Path, *, step_s: float = 0.04) -> None:
        self.slurm, self.dataset = slurm, dataset
        self.file, self.recipe = folder / "site.yaml", folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(RECIPE))
        (folder / "slow.py").write_text(SLOW.replace("STEP_S", str(step_s)))
        self.slow = self.python("slow", f'[[ $2 = pipeline ]] && exec {sys.executable} {folder}/slow.py "$@"')
        self.describe()

    def python(self, name: str, line: str) -> str:
        """A Python that does something else first."""
        path = self.file.with_name(name)
        path.write_text(f'#!/bin/bash\n{line}\nexec {sys.executable} "$@"\n')
        path.chmod(0o755)
        return str(path)

    def describe(self, **changes: object) -> None:
        """Write the cluster file."""
        values = {"backend": "slurm", "partition": "main", "time": "01:00:00", "stop_seconds": 30, "max_restarts": 3}
        values["python"] = self.slow
        self.file.write_text(yaml.safe_dump(values | changes))

    def launch(self, command: str, *words: object) -> subprocess.CompletedProcess[str]:
        called = [sys.executable, "-m", "launch", command, *map(str, words)]
        return subprocess.run(called, env=self.slurm.env, capture_output=True, text=True, timeout=WAIT_S)

    def submit(self, run: Path, *settings: str, nodes: int = 2, steps: int = STEPS, words: tuple[str, ...] = ()) -> str:
        """Submit a training job, and return its id."""
        given = ["--cluster", self.file, "--nodes", nodes, "--recipe", self.recipe, "--data", self.dataset]
        done = self.launch("submit", *given, "--run", run, *words, f"train.steps={steps}", *settings)
        assert done.returncode == 0, done.stderr
        return json.loads((run / "launch/submission.json").read_text())["jobs"][0]["id"]

    def reach(self, job: str, run: Path, step: int) -> None:
        """Wait until training is at a step."""
        deadline = time.monotonic() + WAIT_S
        while last_step(run) < step:
            assert time.monotonic() < deadline, f"step {step} was not reached in {WAIT_S} s\n{self.said(run)}"
            self.slurm.wait(job, "PENDING", "RUNNING")
            time.sleep(0.1)

    def stopped(self, job: str, run: Path) -> tuple[int, list[str]]:
        """Wait until a job has left its nodes; (step of its newest checkpoint, the metrics until there)."""
        self.slurm.wait(job, "PENDING", "CANCELLED", timeout_s=WAIT_S)
        step = int((run / "checkpoints/LATEST").read_text().removeprefix("step-"))
        return step, (run / "metrics.jsonl").read_text().splitlines()[:step]

    def finish(self, job: str, run: Path, restarts: int = 0) -> None:
        """Wait until a job is done, after as many restarts."""
        try:
            found = self.slurm.wait(job, "COMPLETED", timeout_s=WAIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said(run)}") from error
        assert int(found["Restarts"]) == restarts, self.said(run)

    def said(self, run: Path) -> str:
        return "\n".join(path.read_text() for path in sorted((run / "launch/logs").glob("*.log")))


@pytest.fixture
def site(slurm, tmp_path, dataset) -> Site:
    return Site(slurm, tmp_path, dataset)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_steps(run: Path, undisturbed: list[dict[str, Any]]) -> None:
    """Every step is there once, and with the samples and the loss of the undisturbed run, to the last bit."""
    for found, expected in itertools.zip_longest(lines_of(run), undisturbed):
        for name in ("step", "batch_sha256", "loss", "grad_norm"):
            assert found[name] == expected[name], f"{name} of step {expected['step']}"


def kept(run: Path, committed: list[str]) -> None:
    """What was saved was not trained again: its lines, times included, are those from before."""
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(committed)] == committed


# --- Several nodes


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_nodes_give_what_one_gives(site, steps_of, tmp_path, nodes):
    run = tmp_path / 'it\'s a "run" of 100 % $HOME'
    site.finish(site.submit(run, nodes=nodes, steps=60), run)
    same_steps(run, steps_of(nodes, 60))
    for found, expected in zip(lines_of(run), steps_of(1, 60), strict=True):
        assert found["batch_sha256"] == expected["batch_sha256"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_of_each_node_and_passes_a_stop_on(site, steps_of, tmp_path):
    site.describe(launcher="torchrun")
    run = tmp_path / "run"
    job = site.submit(run, words=("--processes", "2"))
    site.reach(job, run, 20)
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)
    step, committed = site.stopped(job, run)
    assert len(committed) == step == last_step(run)
    site.finish(job, run, restarts=1)
    kept(run, committed)
    # Which node has which ranks is torchrun's to say, anew after a restart: the last bits of sums may change.
    for found, expected in zip(lines_of(run), steps_of(4), strict=True):
        assert found["batch_sha256"] == expected["batch_sha256"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_sweep_is_an_array_and_what_follows_waits_for_it(site, tmp_path):
    run = tmp_path / "sweep"
    words = ("--sweep", "optim.lr=1e-3,2e-3", "--then", "export")
    job = site.submit(run, nodes=1, steps=10, words=words)
    train, export = json.loads((run / "launch/submission.json").read_text())["jobs"]
    assert train["id"] == job
    for number, name in enumerate(("optim.lr=1e-3", "optim.lr=2e-3")):
        site.slurm.wait(f"{export['id']}_{number}", "COMPLETED", timeout_s=WAIT_S)
        assert yaml.safe_load((run / name / "config.yaml").read_text())["optim"]["lr"] == float(name[-4:])
        assert (run / name / "export/open_clip/open_clip_config.json").is_file()


# Those of the records that tell when and how fast something was made, or where.
OWN_FILES = {"launch", "report.html"}


def files_of(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in found}
    return {str(name): path.read_bytes() for path, name in names.items() if name.parts[0] not in OWN_FILES}


def test_data_prepared_on_four_nodes_is_that_of_one_process(site, dataset, tmp_path):
    columns = ["--image-column", "image", "--caption-column", "caption", "--caption-column", "other"]
    words = ["--samples-per-shard", "5", *columns]
    source, one, four = f"table={dataset.parent / 'pairs.csv'}", tmp_path / "one/data", tmp_path / "four/data"
    done = subprocess.run([sys.executable, "-m", "data_prep", "build", source, *words, "--out", one], text=True)
    assert done.returncode == 0
    given = ["--cluster", site.file, "--what", "data", "--data", source, "--nodes", 4, "--run", four]
    done = site.launch("submit", *given, "--", *words)
    assert done.returncode == 0, done.stderr
    parts, whole = json.loads((tmp_path / "four/data.launch/submission.json").read_text())["jobs"]
    assert len(parts["runs"]) == 4
    site.slurm.wait(whole["id"], "COMPLETED", timeout_s=WAIT_S)
    assert files_of(four) == files_of(one)
    assert "14 of 14 shards were there already" in "".join(
        log.read_text() for log in (tmp_path / "four").rglob("*.log")
    )


def test_a_run_is_not_submitted_twice(site, tmp_path):
    run = tmp_path / "run"
    job = site.submit(run, nodes=1)
    words = ["--cluster", site.file, "--recipe", site.recipe, "--data", site.dataset]
    again = site.launch("submit", *words, "--run", run)
    assert again.returncode == 2
    assert job in again.stderr
    assert "launch cancel" in again.stderr
    for _ in range(2):  # the second time it has ended already
        done = site.launch("cancel", run)
        assert done.returncode == 0, done.stderr


def test_what_slurm_says_of_jobs_that_are_no_more_is_known(slurm, tmp_path, monkeypatch):
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.env[name])
    job = slurm.sbatch("true", folder=tmp_path)
    slurm.wait(job, "COMPLETED")
    for words in (("scontrol", "show", "job", "99999"), ("scancel", "--batch", "--signal=USR1", job)):
        with pytest.raises(GoneError):
            ask(*words)


# --- Stops


def requeue(site: Site, job: str, run: Path) -> str:
    site.slurm.run("scontrol", "requeue", job)
    return job


def preempt(site: Site, job: str, run: Path) -> str:
    site.slurm.sbatch("srun sleep 1", f"--partition={URGENT}", "--nodes=4", "--exclusive", folder=run.parent)
    return job


def cancel_and_submit_again(site: Site, job: str, run: Path) -> str:
    assert site.launch("cancel", run).returncode == 0
    site.slurm.wait(job, "CANCELLED")
    return site.submit(run)


@pytest.mark.parametrize(
    ("stop", "restarts"),
    [
        (requeue, 1),
        pytest.param(preempt, 1, marks=pytest.mark.slow),
        pytest.param(cancel_and_submit_again, 0, marks=pytest.mark.slow),
    ],
)
def test_a_job_that_is_stopped_saves_and_goes_on_as_if_it_had_not_been(site, steps_of, tmp_path, stop, restarts):
    run = tmp_path / "run"
    job = site.submit(run, "checkpoint.every_steps=1000")
    site.reach(job, run, 20)
    again = stop(site, job, run)
    step, committed = site.stopped(job, run)
    assert 20 <= len(committed) == step < STEPS
    site.finish(again, run, restarts)
    kept(run, committed)
    same_steps(run, steps_of(2))


@pytest.mark.slow
def test_a_time_limit_is_no_end(site, steps_of, tmp_path):
    run = tmp_path / "run"
    job = site.submit(run, "checkpoint.every_steps=1000000", steps=2000, words=("--time", "00:02:00"))
    site.reach(job, run, 20)
    step, committed = site.stopped(job, run)
    assert len(committed) == step < 2000
    while site.slurm.job(job)["JobState"] != "COMPLETED":
        site.slurm.wait(job, "COMPLETED", "PENDING", timeout_s=WAIT_S)
        time.sleep(0.2)
    kept(run, committed)
    same_steps(run, steps_of(2, 2000))


@pytest.mark.slow
def test_ranks_that_hang_when_the_time_is_over_go_on_from_the_last_checkpoint(site, steps_of, tmp_path):
    run = tmp_path / "run"
    job = site.submit(run, "checkpoint.every_steps=10", words=("--time", "00:02:00"))
    site.reach(job, run, 60)
    (trainer,) = psutil.Process(site.slurm.tasks(job, step=TRAINING)[1]).children()
    trainer.suspend()
    step, committed = site.stopped(job, run)
    assert step >= 60
    site.finish(job, run, restarts=1)
    kept(run, committed)
    same_steps(run, steps_of(2))


# --- Deaths


def kill_task(site: Site, job: str, rank: int = 1) -> None:
    """As the kernel does that runs out of memory: the trainer, not the shell that waits for it."""
    (trainer,) = psutil.Process(site.slurm.tasks(job, step=TRAINING)[rank]).children()
    trainer.kill()


def kill_first_task(site: Site, job: str) -> None:
    kill_task(site, job, 0)


def kill_last_node(site: Site, job: str) -> None:
    site.slurm.kill_node("node2")


def kill_first_node(site: Site, job: str) -> None:
    site.slurm.kill_node("node1")


def pull_cable(site: Site, job: str) -> None:
    site.slurm.machines.pull("node2")


@pytest.mark.parametrize(
    "fault",
    [
        kill_task,
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in (kill_first_task, kill_last_node, kill_first_node)),
    ],
)
def test_a_job_that_loses_a_part_starts_again_by_itself(site, steps_of, tmp_path, fault):
    lose_a_part(site, steps_of, tmp_path / "run", fault)


@pytest.mark.slow
def test_a_job_whose_node_is_cut_off_starts_again_by_itself(slurm_hosts, site, steps_of, tmp_path):
    lose_a_part(site, steps_of, tmp_path / "run", pull_cable)


def lose_a_part(site: Site, steps_of: Callable, run: Path, fault: Callable[[Site, str], None]) -> None:
    job = site.submit(run, "checkpoint.every_steps=25", "train.timeout_s=60")
    site.reach(job, run, 60)
    fault(site, job)
    step, committed = site.stopped(job, run)
    assert 50 <= step < STEPS
    site.finish(job, run, restarts=1)
    kept(run, committed)
    same_steps(run, steps_of(2))


# --- What is not started again


def test_what_the_user_must_change_is_not_tried_again(site, tmp_path):
    run = tmp_path / "run"
    job = site.submit(run, "optim.lrr=1", nodes=1)
    found = site.slurm.wait(job, "FAILED", timeout_s=WAIT_S)
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0"), site.said(run)
    assert "optim.lrr" in json.loads((run / "exit.json").read_text())["reason"]


def test_a_job_that_dies_each_time_ends_at_the_limit(site, tmp_path):
    site.describe(max_restarts=1, python=site.python("dies", "[[ $2 = pipeline ]] && kill -9 $$"))
    run = tmp_path / "run"
    job = site.submit(run, nodes=1)
    deadline = time.monotonic() + WAIT_S
    while (found := site.slurm.job(job))["JobState"] != "FAILED":
        assert time.monotonic() < deadline, site.said(run)
        time.sleep(0.2)
    assert found["Restarts"] == "1"
    assert "max_restarts = 1" in site.said(run)


# --- Scripts


SCRIPTS = {
    "plain": {},
    "torchrun": {"launcher": "torchrun", "cpus_per_process": 2},
    "gpus": {"gpus_per_node": 2, "network": "infiniband", "interface": "ib0"},
    "all": {
        "gpus_per_node": 2,
        "modules": ["cuda/12.4 beta"],
        "setup": ['echo "$HOME"', "true 'a b'"],
        "container": "/images/clip pipeline.sif",
        "environment": {"NAME": "a \"b\" 'c' $d `e`"},
        "memory_gb": 1,
        "sbatch": ["--exclusive"],
        "network": "efa",
    },
}


@pytest.mark.parametrize("changes", SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_pass_bash_shellcheck_and_sbatch(site, tmp_path, changes):
    site.describe(**changes)
    words = ["--cluster", site.file, "--recipe", "it's", "--data", 'a "b"@2 $c', "--nodes", 2, "--then", "evaluate"]
    run = tmp_path / 'it\'s a "run" of 100 % $HOME'
    for sweep in ([], ["--sweep", 'tracking.note=a\'b,"c d"']):
        done = site.launch("render", *words, *sweep, "--run", run)
        assert done.returncode == 0, done.stderr
        _, *scripts = done.stdout.split("#!/bin/bash")
        assert len(scripts) == 2
        for number, script in enumerate(scripts):
            path = tmp_path / f"{number}.sbatch"
            path.write_text("#!/bin/bash" + script.partition("\n# --- " + str(run))[0] + "\n")
            subprocess.run(["bash", "-n", path], check=True)
            checked = subprocess.run(["shellcheck", path], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout
            site.slurm.run("sbatch", "--test-only", path)

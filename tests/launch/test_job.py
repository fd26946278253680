"""A job's command line, and what is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import local
from launch.__main__ import main
from launch.demo import start_afresh
from launch.job import Job, LaunchError, records, stages


def commands(job: Job) -> list[list[str]]:
    return [local.command(stage, task)[1:] for stage in stages(job, 1) for task in stage.tasks]


def test_one_process_is_started_directly_and_several_by_torchrun(tmp_path):
    (one,) = commands(Job(tmp_path / "run", recipe="demo", data="data"))
    assert one[:4] == ["-m", "pipeline", "train", "demo"]
    job = Job(tmp_path / "run", recipe="demo", data="data more@2", processes=3, settings=("optim.lr=1",))
    (several,) = commands(job)
    assert "data more@2" in several
    assert several[1:5] == ["torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m"]
    assert several[-2:] == ["optim.lr=1", "train.processes=3"]


def test_a_sweep_is_a_run_for_each_combination_and_what_follows_works_on_each():
    sweep = ("optim.lr=1e-4,5e-4", "data.crop_scale=[0.5,1],[0.9,1]")
    job = Job(Path("runs"), recipe="demo", data="a@2 b", sweep=sweep, then=("evaluate", "export"))
    train, evaluate, export = stages(job, 1)
    names = [task.run.name for task in train.tasks]
    assert names[1] == "optim.lr=1e-4,data.crop_scale=[0.9,1]"
    assert len(set(names)) == 4
    assert train.tasks[1].arguments[-3:] == ("optim.lr=1e-4", "data.crop_scale=[0.9,1]", "train.processes=1")
    assert [task.run for task in evaluate.tasks] == [task.run for task in export.tasks] == [t.run for t in train.tasks]
    assert evaluate.tasks[0].arguments == ("pipeline", "evaluate", str(train.tasks[0].run), "--data", "a")


def test_data_is_prepared_in_parts_and_then_as_a_whole():
    parts, whole = stages(Job(Path("out"), "data", data="coco=/c vqa=/v", nodes=3), 1)
    assert [task.arguments[-2:] for task in parts.tasks] == [("--part", f"{part}/3") for part in range(3)]
    assert whole.tasks[0].arguments == ("data_prep", "build", "coco=/c", "vqa=/v", "--out", "out")


def test_what_cannot_run_is_refused_with_the_fix(tmp_path, capsys):
    run = ["--run", str(tmp_path / "run")]
    given = ["--data", str(tmp_path), "--recipe", "demo"]
    for words, message in (
        ([*given, "--processes", "0"], "at least 1"),
        (["--recipe", "demo"], "names no dataset"),
        (["--data", "x"], "names no recipe"),
        ([*given, "--cluster", "mars"], "Known are "),
        ([*given, "--nodes", "2"], "one machine"),
        ([*given, "--time", "2h"], "[D-]HH:MM:SS"),
        ([*given, "--sweep", "optim.lr"], "KEY=VALUE,VALUE"),
        ([*given, "--then", "lunch"], "evaluate, export"),
        ([*given, "tracking.x=https://me:hunter2@host/"], "tracking.x=https://…: an address with"),
        ([*given, "tracking.x=s3://me:hunter2@host/"], "would be in scripts"),
        ([*given, "tracking.x=https://hunter2@host/"], "would be in scripts"),
        ([*given, "tracking.x=https://host/a?client_secret=hunter2"], "would be in scripts"),
        ([*given, "--time", "0:00:00"], "no time at all"),
        ([*given, "--data", "https://host/a?x=1&X-Amz-Signature=hunter2"], "a?x=1&…: an address with"),
    ):
        assert main(["submit", *run, *words]) == 2, words
        told = capsys.readouterr().err
        assert message in told, words
        assert "hunter2" not in told


@pytest.mark.parametrize("data", ["s3://bucket/x@2", "hdfs://host:9000/a@2", "https://host/a@b.tar?v=1&keyword=3"])
def test_an_address_without_a_secret_is_none(tmp_path, data):
    assert Job(tmp_path, recipe="demo", data=data).data == data


@pytest.mark.parametrize("run", [".", "/"])
def test_a_folder_without_a_name_has_records_too(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["status", run]) == 2
    assert records(Path(run), "data").is_absolute()


def test_the_demo_removes_only_what_a_demo_wrote(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LaunchError, match="no demo wrote it"):
        start_afresh(tmp_path, 0)
    assert (tmp_path / "thesis.txt").exists()
    run = tmp_path / "demo"
    start_afresh(run, 0)
    (run / "left-over").write_text("")
    start_afresh(run, 0)
    assert [path.name for path in run.iterdir()] == ["demo.json"]

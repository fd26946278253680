"""A job's command line, and what is refused before it starts."""

from __future__ import annotations

import pytest

from launch.__main__ import main
from launch.demo import start_afresh
from launch.job import Job, LaunchError


def test_one_process_is_started_directly_and_several_by_torchrun(tmp_path):
    one = Job("demo", "data", tmp_path / "run").command()
    assert one[1:5] == ["-m", "pipeline", "train", "demo"]
    several = Job("demo", "data more@2", tmp_path / "run", 3, ("optim.lr=1",)).command()
    assert "data more@2" in several
    assert several[2:6] == ["torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m"]
    assert several[-2:] == ["optim.lr=1", "train.processes=3"]


def test_what_cannot_run_is_refused_with_the_fix(tmp_path, capsys):
    with pytest.raises(LaunchError, match="at least 1"):
        Job("demo", "data", tmp_path, processes=0)
    command = ["submit", "--recipe", "demo", "--run", str(tmp_path / "run")]
    assert main([*command, "--data", ""]) == 2
    assert "names no dataset" in capsys.readouterr().err
    assert main([*command, "--data", str(tmp_path), "--cluster", "mars"]) == 2
    assert "Known are local" in capsys.readouterr().err


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

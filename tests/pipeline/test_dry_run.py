"""A dry run finds what training would stumble over, all of it, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from data_prep import manifest
from pipeline import begin, config, dry_run, memory
from pipeline.__main__ import main
from tests.conftest import RECIPE
from tests.pipeline.test_during import write_set
from tests.processes import train


def loaded(path, dataset, *words):
    return config.load(str(path), [f"data.datasets={dataset}", *words])


def test_all_is_well_and_nothing_is_written(recipe, dataset, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(recipe()), str(run), "--data", str(dataset), "--dry-run"]) == 0
    assert "Training could begin" in capsys.readouterr().out
    said = " ".join(value for _, value, _ in dry_run.look(loaded(recipe(), dataset), run).rows)
    for expected in ("70 samples in 5 sealed", "15 steps of 10 pairs, 7 an epoch", "2.1 passes", "begins at step 0"):
        assert expected in said
    assert not run.exists()


def test_several_problems_are_told_at_once(recipe, dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = recipe(
        model={"pretrained": str(tmp_path / "none.pt")},
        tokenizer={"kind": "sentencepiece", "path": str(tmp_path / "none.model")},
        evaluate={"data": str(tmp_path / "nowhere")},
        train={"precision": "fp16"},
    )
    found = dry_run.look(loaded(path, f"{dataset} {tmp_path}/gone"), tmp_path / "file" / "run")
    kinds = [what for what, _, fine in found.rows if not fine]
    assert kinds == ["precision", "data", "run folder", "tokenizer", "model", "evaluation"]
    for word in ("fp16", "gone", "file", "none.model", "none.pt", "nowhere"):
        assert any(word in problem for problem in found.problems), word
    assert main(["train", str(path), str(tmp_path / "run"), "--data", str(tmp_path / "gone"), "--dry-run"]) == 2
    assert "To be mended first: 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.batch_size=700"], "70 samples, fewer than the 700"),
        (["data.lanes=99"], "data.lanes = 99"),
        (["train.batch_size=1", "train.processes=2"], "leaves some of 2 ranks without a pair"),
        (["model.activation_checkpointing=true", "model.patch_dropout=0.5"], None),
        (["evaluate.data=DATA", "evaluate.sets=[nothing]"], "has no evaluation set nothing"),
        (["tracking.wandb=project"], "clip-pipeline[wandb]"),
    ],
)
def test_each_problem_is_the_trainers_own(recipe, dataset, tmp_path, words, problem):
    words = [word.replace("DATA", str(dataset)) for word in words]
    found = dry_run.look(loaded(recipe(), dataset, *words), tmp_path / "run").problems
    assert len(found) == (problem is not None), found
    assert not problem or problem in found[0]


@pytest.mark.parametrize(
    ("best", "words", "problem"),
    [
        ("small_test/loss", [], None),
        ("loss", [], None),
        ("ema/small_test/loss", ["optim.ema=0.9"], None),
        ("ema/small_test/loss", [], "measured while training are small_test (ema/… with optim.ema)"),
        ("other/loss", ["optim.ema=0.9"], "measured while training are small_test, ema/small_test. Name one"),
    ],
)
def test_the_best_is_by_a_figure_that_is_measured(recipe, dataset, tmp_path, best, words, problem):
    write_set(tmp_path / "measured" / "eval" / "small_test", "retrieval", 2)
    split = {"kind": "retrieval", "samples": 2, "shards": 1, "captions": 0, "bytes": 1}
    manifest.write(tmp_path / "measured", {"name": "small", "splits": {"small_test": split}, "counts": {}}, [], [])
    words = [f"evaluate.data={tmp_path / 'measured'}", f"checkpoint.keep_best={best}", *words]
    found = dry_run.look(loaded(recipe(), dataset, *words), tmp_path / "run").problems
    assert len(found) == (problem is not None), found
    assert not problem or problem in found[0]


def test_a_missing_shard_is_found(recipe, dataset, tmp_path):
    import shutil

    shutil.copytree(dataset, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "00002.tar").unlink()
    (problem,) = dry_run.look(loaded(recipe(), tmp_path / "copy"), tmp_path / "run").problems
    assert "00002.tar (missing)" in problem


def test_whether_a_run_would_go_on_is_told(recipe, dataset, tmp_path):
    run, path = tmp_path / "run", recipe(train={"steps": 4})
    assert train([str(path), str(run), "--data", str(dataset)]) == 0
    before = sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*"))
    longer = dry_run.look(loaded(path, dataset, "train.steps=9"), run)
    assert not longer.problems
    assert any("goes on from step 4" in value for _, value, _ in longer.rows)
    other = loaded(path, dataset, "optim.lr=0.5")
    (problem,) = dry_run.look(other, run).problems
    assert "optim.lr: 0.001 -> 0.5" in problem
    assert not dry_run.look(loaded(path, dataset, "optim.lr=0.5", "train.accept_changes=true"), run).problems
    assert before == sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*"))


def test_a_run_is_compared_with_the_copy_that_it_would_come_back_from(recipe, dataset, tmp_path):
    copied = f"checkpoint.copy_to={tmp_path / 'copy'}"
    assert train([str(recipe(train={"steps": 4})), str(tmp_path / "run"), "--data", str(dataset), copied]) == 0
    gone = tmp_path / "gone"
    found = dry_run.look(loaded(recipe(), dataset, copied), gone)
    assert not found.problems
    assert any("goes on from step 4 of its copy" in value for _, value, _ in found.rows)
    (problem,) = dry_run.look(loaded(recipe(), dataset, copied, "optim.lr=0.5"), gone).problems
    assert "optim.lr: 0.001 -> 0.5" in problem
    assert not gone.exists()
    assert "begins at step 0" in str(dry_run.look(loaded(recipe(), dataset, f"{copied}s"), gone).rows)


def test_a_damaged_checkpoint_and_weights_that_are_not_read_again_are_no_problem(recipe, dataset, tmp_path):
    weights, run = tmp_path / "weights.pt", tmp_path / "run"
    towers = begin.make_towers(loaded(recipe(), dataset), RECIPE["model"]["config"], pretrained=False)
    torch.save(towers.state_dict(), weights)
    path = recipe(train={"steps": 8}, model={"pretrained": str(weights)})
    assert train([str(path), str(run), "--data", str(dataset)]) == 0
    weights.unlink()
    (run / "checkpoints" / "step-00000008" / "state.json").write_text('{"a')
    found = dry_run.look(loaded(path, dataset, "train.steps=9"), run)
    assert not found.problems
    assert any("goes on from step 4" in value for _, value, _ in found.rows)


def test_what_does_not_fit_the_gpu_is_told(recipe, dataset, tmp_path, monkeypatch):
    path = recipe(train={"device": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "this_gpu_gb", lambda: [0.001])
    (problem,) = dry_run.look(loaded(path, dataset), tmp_path / "run").problems
    assert "more than the GPU's 0.001" in problem

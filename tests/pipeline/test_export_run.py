"""Which weights an export is of, and what becomes of the others when one format fails."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from pipeline import checkpoint as checkpoints
from pipeline.__main__ import main
from pipeline.checkpoint import Checkpoint, CheckpointError
from pipeline.export import run as exporting
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.export.run import Format, export
from pipeline.failure import ParityError
from tests.pipeline.test_export import TEXT, VIT, make_run

SCALES = {1: (1.0, None), 2: (2.0, 20.0), 3: (3.0, 30.0)}


@pytest.fixture
def run(tmp_path):
    """Steps 1, 2 and 3, told apart by their temperature, that of the average too; BEST is 2."""
    run = make_run(tmp_path / "run", VIT, TEXT, "open_clip")
    weights = checkpoints.load(run, 1).model
    for step, (own, averaged) in SCALES.items():
        model = {**weights, "logit_scale": torch.tensor(own)}
        average = None if averaged is None else {**weights, "logit_scale": torch.tensor(averaged)}
        checkpoints.publish(run, Checkpoint(step, model, {}, {}, average))
    keep_best(run, "set/acc1", 2)
    return run


def keep_best(run, figure, step):
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["checkpoint"]["keep_best"] = figure
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (run / "checkpoints" / "BEST").write_text(checkpoints.folder_name(step))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A format that holds a temperature, believed without a process of its own."""

    def write(trained, folder):
        (folder / "scale").write_text(str(trained.towers.logit_scale.item()))

    def refuse(trained, folder):
        raise ExportError("the tower has no counterpart")

    here = exporting.HERE

    def compare(trained, folder, scripts, inputs):
        apart = {"max_abs": 1.0 if scripts == (here / "unequal",) else 0.0, "max_abs_logits": 0.0}
        apart["differing_tokens"] = 0
        return apart | {"reordered_texts": 0, "reordered_images": 0, "images": 1, "texts": 1, "inputs": "none"}

    formats = {
        "open_clip": Format(write, (here / "equal",), ("numpy",), "numpy"),
        "onnx": Format(refuse, (here / "equal",), ("numpy",), "numpy"),
        "torch_export": Format(write, (here / "unequal",), ("numpy",), "numpy"),
        "missing": Format(write, (here / "equal",), ("no-such-package",), "numpy"),
    }
    monkeypatch.setattr(exporting, "FORMATS", formats)
    monkeypatch.setattr(exporting.parity, "compare", compare)


@pytest.mark.parametrize(
    ("asked", "scale", "about"),
    [
        ({}, 3.0, (3, "trained", "newest")),
        ({"step": 1}, 1.0, (1, "trained", "by its step")),
        ({"best": True}, 2.0, (2, "trained", "best by set/acc1")),
        ({"average": True}, 30.0, (3, "average", "newest")),
        ({"average": True, "step": 2}, 20.0, (2, "average", "by its step")),
        ({"average": True, "best": True}, 20.0, (2, "average", "best by set/acc1")),
    ],
)
def test_the_weights_are_those_that_were_asked_for_and_told(run, asked, scale, about):
    found = export(run, formats=["open_clip"], **asked)["open_clip"]
    folder = run / "export" / "open_clip"
    assert float((folder / "scale").read_text()) == scale
    assert (found["step"], found["weights"], found["chosen"]) == about
    assert json.loads((folder / "parity.json").read_text()) == found
    assert json.loads((run / "export" / "parity.json").read_text()) == {"open_clip": found}
    what = "The moving average of its weights" if about[1] == "average" else "Its weights"
    assert f"{what} after step {about[0]} ({about[2]})." in (folder / "README.md").read_text()
    assert f"| [open_clip](open_clip/README.md) | {about[0]} | {about[1]}, {about[2]} |" in (
        (run / "export" / "README.md").read_text()
    )


def test_the_best_by_a_figure_of_the_average_is_the_average(run):
    keep_best(run, "ema/set/acc1", 2)
    found = export(run, formats=["open_clip"], best=True)["open_clip"]
    assert (found["weights"], found["chosen"]) == ("average", "best by ema/set/acc1")
    assert float((run / "export" / "open_clip" / "scale").read_text()) == 20.0


def test_what_cannot_be_chosen_is_named(run):
    with pytest.raises(ExportError, match="give one of them"):
        export(run, formats=["open_clip"], best=True, step=2)
    with pytest.raises(CheckpointError, match=r"optim\.ema was off"):
        export(run, formats=["open_clip"], average=True, step=1)
    (run / "checkpoints" / "BEST").write_text("step-00000007")
    with pytest.raises(CheckpointError, match="names 'step-00000007', and there is no such checkpoint"):
        export(run, formats=["open_clip"], best=True)
    (run / "checkpoints" / "BEST").unlink()
    with pytest.raises(CheckpointError, match="none is named"):
        export(run, formats=["open_clip"], best=True)
    assert not (run / "export").exists()


def test_a_format_that_fails_does_not_keep_the_others_from_being_written(run):
    with pytest.raises(ParityError, match=r"no counterpart\n.*torch_export was not written"):
        export(run, formats=["onnx", "torch_export", "open_clip"])
    assert sorted(path.name for path in (run / "export").iterdir()) == ["README.md", "open_clip", "parity.json"]


def test_exit_codes_say_whether_something_can_be_changed(run, capsys):
    assert main(["export", str(run), "--format", "torch_export"]) == 1
    assert main(["export", str(run), "--format", "onnx"]) == 2
    assert main(["export", str(run), "--format", "missing"]) == 2
    assert "pip install 'clip-pipeline[export]'" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "torch_export", "--format", "onnx"]) == 1
    assert main(["export", str(run), "--best"]) == 0


def test_figures_of_what_is_gone_are_forgotten(run):
    export(run, formats=["open_clip"])
    (run / "export" / "open_clip").rename(run / "elsewhere")
    assert exporting.read(run) == {}

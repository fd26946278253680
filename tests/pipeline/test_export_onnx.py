"""Towers as ONNX graphs and as torch.export's programs: of every kind, for any number of inputs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from pipeline import trained as loading
from pipeline.__main__ import main
from pipeline.export import onnx as onnx_format
from pipeline.export import run as exporting
from pipeline.export import torch_export
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.export.towers import ImageTower, TextTower, Traceable
from tests.pipeline.test_export import TEXT, VIT, make_run
from tests.pipeline.towers import batch, built, kinds

WRITERS = {"onnx": (onnx_format.write_tower, "onnx"), "torch_export": (torch_export.write_tower, "pt2")}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", VIT, TEXT, "open_clip")


def reloaded(name, folder, pixel_BCSS, token_BL, tmp_path):
    """What the format's own script makes of a folder, in a process of its own."""
    np.save(tmp_path / "pixels.npy", pixel_BCSS.numpy())
    np.save(tmp_path / "tokens.npy", token_BL.numpy())
    script, _ = exporting.FORMATS[name].reload
    subprocess.run([sys.executable, "-P", str(script), str(folder), str(tmp_path)], check=True, cwd=tmp_path)
    with np.load(tmp_path / "found.npz") as file:
        return dict(file)


@pytest.mark.slow
@kinds()
@pytest.mark.parametrize("name", WRITERS)
def test_towers_of_every_kind_are_the_same(config, name, tmp_path):
    """Written at a batch of two, run at one and at three."""
    write, suffix = WRITERS[name]
    towers = built(config).eval()
    pixel_BCSS, token_BL = batch(towers)
    for tower, of, given, example in (
        ("image", ImageTower, "pixels", pixel_BCSS),
        ("text", TextTower, "tokens", token_BL),
    ):
        write(Traceable(of(towers).eval(), given, example[:2]), tmp_path / f"{tower}.{suffix}")
    found = reloaded(name, tmp_path, pixel_BCSS, token_BL, tmp_path)
    with torch.inference_mode():
        np.testing.assert_allclose(found["images"], towers.encode_image(pixel_BCSS, normalize=True), atol=1e-5)
        np.testing.assert_allclose(found["texts"], towers.encode_text(token_BL, normalize=True), atol=1e-5)


def test_graphs_are_documented_and_may_keep_their_weights_beside_them(run, tmp_path, monkeypatch):
    """Beyond what one file holds, the weights are in another; here from the first byte on."""
    monkeypatch.setattr(onnx_format, "LARGEST", 0)
    trained = loading.load(run)
    folder = tmp_path / "folder"
    folder.mkdir()
    onnx_format.write(trained, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("image.onnx", "image.onnx.data", "preprocess.json", "text.onnx", "text.onnx.data", "tokenizer.json")
    ]
    graph = onnx.load(folder / "image.onnx", load_external_data=False)
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", onnx_format.OPSET)]
    session = onnxruntime.InferenceSession(folder / "image.onnx")
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("pixels", ["batch", 3, 16, 16], "tensor(float)")
    assert (output.name, output.shape) == ("embeddings", ["batch", 16])
    session = onnxruntime.InferenceSession(folder / "text.onnx")
    (given,) = session.get_inputs()
    assert (given.name, given.shape, given.type) == ("tokens", ["batch", 12], "tensor(int64)")
    (text_BD,) = session.run(None, {"tokens": trained.tokenize(["red", "green", "blue"]).numpy()})
    np.testing.assert_allclose(np.linalg.norm(text_BD, axis=1), 1, atol=1e-6)
    text = json.loads((folder / "preprocess.json").read_text())["text"]
    assert text == {"tokenizer": "tokenizer.json", "context_length": 12, "end_id": 49407, "pad_id": 0}


class Choosy(nn.Module):
    """Its path depends on what it is given, which no graph can say."""

    def forward(self, pixel_BCSS):
        return pixel_BCSS.flatten(1)[:, :16] if pixel_BCSS.sum() > 0 else pixel_BCSS.flatten(1)[:, 16:32]


@pytest.mark.parametrize("name", WRITERS)
def test_a_tower_that_no_graph_holds_is_refused_with_the_reason(run, tmp_path, name):
    trained = loading.load(run)
    trained.towers.visual.forward = Choosy().forward
    with pytest.raises(ExportError, match=r"image tower cannot be .*(data-dependent|GuardOnDataDependent)"):
        exporting.FORMATS[name].write(trained, tmp_path)


@pytest.mark.parametrize(
    ("name", "allowed"), [("onnx", {"onnxruntime", "numpy"}), ("torch_export", {"torch", "numpy"})]
)
def test_they_are_reloaded_by_their_own_library_only(name, allowed):
    found = set()
    for node in ast.walk(ast.parse(exporting.FORMATS[name].reload[0].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert found - {"sys", "pathlib"} == allowed


@pytest.mark.slow
def test_a_tampered_export_is_not_published_and_the_others_are(run, monkeypatch, capsys):
    """A thousandth in one weight; the former export stays, and the command ends with exit code 1."""
    name = "torch_export"
    assert main(["export", str(run), "--format", name]) == 0
    before = exporting.hashes(run / "export" / name)

    def write(trained, folder):
        kept = trained.towers.text_projection.detach().clone()
        trained.towers.text_projection.data[0, 0] += 1e-3
        torch_export.write(trained, folder)
        trained.towers.text_projection.data.copy_(kept)

    monkeypatch.setitem(exporting.FORMATS, name, exporting.FORMATS[name]._replace(write=write))
    assert main(["export", str(run), "--format", name, "--format", "open_clip"]) == 1
    assert "embeddings differ by up to" in capsys.readouterr().err
    assert exporting.hashes(run / "export" / name) == before
    assert sorted(exporting.read(run)) == ["open_clip", name]
    assert sorted(path.name for path in (run / "export").iterdir()) == ["README.md", "open_clip", "parity.json", name]

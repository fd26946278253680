"""Models from wherever they come: a run, an exported folder, open_clip by name; and embeddings that are kept."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image

from data_prep.record import DataError
from pipeline import trained as loading
from pipeline.evaluate.embed import Embedder, KeptEmbeddings
from pipeline.evaluate.run import evaluate
from tests.pipeline.test_during import data, one_thread, run  # noqa: F401 (fixtures)

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PICTURE = Image.effect_noise((40, 50), 80).convert("RGB")


def embedded(model):
    with torch.no_grad():
        image = model.towers.encode_image(model.preprocess(PICTURE)[None], normalize=True)
        return torch.cat([image, model.towers.encode_text(model.tokenize(["a dog"]), normalize=True)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(towers, their name in open_clip, a checkpoint of open_clip's trainer, an open_clip folder)"""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "clip-of-this-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    towers = open_clip.CLIP(**CONFIG).eval()
    torch.save({"epoch": 3, "name": "n", "state_dict": towers.state_dict()}, folder / "epoch_3.pt")
    local = folder / "local"
    local.mkdir()
    mean = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "resize_mode": "shortest"}
    (local / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": mean}))
    torch.save(towers.state_dict(), local / "open_clip_pytorch_model.bin")
    return towers, "clip-of-this-test", folder / "epoch_3.pt", local


def test_open_clip_s_models_load_by_name_and_file_and_folder(tiny):
    towers, name, checkpoint, folder = tiny
    by_file = loading.load_any(f"{name},{checkpoint}")
    assert (by_file.name, by_file.source) == (name, str(checkpoint))
    for key, value in towers.state_dict().items():
        torch.testing.assert_close(by_file.towers.state_dict()[key], value, rtol=0, atol=0)
    by_folder, by_schema = loading.load_any(str(folder)), loading.load_any(f"local-dir:{folder}")
    torch.testing.assert_close(embedded(by_folder), embedded(by_schema), rtol=0, atol=0)
    texts = embedded(by_folder)[1], embedded(by_file)[1]
    torch.testing.assert_close(*texts, rtol=0, atol=0)
    assert (embedded(by_folder)[0] - embedded(by_file)[0]).abs().max() > 1e-3  # another normalisation
    assert by_folder.identity == by_schema.identity != by_file.identity


def test_the_identity_is_that_of_weights_and_of_how_they_are_used(tiny, run):  # noqa: F811
    _, name, checkpoint, _ = tiny
    assert loading.load_any(f"{name},{checkpoint}").identity == loading.load_any(f"{name},{checkpoint}").identity
    model = loading.load(run)
    other = loading.load(run)
    assert model.identity == other.identity
    with torch.no_grad():
        other = loading.load(run)
        other.towers.logit_scale.add_(1)
    assert model.identity != other.identity
    path = next((run / "tokenizer").glob("*"), None)
    if path:
        path.write_bytes(path.read_bytes() + b" ")
        assert loading.load(run).identity != model.identity


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "looked for a run folder"),
        ("ViT-B-32,", "looked for a run folder"),
        ("ViT-B-32,no_such_tag", "open_clip cannot load it"),
        ("No-Such-Model,tag", "open_clip cannot load it"),
        ("local-dir:/no/such/folder", "open_clip cannot load it"),
    ],
)
def test_what_is_no_model_says_what_was_looked_for(source, message):
    with pytest.raises(DataError, match=message):
        loading.load_any(source)


def test_steps_and_averages_are_a_run_s(tiny, run):  # noqa: F811
    with pytest.raises(DataError, match="is no run folder"):
        loading.load_any(str(tiny[3]), step=3)
    with pytest.raises(DataError, match=r"optim\.ema was off"):
        loading.load(run, average=True)


def test_any_model_is_measured_where_it_is_told(tiny, data, tmp_path):  # noqa: F811
    with pytest.raises(DataError, match="--out FOLDER"):
        evaluate(str(tiny[3]), data)
    records = evaluate(str(tiny[3]), data, out=tmp_path / "out", names=["pairs_test"])
    assert json.loads(json.dumps(records)) == [json.loads((tmp_path / "out" / "pairs_test.json").read_text())]
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert rows[0] == "model,pretrained,task,dataset,metric,value,low,high,chance,images,group"
    assert len(rows) == 1 + len(records[0]["metrics"])


def test_embeddings_are_made_once_a_model_and_input(run, data, monkeypatch):  # noqa: F811
    first = evaluate(str(run), data)
    calls = []
    monkeypatch.setattr(Embedder, "_share", lambda *_: calls.append(1) or pytest.fail("embedded again"))
    assert evaluate(str(run), data) == first
    monkeypatch.undo()
    kept = sorted((run / "eval" / "step-00000060" / "embeddings").glob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:40])  # cut off: made again
    assert evaluate(str(run), data) == first


def test_the_cache_knows_what_it_was_asked(tmp_path):
    made = iter(torch.arange(9.0)[:, None])
    cache, other = KeptEmbeddings(tmp_path, "one"), KeptEmbeddings(tmp_path, "two")
    found = [
        cache.get(["ab", "c"], lambda: next(made)),
        cache.get(["a", "bc"], lambda: next(made)),
        cache.get(["c", "ab"], lambda: next(made)),
        other.get(["ab", "c"], lambda: next(made)),
        cache.get(["ab", "c"], lambda: next(made)),
    ]
    assert [value.item() for value in found] == [0, 1, 2, 3, 0]

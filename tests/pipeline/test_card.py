"""What a model card says is what was recorded, and what it says to do works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from data_prep import manifest
from pipeline import trained as loading
from pipeline.evaluate import run as evaluation
from pipeline.evaluate.result import Result
from pipeline.evaluate.statistics import Sampled
from pipeline.export import card
from pipeline.export import run as exporting
from tests.pipeline.test_export import EOS_POOL, TEXT, TIMM, VIT, make_run, train_vocabulary
from tests.pipeline.test_export_huggingface import bert_text, with_bert, write_bert

TEXTS = ["a red circle", "a blue star"]
FIGURES = {
    **{"step": 1, "weights": "trained", "chosen": "newest", "max_abs": 1e-7, "inputs": "coco_5k"},
    **{"images": 32, "texts": 137, "versions": {"onnxruntime": "1.32.0"}},
}


def photo(path):
    """Neither square nor of few colours."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (23, 40, 3), dtype=np.uint8)).resize((101, 67))
    image.save(path)
    return Image.open(path)


def check_snippets(run, formats):
    """Export, and run each card's code in a process of its own, as somebody who got the folder would."""
    exporting.export(run, formats=formats)
    trained = loading.load(run)
    for name in formats:
        folder = run / "export" / name
        image = photo(folder / "photo.png")
        (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        code = snippet.replace("photo.jpg", "photo.png")  # whose pixels are the same wherever it is read
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        with torch.inference_mode():
            image_D = trained.towers.encode_image(trained.preprocess(image)[None], normalize=True)
            text_BD = trained.towers.encode_text(trained.tokenize(TEXTS), normalize=True)
        np.testing.assert_allclose(json.loads(done.stdout), (image_D @ text_BD.T).numpy(), atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_snippet_of_a_bpe_model_gives_its_cosines(tmp_path):
    check_snippets(make_run(tmp_path / "run", VIT, TEXT, "open_clip"), ["onnx"])


@pytest.mark.slow
def test_the_snippets_of_a_bpe_model_give_its_cosines_in_every_format(tmp_path):
    check_snippets(make_run(tmp_path / "run", VIT, TEXT, "open_clip"), list(exporting.FORMATS))


@pytest.mark.slow
def test_the_snippets_of_a_sentencepiece_model_with_a_timm_tower_give_its_cosines_in_every_format(tmp_path):
    vocabulary = train_vocabulary(tmp_path / "bpe.model")
    run = make_run(tmp_path / "run", TIMM, {**TEXT, **EOS_POOL}, "sentencepiece", vocabulary)
    check_snippets(run, list(exporting.FORMATS))


@pytest.mark.slow
def test_the_snippet_of_a_model_of_oblong_pictures_gives_its_cosines(tmp_path):
    run = make_run(tmp_path / "run", {**VIT, "image_size": [16, 40]}, TEXT, "open_clip")
    check_snippets(run, ["onnx", "torch_export"])


@pytest.mark.slow
def test_the_snippets_of_a_hugging_face_text_tower_give_its_cosines_in_every_format(tmp_path):
    """Whose folder, in half precision there, is gone by then."""
    (tmp_path / "bert").mkdir()
    bert = write_bert(tmp_path / "bert")
    run = with_bert(tmp_path / "run", bert, VIT, bert_text(bert))
    shutil.rmtree(bert)
    check_snippets(run, list(exporting.FORMATS))


def test_every_format_has_a_snippet():
    snippets = {path.name.removesuffix(".py.jinja") for path in exporting.HERE.glob("snippets/[a-z]*.py.jinja")}
    assert snippets == set(exporting.FORMATS)


def test_the_head_is_what_hubs_read(tmp_path):
    trained = loading.load(make_run(tmp_path / "run", VIT, TEXT, "open_clip"))
    found = ModelCard(card.write(trained, "onnx", "onnx", FIGURES, "apache-2.0")).data
    assert (found.license, found.library_name, found.pipeline_tag) == (
        *("apache-2.0", "onnx", "zero-shot-image-classification"),
    )
    assert found.tags == ["clip", "onnx"]


def test_a_run_that_recorded_nothing_says_so(tmp_path):
    trained = loading.load(make_run(tmp_path / "run", VIT, TEXT, "open_clip"))
    text = card.write(trained, "onnx", "onnx", FIGURES)
    assert "Not recorded with this run." in text
    assert "These weights have not been evaluated." in text
    assert "- Licence of the weights: unknown, since nobody has said." in text
    for what in (*card.TASKS.values(), card.GROUPS, *card.ALWAYS):
        assert f"- Never measured: {what}." in text


@pytest.fixture
def recorded(tmp_path, dataset):
    """A run that knows its data, its machine, two steps, and results of these weights and of others."""
    run = make_run(tmp_path / "run", VIT, TEXT, "open_clip")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["data"]["datasets"] = [{"path": str(dataset), "weight": 1.0}]
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        **{"machine": "x86_64", "world_size": 2, "devices": "cpu", "code": "abc", "packages": {"torch": "2.14.1"}},
        "datasets": {str(dataset): manifest.read(dataset).fingerprint("train")},
        "accepted_changes": [{"step": 1, "changes": ["optim.lr was 1"]}],
    }
    (run / "environment.json").write_text(json.dumps(environment))
    lines = [{"step": step, "samples_seen": 2 * step, "wall_s": 60.0 * step} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = loading.load(run)
    hits = np.arange(40) % 2
    for name, chance, weights in (("known", 0.1, None), ("guessed", 0.5, None), ("stale", 0.1, "others")):
        result = Result("image_caption_selection", 40, {"acc": Sampled.of(hits)}, {"acc": chance})
        found = evaluation.record(trained, name, "data", result)
        evaluation.write(
            evaluation.results_folder(trained), name, found | ({"weights": weights} if weights else {}), result
        )
    return trained, dataset


def test_what_was_recorded_is_on_the_card(recorded):
    trained, dataset = recorded
    text = card.write(trained, "onnx", "onnx", FIGURES)
    described = manifest.read(dataset)
    counts = described.manifest["splits"]["train"]
    assert f"fingerprint `{described.fingerprint('train')}`" in text
    assert f"{counts['samples']:,} images with {counts['captions']:,} captions trained" in text
    assert (
        sum(int(found) for found in re.findall(r"^\| table \| not recorded \| (\d+) \|$", text, re.M))
        == counts["samples"]
    )
    assert "- steps: 1 of 2 pairs, 2 seen in all\n- time: 60 s" in text
    assert "- hardware: 2 × cpu (x86_64)" in text
    assert "- changed at step 1: optim.lr was 1" in text
    assert re.search(r"\| known \| 40 \| right caption chosen \| 0\.500 \| 0\.\d+ – 0\.\d+ \| 0\.100 \|", text)
    assert re.search(r"^- guessed: .* \*\*not told apart from chance\*\*", text, re.M)
    assert not re.search(r"^- known: ", text, re.M)
    assert "stale" not in text  # other weights'
    assert f"- Never measured: {card.TASKS['image_caption_selection']}." not in text
    assert "1.0e-07" in text
    assert "onnxruntime 1.32.0" in text


def test_no_path_of_the_machine_that_trained_is_on_the_card(recorded):
    trained, dataset = recorded
    text = card.write(trained, "onnx", "onnx", FIGURES)
    assert str(dataset.parent) not in text
    assert str(trained.run.parent) not in text
    assert f"path: …/{dataset.name}" in text


def test_data_that_are_others_by_now_are_not_counted(recorded):
    trained, dataset = recorded
    environment = json.loads((trained.run / "environment.json").read_text())
    environment["datasets"] = {str(dataset): "0" * 64}
    (trained.run / "environment.json").write_text(json.dumps(environment))
    text = card.write(trained, "onnx", "onnx", FIGURES)
    assert f"fingerprint `{'0' * 64}`" in text
    assert "The data were not at hand when this was written" in text
    assert "captions trained" not in text


def test_coco_s_licences_go_by_name():
    assert card._licence("coco+vqa", "3") == "CC BY-NC-ND 2.0"
    assert card._licence("table", "3") == "3"
    assert card._licence("flickr30k", None) == "not recorded"

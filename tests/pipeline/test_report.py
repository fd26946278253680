"""A small run, with a dataset of every kind of set, is evaluated; its page says all of it and needs no network."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import manifest
from data_prep.record import DataError
from pipeline import checkpoint as checkpoints
from pipeline import config, model
from pipeline.checkpoint import Checkpoint
from pipeline.evaluate import sets
from pipeline.evaluate.run import evaluate
from pipeline.evaluate.sets import EvaluationError
from pipeline.report import verdicts, write_report

IMAGES = 12
COLORS = ("red", "green", "<blue>")
KINDS = {"pairs_test": "retrieval", "colors_test": "classification", "order_test": "selection", "asked_val": "vqa"}


def write_set(folder, kind):
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(COLORS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\nsomething {c}\n")
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard * IMAGES // 2, (shard + 1) * IMAGES // 2):
                buffer = io.BytesIO()
                pixels = np.full((20, 24, 3), 20 * number, dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "PNG")
                members = {"png": buffer.getvalue(), "json": b"{}"}
                if kind == "classification":
                    members["cls"] = str(number % 2).encode()  # the third class has no image
                else:
                    members["txt"] = f"picture {number} & more\na shared caption".encode()
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_run(run):
    """One checkpoint of random weights, and the files that training leaves."""
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
    values = {
        "model": {"config": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}},
        "train": {"steps": 60, "batch_size": 4},
        "evaluate": {"workers": 0, "batch_size": 5},
    }
    recipe = config.parse(values, "test")
    run.mkdir()
    checkpoints.write_atomically(run / "config.yaml", recipe.to_yaml())
    torch.manual_seed(0)
    towers = model.build(recipe.model.config)
    checkpoints.publish(run, Checkpoint(60, towers.state_dict(), {}, {}))
    environment = {"samples": 90, "world_size": 2, "devices": "cpu", "data_fingerprint": "other"}
    (run / "environment.json").write_text(json.dumps(environment))
    lines = [
        {
            "step": step,
            "epoch": 0,
            "samples_seen": 4 * step,
            "wall_s": 0.5 * step,
            "loss": None if step == 30 else 5 / step,
            "logit_scale": 14.0 + step,
            "samples_per_s": 8.0,
        }
        for step in range(1, 61)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sum(parameter.numel() for parameter in towers.parameters())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(run, dataset, results, parameters of the model)."""
    root = tmp_path_factory.mktemp("report")
    data = root / "data"
    for name, kind in KINDS.items():
        write_set(data / "eval" / name, kind)
    totals = {"shards": 2, "samples": IMAGES, "captions": 2 * IMAGES, "bytes": 1}
    counts = {
        "read": {"mine": 123},
        "kept": {"mine": 120},
        "dropped": {"mine": {"held_out_id": 3}, "mine+yours": {"corrupt": 4}},
    }
    splits = {name: {"kind": kind, **totals} for name, kind in KINDS.items()}
    manifest.write(data, {"name": "small", "splits": splits, "counts": counts}, [], [])
    parameters = write_run(root / "run")
    return root / "run", data, evaluate(str(root / "run"), data), parameters


@pytest.fixture(scope="module")
def page(evaluated):
    run, data, _, _ = evaluated
    (run / "export").mkdir()
    found = {"step": 60, "max_abs": 1.5e-7, "differing_tokens": 0, "images": 32, "texts": 136, "inputs": "pairs_test"}
    (run / "export" / "parity.json").write_text(json.dumps({"open_clip": found}))
    return write_report(run, data).read_text()


def test_results_follow_clip_benchmarks_schema(evaluated):
    run, _, results, _ = evaluated
    files = sorted((run / "eval" / "step-00000060").glob("*.json"))
    assert [file.stem for file in files] == sorted(set(KINDS) - {"asked_val"})
    for file in files:
        record = json.loads(file.read_text())
        assert record in json.loads(json.dumps(results))
        assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= set(record)
        assert record["metrics"].keys() == record["intervals"].keys() >= record["chance"].keys()
        for name, (low, high) in record["intervals"].items():
            assert low <= record["metrics"][name] <= high
            if name in record["chance"] and not name.endswith("rank"):
                assert 0 <= low <= high <= 1
    tasks = {record["dataset"]: record["task"] for record in results}
    assert tasks == {
        "pairs_test": "zeroshot_retrieval",
        "colors_test": "zeroshot_classification",
        "order_test": "image_caption_selection",
    }


def test_classes_are_told_apart(evaluated):
    classes = next(record for record in evaluated[2] if record["dataset"] == "colors_test")["classes"]
    assert [(found["name"], found["images"]) for found in classes] == [("red", 6), ("green", 6), ("<blue>", 0)]
    assert classes[2]["recall"] is None


def test_one_set_by_name_and_sets_that_there_are_not(evaluated):
    run, data, _, _ = evaluated
    assert [record["dataset"] for record in evaluate(str(run), data, names=["order_test"])] == ["order_test"]
    with pytest.raises(EvaluationError, match="no evaluation set other"):
        evaluate(str(run), data, names=["other"])
    with pytest.raises(EvaluationError, match="no train questions"):
        evaluate(str(run), data, names=["asked_val"])


def test_damage_is_named(tmp_path):
    """An image that does not decode, and a class without a name."""
    write_set(tmp_path / "set", "classification")
    source = manifest.EvaluationSet("set", "classification", tmp_path / "set", IMAGES)
    items = sets.read(source)
    tar = tmp_path / "set" / "test" / "0.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[items[3].offset : items[3].offset + items[3].size] = bytes(items[3].size)
    tar.write_bytes(damaged)
    with pytest.raises(EvaluationError, match=r"0\.tar: image s0000003 does not decode"):
        items[3].open()
    assert items[2].open().size == (24, 20)
    names = tmp_path / "set" / "classnames.txt"
    names.write_text("red\n\ngreen\n")
    with pytest.raises(EvaluationError, match="line 2 is empty"):
        sets.class_names(source)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Training",
            "Results on held-out data",
            "What the model can do, and what it cannot",
            "Best and worst retrievals",
            "Confused classes",
        ),
        *("Text → images", "Image → texts", "Exports", "Recipe", "Checkpoint of step 60", "1.5e-07"),
        *(
            "123",
            "3 held_out_id",
            "4 corrupt",
            "the run was trained on other data",
            "95 % interval",
            "mean per-class recall",
        ),
    ],
)
def test_the_page_has(page, text):
    assert text in page


def test_the_page_has_the_figures_of_the_run(page, evaluated):
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["step"] == "60"
    assert facts["parameters"] == f"{evaluated[3]:,}"
    assert facts["pairs seen"] == "240"
    assert facts["train images"] == "90"
    for record in evaluated[2]:
        for value in record["metrics"].values():
            assert f"{value:.3f}" in page


def test_the_page_needs_no_network(page):
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)
    sources = re.findall(r'<img src="([^"]*)"', page)
    # Curves; best and worst three captions' five images, and three images; confused pairs; three captions' pictures and
    # a map a word, of "picture N & more".
    confused = len(re.findall("taken for", page))
    assert confused > 0
    assert len(sources) == 2 + 6 * 5 + 6 + confused + 3 * (1 + 3)
    for source in sources:
        head, _, encoded = source.partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        Image.open(io.BytesIO(base64.b64decode(encoded))).verify()


def test_captions_and_names_are_escaped(page):
    assert "picture 0 &amp; more" in page
    assert "<blue>" not in page


def test_a_caption_that_every_image_has_is_right_everywhere(page):
    lists = re.findall(r"<ol>(.*?)</ol>", page, re.DOTALL)
    said = [item for found in lists for item in re.findall(r"<li.*?</li>", found) if "a shared caption" in item]
    assert all('class="right"' in item and "✓" in item for item in said)


def test_a_run_that_was_only_trained_has_a_page(tmp_path):
    write_run(tmp_path / "run")
    page = write_report(tmp_path / "run", None).read_text()
    assert "has not been evaluated" in page
    assert "Best and worst" not in page


def test_no_run_says_so(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_report(tmp_path, None)


@pytest.mark.parametrize(
    ("interval", "state"),
    [([0.51, 0.7], "above"), ([0.45, 0.6], "chance"), ([0.5, 0.7], "chance"), ([0.2, 0.4], "below")],
)
def test_a_set_is_judged_by_whether_its_interval_holds_chance(interval, state):
    record = {"dataset": "binding", "metrics": {"acc": 0.55}, "intervals": {"acc": interval}, "chance": {"acc": 0.5}}
    found = verdicts([record])
    assert [verdict["set"] for verdict in found[state]] == ["binding"]
    assert sum(map(len, found.values())) == 1

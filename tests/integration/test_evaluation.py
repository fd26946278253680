"""`pipeline evaluate` from a dataset's folders to its files: CLIP_benchmark's figures, on any number of ranks."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
from pathlib import Path

import open_clip
import pytest
import torch

from data_prep.__main__ import main as data_prep
from pipeline.__main__ import main
from pipeline.evaluate.run import evaluate
from tests import peers
from tests.data_prep import layouts
from tests.pipeline.test_during import one_thread  # noqa: F401 (fixture)
from tests.processes import run_ranks

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16},
    "text_cfg": {"width": 64, "heads": 4, "layers": 2},
}
PHOTO = (50, 40)
# More than one batch, and captions of one, five and seven an image.
PAIRS, CAPTIONS = 75, (1, 5, 7)
CLASSES = {"cat": 20, "dog": 12, "bird": 9, "horse": 6, "boat": 4, "no such thing": 0}
CLASSES |= dict.fromkeys(("tree", "house", "car", "chair", "a long way from home"), 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An open_clip folder; its weights are large enough that images and texts are told apart."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    towers = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    torch.save(towers.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`things`, a class of which has no image; coco_karpathy_test; and sets of a single image."""
    root = tmp_path_factory.mktemp("raw")
    for label, (name, count) in enumerate(CLASSES.items()):
        for number in range(count):
            layouts.picture(root / "images/things" / name / f"{number}.jpg", 1000 * label + number, PHOTO)
    (root / "images/things/classnames.txt").write_text("\n".join(CLASSES))
    (root / "images/things/templates.txt").write_text("a photo of a {c}.\na {c}, and more words than before.\n")
    for name in ("one", "two"):
        layouts.picture(root / "images/single" / name / "1.jpg", 50_000, PHOTO)
    (root / "images/single/two/1.jpg").unlink()
    write_pairs(root / "karpathy", {"test": PAIRS, "val": 1}, different=PAIRS)
    sources = [f"images={root / 'images'}", f"coco_karpathy={root / 'karpathy'}"]
    assert (
        data_prep(["build", *sources, "--out", str(root / "out"), "--samples-per-shard", "40", "--workers", "1"]) == 0
    )
    return root / "out"


def write_pairs(root, splits, different):
    """So many pictures in each split; each so many have the same captions."""
    first = 60_000
    ids = {split: list(range(first, first := first + count)) for split, count in splits.items()}
    layouts.karpathy(root, ids)
    content = json.loads((root / "dataset_coco.json").read_text())
    for number, image in enumerate(content["images"]):
        layouts.picture(root / "val2014" / image["filename"], image["cocoid"], PHOTO)
        count = CAPTIONS[number % len(CAPTIONS)] if image["split"] == "test" else max(CAPTIONS)
        words = [f"Caption {text} of picture {number % different}{', at length' * text}." for text in range(count)]
        image["sentences"] = [{"raw": text} for text in words]
    layouts.dump(root / "dataset_coco.json", content)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "figures"), [("things", 2 + 1), ("coco_karpathy_test", 6)])
def test_every_figure_is_clip_benchmark_s(name, figures, model, data, tmp_path):
    ours, theirs = both(model, data, name, tmp_path)
    assert ours["task"] == theirs["task"]
    assert not ours["ties"]
    assert len(theirs["metrics"]) == figures
    assert {key: ours["metrics"][key] for key in theirs["metrics"]} == pytest.approx(theirs["metrics"], abs=1e-6)
    assert len({*theirs["metrics"].values()} - {0, 1}) == figures  # they tell models apart


@pytest.mark.slow
def test_where_ties_decide_clip_benchmark_is_within_their_range(model, tmp_path):
    """Pictures that share captions: it takes those that torch.topk happens to put first."""
    write_pairs(tmp_path / "raw", {"test": PAIRS}, different=PAIRS // 3)
    assert data_prep(["build", f"coco_karpathy={tmp_path / 'raw'}", "--out", str(tmp_path / "data")]) == 0
    ours, theirs = both(model, tmp_path / "data", "coco_karpathy_test", tmp_path)
    assert any(name.startswith("text_retrieval") for name in ours["ties"])
    for name, value in theirs["metrics"].items():
        low, high = ours["ties"].get(name, (ours["metrics"][name],) * 2)
        assert low - 1e-6 <= value <= high + 1e-6
        assert low <= ours["metrics"][name] <= high


def both(model, data, name, folder):
    """Our record and CLIP_benchmark's, of its own command."""
    peers.install()
    options = ["--no_amp", "--num_workers", 1]
    command = peers.clip_benchmark(model, data / "eval" / name, folder / "theirs.json", *options)
    subprocess.run(command, env=peers.environment(), cwd=folder, check=True)
    (ours,) = evaluate(str(model), data, names=[name], out=folder / "ours")
    return ours, json.loads((folder / "theirs.json").read_text())


def evaluated(rank, world, model, data, out, transform):
    """The records of one of the ranks that a launcher started."""
    multiprocessing.current_process()._config["daemon"] = False  # else it may have no loader processes
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return evaluate(str(model), data, out=out, transform=transform)


@pytest.mark.parametrize("transform", ["exact", "fast"])
def test_two_ranks_find_what_one_finds(transform, model, data, tmp_path):
    alone = evaluate(str(model), data, out=tmp_path / "one", transform=transform)
    for records in run_ranks(2, evaluated, model, data, tmp_path / "two", transform):
        assert records == alone
    for record in alone:
        name = f"{record['dataset']}.json"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        assert record["transform"] == transform


def test_a_single_image_is_found_and_a_class_without_images_is_a_wrong_answer(model, data, tmp_path):
    names = ["coco_karpathy_val", "single", "things"]
    retrieval, single, things = evaluate(str(model), data, names=names, out=tmp_path)
    recalls = {key: value for key, value in retrieval["metrics"].items() if "recall" in key}
    assert retrieval["images"] == single["images"] == 1
    assert len(recalls) == 6
    assert all(value == 1 and retrieval["intervals"][key] == (1, 1) for key, value in recalls.items())
    assert single["metrics"]["acc1"] in (0, 1)
    assert single["metrics"]["acc5"] == 1  # of two classes
    assert things["images"] == sum(CLASSES.values())
    assert things["chance"]["acc1"] == 1 / len(CLASSES)
    empty = things["classes"][list(CLASSES).index("no such thing")]
    assert (empty["images"], empty["recall"]) == (0, None)
    recalls = [one["recall"] for one in things["classes"] if one["images"]]
    assert things["metrics"]["mean_per_class_recall"] == pytest.approx(math.fsum(recalls) / len(recalls), abs=1e-12)


def test_transforms_share_no_embeddings(model, data, tmp_path):
    """In one folder, what one of them left is nothing to the other."""
    fresh = {name: evaluate(str(model), data, out=tmp_path / name, transform=name) for name in ("exact", "fast")}
    together = tmp_path / "exact"
    options = ["--data", str(data), "--out", str(together), "--transform", "fast"]
    before = set((together / "embeddings").iterdir())
    assert main(["evaluate", str(model), *options]) == 0
    assert len(set((together / "embeddings").iterdir()) - before) == len(before)
    for record in fresh["fast"]:
        assert json.loads((together / f"{record['dataset']}.json").read_text()) == json.loads(json.dumps(record))
    assert fresh["exact"][0]["weights"] != fresh["fast"][0]["weights"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transform", "quick"], "Choose exact or fast"),
        (["--transform", "fast", "--watch"], "leave out all but"),
    ],
)
def test_what_cannot_be_asked_for_says_so(options, message, model, data, tmp_path, capfd):
    assert main(["evaluate", str(model), "--data", str(data), "--out", str(tmp_path), *options]) == 2
    assert message in capfd.readouterr().err


def test_a_model_that_crops_otherwise_is_refused_by_name(model, data, tmp_path, capfd):
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_pytorch_model.bin").symlink_to(model / "open_clip_pytorch_model.bin")
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--transform", "fast"]
    assert main(["evaluate", str(tmp_path), *options]) == 2
    assert "takes its images otherwise: Resize(size=(32, 32)" in capfd.readouterr().err

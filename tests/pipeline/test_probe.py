"""`python -m pipeline probe`: from images to figures, by each way to name them; and what equal embeddings give."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.linear_model import LogisticRegression

from pipeline.__main__ import main
from pipeline.evaluate import image_folder
from pipeline.evaluate.compare import compare
from pipeline.evaluate.probe import find_pair, measure, probe
from pipeline.evaluate.result import read_rows
from pipeline.evaluate.sets import EvaluationError
from tests.pipeline.tars import write_tar
from tests.pipeline.test_during import data, one_thread, run  # noqa: F401 (fixtures)
from tests.pipeline.test_image_folder import write_folder
from tests.processes import run_ranks

FIGURES = [f"{way}_{name}" for way in ("lp", "knn") for name in ("acc1", "acc5", "mean_per_class_recall")]


@pytest.fixture
def folders(tmp_path):
    """Class folders to fit on and to measure on; of one class there are no test images."""
    train = {f"{name}/{n}.jpg": 10 * n + place for place, name in enumerate(("ant", "bee", "cat")) for n in range(8)}
    test = {f"{name}/{n}.jpg": 500 + 10 * n + place for place, name in enumerate(("ant", "cat")) for n in range(5)}
    return write_folder(tmp_path / "train_images", train), write_folder(tmp_path / "animals", test)


def in_tars(root, train, test):
    """The same in CLIP_benchmark's layout."""
    for split, folder in (("train", train), ("test", test)):
        members = {}
        for number, item in enumerate(image_folder.read(folder, ("ant", "bee", "cat"))):
            members |= {f"s{number:07d}.cls": str(item.label).encode(), f"s{number:07d}.jpg": item.read()}
        write_tar(root / split / "0.tar", members)
        (root / split / "nshards.txt").write_text("1\n")
    return root


def test_folders_and_tars_of_the_same_images_give_the_same_figures(folders, run, tmp_path):  # noqa: F811
    train, test = folders
    out = ["--out", str(tmp_path / "out")]
    assert main(["probe", str(run), "--train", str(train), "--test", str(test), "--k", "3", *out]) == 0
    ours = json.loads((tmp_path / "out" / "animals.probe.json").read_text())
    assert (ours["dataset"], ours["task"], ours["images"]) == ("animals", "linear_probe", 10)
    assert (ours["train_images"], ours["knn"]["k"], ours["linear_probe"]["converged"]) == (24, 3, True)
    assert set(FIGURES) <= set(ours["metrics"]) == set(ours["intervals"])
    assert [(one["name"], one["images"]) for one in ours["knn"]["classes"]] == [("ant", 5), ("bee", 0), ("cat", 5)]
    tars = in_tars(tmp_path / "tars", train, test)
    assert main(["probe", str(run), "--data", str(tars), "--k", "3", *out]) == 0
    theirs = json.loads((tmp_path / "out" / "tars.probe.json").read_text())
    for name in ("metrics", "intervals", "chance", "images", "train_images"):
        assert theirs[name] == ours[name]
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(ours["metrics"])
    assert set(read_rows(tmp_path / "out" / "animals.probe.parquet")) == set(ours["metrics"])
    assert {one.dataset for one in compare(tmp_path / "out", tmp_path / "out")} == {"animals.probe", "tars.probe"}


@pytest.mark.slow
def test_two_ranks_give_one_rank_s_figures(folders, run, tmp_path):  # noqa: F811
    alone = probe(str(run), None, *folders, out=tmp_path / "one")
    shared = run_ranks(2, _on_rank, str(run), *folders, tmp_path / "two")
    assert shared == [alone["metrics"], None]


def _on_rank(rank, world, run, train, test, out):  # noqa: F811
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    found = probe(run, None, train, test, out=out)
    return found and found["metrics"]


def test_sets_of_a_dataset_by_name(data, run, tmp_path):  # noqa: F811
    with pytest.raises(EvaluationError, match=r"train/nshards\.txt: looked for train images"):
        find_pair(data, None, None, "", "")
    pair = find_pair(data, None, None, "colors_test", "colors_test")
    assert [item.label for item in pair.train] == [item.label for item in pair.test]
    with pytest.raises(EvaluationError, match="no evaluation set other"):
        find_pair(data, None, None, "other", "colors_test")
    with pytest.raises(EvaluationError, match="one classification set called pairs_test, and there are none"):
        find_pair(data, None, None, "colors_test", "pairs_test")
    # Neighbours of themselves.
    chosen = ["--train-set", "colors_test", "--test-set", "colors_test", "--k", "1", "--transform", "fast"]
    assert main(["probe", str(run), "--data", str(data), *chosen, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "colors_test.probe.json").read_text())
    assert (found["metrics"]["knn_acc1"], found["transform"]) == (1, "fast")


@pytest.mark.parametrize("given", [("d", None, None, "a", ""), ("d", "x", "y", "", ""), (None, "x", None, "", "")])
def test_what_is_said_by_halves_is_refused(given):
    with pytest.raises(EvaluationError, match="was not said"):
        find_pair(*given)


def test_classes_are_told_by_their_names(folders, tmp_path):
    train, test = folders
    pair = find_pair(None, train, test, "", "")
    assert pair.names == ("ant", "bee", "cat")
    assert [item.label for item in pair.test] == [0] * 5 + [2] * 5
    (test / "cat").rename(test / "dog")
    with pytest.raises(EvaluationError, match="its class 'dog' is none of the 3"):
        find_pair(None, train, test, "", "")


def test_classes_without_train_images_are_told_of(folders, caplog):
    train, test = folders
    for path in (train / "cat").iterdir():
        path.unlink()
    assert len(find_pair(None, train, test, "", "").test) == 10
    assert "animals: 5 of 10 images are of classes without train images" in caplog.text
    for path in (train / "ant").iterdir():
        path.unlink()
    with pytest.raises(EvaluationError, match="no image of any class"):
        find_pair(None, train, test, "", "")


def test_equal_embeddings_score_chance():
    """The class with the most train images is always answered, and of no class more than that is known."""
    train_MD = F.normalize(torch.ones(1, 8), dim=1).expand(60, -1)
    train = [0] * 10 + [1] * 29 + [2] * 16 + [3] * 5
    test = [0, 0, 0, 1, 1, 2, 3, 3, 4, 5]  # of 4 and 5 there are no train images
    found = measure(train_MD, train, train_MD[:10], test, "abcdef")
    assert found.chance["lp_acc1"] == 0.2
    assert {name: found.metrics[name] for name in found.chance} == pytest.approx(found.chance)
    assert set(found.chance) == set(FIGURES)
    assert found.chance["knn_acc5"] == pytest.approx(0.9)  # 0 to 3, and 4 or 5
    assert found.chance["lp_mean_per_class_recall"] == pytest.approx(1 / 6)


def test_the_figures_are_those_of_the_answers():
    generator = torch.Generator().manual_seed(3)
    center_KD, train = torch.randn(4, 5, generator=generator), [number % 4 for number in range(80)]
    noise = 0.9 * torch.randn(80, 5, generator=generator)
    feature_MD = F.normalize(center_KD[train] + noise, dim=1)
    found = measure(feature_MD[:50], train[:50], feature_MD[50:], train[50:], "abcd", k=5)
    strength = found.describe()["linear_probe"]["C"]
    direct = LogisticRegression(C=strength, max_iter=1000).fit(feature_MD[:50].double(), train[:50])
    assert found.metrics["lp_acc1"] == pytest.approx(direct.score(feature_MD[50:].double(), train[50:]))
    assert 0.25 < found.metrics["lp_acc1"] < 1
    low, high = found.intervals["knn_acc1"]
    assert low < found.metrics["knn_acc1"] < high

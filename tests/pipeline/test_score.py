"""How well train pairs fit: by direct computation, by a model that knows colours, and through the next preparation."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import manifest
from data_prep.__main__ import main as prepare
from data_prep.record import DataError
from pipeline import trained as loading
from pipeline.__main__ import main
from pipeline.evaluate import score as scoring
from pipeline.evaluate.score import BINS, QUANTILES, quantiles, score
from pipeline.evaluate.splits import open_train
from tests.data_prep.layouts import tree
from tests.pipeline import colors
from tests.pipeline.tars import write_tar
from tests.pipeline.test_during import one_thread, run  # noqa: F401 (fixtures)
from tests.pipeline.test_embeddings import directly
from tests.processes import run_ranks

# Number → the captions that say something wrong of it.
PLANTED = {4: ("a blue thing 4", "blue again 4"), 9: ("a red thing 9",)}


def on_rank(rank, world, run, data, out):  # noqa: F811
    return score(str(run), str(data), out)


def pairs():
    names = list(colors.COLORS)
    rows = []
    for number in range(20):
        color = names[number % 3] if number not in PLANTED else "green"
        captions = [f"a {color} thing {number}", f"{color} again {number}"]
        captions[: len(PLANTED.get(number, ()))] = PLANTED.get(number, ())
        rows.append((color, captions))
    return rows


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A dataset with planted pairs, and a model that knows colours, whatever it is called."""
    monkeypatch.setattr(loading, "load_any", lambda *given, **named: colors.model())
    table = colors.write_table(tmp_path / "raw", pairs())
    assert prepare(["build", f"table={table}", *colors.COLUMNS, "--out", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def rows_of(out, about):
    return [row for name in about["tables"] for row in pq.read_table(out / name).to_pylist()]


def test_similarities_are_those_of_direct_computation(run, dataset, tmp_path, capsys):  # noqa: F811
    before = tree(dataset)
    assert main(["score", str(run), "--data", str(dataset), "--out", str(tmp_path / "out")]) == 0
    assert tree(dataset) == before
    about = json.loads((tmp_path / "out" / "scores.json").read_text())
    rows = rows_of(tmp_path / "out", about)
    split = open_train(str(dataset))
    items = [item for part in range(len(split)) for _, item in split.items(part)]
    image_ND, text_MD = directly(loading.load(run), items)
    cosine_M = (np.repeat(image_ND, 2, axis=0) * text_MD).sum(axis=1)
    assert [(row["key"], row["image_id"], row["caption"]) for row in rows] == [
        (item.key, item.record["image_id"], text) for item in items for text in item.captions
    ]
    np.testing.assert_allclose([row["similarity"] for row in rows], cosine_M, atol=1e-6)
    np.testing.assert_allclose([row["best"] for row in rows], np.repeat(cosine_M.reshape(-1, 2).max(1), 2), atol=1e-6)
    np.testing.assert_allclose([row["mean"] for row in rows], np.repeat(cosine_M.reshape(-1, 2).mean(1), 2), atol=1e-6)
    assert (about["images"], about["pairs"], about["without_caption"], about["left_out"]) == (70, 140, 0, [])
    exact = np.quantile(cosine_M, QUANTILES, method="inverted_cdf")
    np.testing.assert_allclose(list(about["quantiles"].values()), exact, atol=1.1 / BINS)
    assert sum(about["histogram"]) == 140
    lowest = np.argsort(cosine_M)[:10].tolist()
    assert [row["caption"] for row in about["lowest"][:10]] == [rows[number]["caption"] for number in lowest]
    assert "140 pairs of 70 images" in capsys.readouterr().out
    page = (tmp_path / "out" / "lowest.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 50


@given(st.lists(st.floats(-1, 1), min_size=1))
def test_quantiles_of_a_histogram_are_those_of_the_values(values):
    found = quantiles(np.histogram(values, BINS, (-1, 1))[0])
    np.testing.assert_allclose(found, np.quantile(values, QUANTILES, method="inverted_cdf"), atol=1.01 / BINS)


def test_tables_do_not_depend_on_ranks_and_are_made_once(run, dataset, tmp_path, monkeypatch):  # noqa: F811
    on_rank(0, 1, run, dataset, tmp_path / "one")
    # Each rank of a launcher is told so by its variables.
    run_ranks(2, scored_by, run, dataset, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    calls = []
    monkeypatch.setattr(scoring, "embed_part", lambda *_: calls.append(1) or pytest.fail("embedded again"))
    on_rank(0, 1, run, dataset, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    monkeypatch.setattr(loading, "load_any", lambda *given, **named: colors.model())
    with pytest.raises(pytest.fail.Exception):  # another model's tables are not taken for this one's
        on_rank(0, 1, run, dataset, tmp_path / "two")


def scored_by(rank, world, run, data, out):  # noqa: F811
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RANK", str(rank))
        patched.setenv("WORLD_SIZE", str(world))
        score(str(run), str(data), out)


def test_planted_pairs_are_dropped_at_the_next_preparation(known, tmp_path, capsys):
    table = f"table={tmp_path / 'raw' / 'pairs.csv'}"
    assert main(["score", "any", "--data", str(known)]) == 0
    scores = tmp_path / "data.scores"  # beside the dataset
    about = json.loads((scores / "scores.json").read_text())
    assert sorted(row["caption"] for row in about["lowest"][:3]) == sorted([*PLANTED[4], *PLANTED[9]])

    build = ["build", table, *colors.COLUMNS, "--min-score", ".5", "--name", "clean", "--out"]
    assert prepare([*build, str(tmp_path / "clean"), "--scores", str(scores)]) == 0
    assert "3 texts left out, of 3 scored below 0.5" in capsys.readouterr().err
    before, after = (
        {row["image_id"]: row["captions"] for row in train_rows(path)} for path in (known, tmp_path / "clean")
    )
    gone = {text for texts in PLANTED.values() for text in texts}
    expected = {name: [text for text in texts if text not in gone] for name, texts in before.items()}
    assert after == {name: texts for name, texts in expected.items() if texts}
    assert len(after) == 19
    content = manifest.read(tmp_path / "clean").manifest
    assert content["counts"]["dropped"] == {"table": {"low_score": 3, "no_text": 1}}
    assert content["options"]["scores"]["texts"] == 3
    listed = [json.loads(line) for line in (tmp_path / "clean" / "quarantine.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in listed) == {"low_score": 3, "no_text": 1}

    # The same input and options give the same bytes, wherever the scores lie and however many do the work.
    moved = shutil.copytree(scores, tmp_path / "elsewhere")
    assert prepare([*build, str(tmp_path / "again"), "--scores", str(moved), "--workers", "2"]) == 0
    assert tree(tmp_path / "again") == tree(tmp_path / "clean")
    # Another bound is another dataset.
    other = [".9999" if word == ".5" else word for word in build]
    assert prepare([*other, str(tmp_path / "clean"), "--scores", str(scores)]) == 2


def train_rows(path):
    return [row for table in sorted((path / "train").glob("*.parquet")) for row in manifest.read_table(table)]


def test_foreign_tars_are_scored_in_place_and_prepared_without_low_pairs(known, tmp_path, capsys):
    tars = tmp_path / "tars"
    for shard in range(2):
        content = {}
        for number in range(shard * 10, shard * 10 + 10):
            color, captions = pairs()[number]
            content |= {f"{number:09d}.png": colors.picture(color, number), f"{number:09d}.txt": captions[0].encode()}
        write_tar(tars / f"{shard:05d}.tar", content)
    write_tar(tars / "00002.tar", {"a.png": colors.picture("red", 1), "b.png": b"broken", "b.txt": b"red"})
    before = tree(tars)
    assert main(["score", "any", "--data", str(tars)]) == 0
    said = capsys.readouterr().out
    assert "20 pairs of 21 images" in said
    assert "1 images without a caption" in said
    assert "1 images do not decode" in said
    assert tree(tars) == before
    scores = ["--scores", str(tmp_path / "tars.scores"), "--min-score", "0.5"]
    assert prepare(["build", f"webdataset={tars}", *scores, "--out", str(tmp_path / "clean")]) == 0
    dropped = manifest.read(tmp_path / "clean").manifest["counts"]["dropped"]["webdataset"]
    assert dropped == {"low_score": 2, "no_text": 3, "not_an_image": 1}
    assert len(train_rows(tmp_path / "clean")) == 18
    assert prepare(["build", f"table={tmp_path / 'raw/pairs.csv'}", *scores, "--out", str(tmp_path / "other")]) == 2


def test_where_scores_go_must_be_said_where_data_is_no_folder(known, tmp_path):
    with pytest.raises(DataError, match="--out FOLDER"):
        score("any", str(known / "train" / "{00000..00000}.tar"))
    about = score("any", str(known / "train" / "{00000..00000}.tar"), tmp_path / "scores")
    assert about["tables"] == ["00000.parquet"]


def test_data_without_captions_says_so(known, tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", {"a.png": colors.picture("red", 1)})
    with pytest.raises(DataError, match="none of its 1 images has a caption"):
        score("any", str(tmp_path / "tars"))


def test_tables_of_two_models_are_not_taken_for_one_s(known, tmp_path, monkeypatch):
    """Scored by another model, and cut off: what lies there is no one's until it is done."""
    out = tmp_path / "scores"
    arguments = ["score", "any", "--data", str(tmp_path / "data"), "--out", str(out)]
    assert main(arguments) == 0
    assert (out / "scores.json").is_file()
    monkeypatch.setattr(scoring, "_score_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        scoring.score("any", str(tmp_path / "data"), out)
    assert not (out / "scores.json").exists()

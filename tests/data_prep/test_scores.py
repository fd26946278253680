"""Low scores: which texts they take out, by what ids they are found, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from data_prep.captions import TextRules, Texts
from data_prep.record import DataError, Record
from data_prep.scores import LowScores, read, without
from data_prep.shards import Task
from tests.data_prep import layouts


def write(folder: Path, rows: list[tuple[str, str, float]]) -> Path:
    """Scores in two tables, as `pipeline score` leaves them."""
    folder.mkdir()
    columns = ("image_id", "caption", "similarity")
    for number, part in enumerate((rows[::2], rows[1::2])):
        table = pa.table({name: [row[place] for row in part] for place, name in enumerate(columns)})
        pq.write_table(table, folder / f"{number}.parquet")
    layouts.dump(folder / "scores.json", {"tables": ["0.parquet", "1.parquet"]})
    return folder


def test_texts_below_the_bound_are_found_as_shards_hold_them(tmp_path):
    rows = [("coco:1", "low", 0.1), ("coco:1", "high", 0.3), ("coco:1", " also\tlow ", -0.2), ("coco:2", "at it", 0.25)]
    rows += [("coco:3", "write to a@b.org", 0.0), ("coco:4", "\x00", 0.0)]
    folder = write(tmp_path / "scores", rows)
    assert read(folder, 0.25, TextRules()).texts == {
        "coco:1": {"low", "also low"},
        "coco:3": {"write to a@b.org"},
    }
    assert read(folder, 0.25, TextRules(scrub=True)).texts["coco:3"] == {"write to"}


def test_an_image_is_found_by_any_of_its_ids():
    low = LowScores({"flickr:7": frozenset({"a"}), "coco:1": frozenset({"b"}), "coco:2": frozenset({"c"})}, 0.5)
    record = Record("coco:1", "coco", Path("x.jpg"), also_known_as=("flickr:7",))
    assert low.of(record) == {"a", "b"}
    assert low.of(Record("coco:3", "coco", Path("x.jpg"))) == frozenset()


def test_captions_and_statements_go_and_are_counted():
    texts = Texts(["a", "b", "a"], ["c", "d"], [("too_short_text", "e")])
    left = without(texts, frozenset({"a", "d", "f"}))
    assert (left.captions, left.statements) == (["b"], ["c"])
    assert left.dropped == [("too_short_text", "e"), ("low_score", "a"), ("low_score", "a"), ("low_score", "d")]
    assert without(texts, frozenset()) == texts


def test_the_manifest_s_summary_is_of_the_texts_alone():
    one = LowScores({"b": frozenset({"x", "y"}), "a": frozenset({"z"})}, 0.5)
    assert one.summary() == LowScores({"a": frozenset({"z"}), "b": frozenset({"y", "x"})}, 0.5).summary()
    assert one.summary()["texts"] == 3
    assert one.summary()["sha256"] != LowScores({"b": frozenset({"x", "y"})}, 0.5).summary()["sha256"]


def test_a_shard_begun_with_other_scores_is_not_taken_for_done():
    def task(*low: frozenset[str]) -> str:
        record = Record("a", "table", Path("x.jpg"), captions=("red",))
        where = Path("out"), Path("scratch"), "train/0.tar"
        return Task(*where, "train", (record,), ("0",), None, TextRules(), "", low).identity()

    # Nothing that is low of its records leaves a shard as it was.
    assert task() == task(frozenset())
    assert len({task(), task(frozenset({"red"})), task(frozenset({"blue"}))}) == 3


@pytest.fixture
def table(tmp_path) -> str:
    return f"table={layouts.table(tmp_path / 'raw' / 't.csv', 4)}"


def test_scores_of_other_images_are_refused(tmp_path, table, capsys):
    scores = write(tmp_path / "scores", [("coco:1", "low", 0.1), ("coco:2", "high", 0.9)])
    build = ["build", table, "--out", str(tmp_path / "out"), "--scores", str(scores), "--min-score", "0.5"]
    assert main(build) == 2
    assert "none of the 1 images with a text below 0.5" in capsys.readouterr().err


def test_scores_that_are_not_there_or_without_a_bound_are_refused(tmp_path, table, capsys):
    build = ["build", table, "--out", str(tmp_path / "out")]
    assert main([*build, "--min-score", "0.5"]) == 2
    assert "belong together" in capsys.readouterr().err
    assert main([*build, "--scores", str(tmp_path)]) == 2
    assert main([*build, "--scores", str(tmp_path), "--min-score", "0.5"]) == 2
    assert "looked for scores.json" in capsys.readouterr().err
    with pytest.raises(DataError):
        read(tmp_path, 0.5, TextRules())
    assert not (tmp_path / "out").exists()


def test_an_image_whose_only_text_is_low_is_left_out(tmp_path, table):
    out = ["--name", "same", "--out"]
    assert main(["build", table, *out, str(tmp_path / "plain")]) == 0
    (row,) = [row for row in read_rows(tmp_path / "plain") if "number 0" in row["captions"][0]]
    rows = [(row["image_id"], row["captions"][0], 0.2), ("elsewhere", "x", 0.1)]
    scores = write(tmp_path / "others", rows)
    assert main(["build", table, *out, str(tmp_path / "less"), "--scores", str(scores), "--min-score", "0.3"]) == 0
    assert len(read_rows(tmp_path / "less")) == 3
    recorded = json.loads((tmp_path / "less" / "manifest.json").read_text())["options"]["scores"]
    assert (recorded["min_score"], recorded["texts"]) == (0.3, 2)
    assert "scores" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())["options"]


def read_rows(out: Path) -> list[dict]:
    return pq.read_table(out / "train" / "00000.parquet").to_pylist()

"""Readers: the official layouts as they are, faults included, and an error that names the file where one is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import sources
from data_prep.record import DataError, Record
from data_prep.sources import ReadOptions
from tests.data_prep import layouts

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real sample data is not here")


def read(name: str, root: Path, options: ReadOptions | None = None) -> list[Record]:
    return list(sources.read(name, root, options or ReadOptions()))


def by_split(records: list[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        counts[record.split] = counts.get(record.split, 0) + 1
    return counts


def numbers(records: list[Record]) -> list[int]:
    return [int(record.image_id.partition(":")[2]) for record in records]


def test_coco_joins_by_id_and_knows_flickr(tmp_path):
    records = read("coco", layouts.coco(tmp_path, {"train2014": [30, 4, 21], "val2017": [7]}, flickr={4: 99}))
    assert numbers(records) == [4, 21, 30, 7]
    assert by_split(records) == {"train": 3, "coco_2017_val": 1}
    assert records[0].ids == ("coco:4", "flickr:99")
    assert records[0].captions == (" Picture 4,\ntext 0. ", " Picture 4,\ntext 1. ")
    assert records[0].license == 4
    assert all(record.path.is_file() for record in records)


def test_karpathy_restval_trains_and_ids_are_taken_from_the_official_file(tmp_path):
    layouts.coco(tmp_path, {"val2014": [1, 2, 3, 4]}, flickr={3: 77})
    layouts.karpathy(tmp_path, {"train": [4], "restval": [2], "val": [3], "test": [1]})
    records = read("coco_karpathy", tmp_path)
    assert [record.split for record in records] == ["coco_karpathy_test", "train", "coco_karpathy_val", "train"]
    assert records[2].ids == ("coco:3", "flickr:77")


def test_flickr30k_splits_come_from_the_json(tmp_path):
    records = read("flickr30k", layouts.flickr30k(tmp_path, {"train": [1000, 9], "val": [20], "test": [3]}))
    assert numbers(records) == [3, 9, 20, 1000]
    assert by_split(records) == {"flickr30k_test": 1, "train": 2, "flickr30k_val": 1}


def test_flickr30k_token_captions_may_hold_anything(tmp_path):
    layouts.picture(tmp_path / "a/b/flickr30k_images/12.jpg", 0)
    lines = ['12.jpg#1\tA "quoted" #2 dog\truns', "12.jpg#0\tA\u2028dog, 'so' | said", ""]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (record,) = read("flickr30k", tmp_path)
    assert record.captions == ("A\u2028dog, 'so' | said", 'A "quoted" #2 dog\truns')
    assert record.split == "train"
    assert record.path.is_file()


def test_flickr30k_csv_has_a_malformed_row_and_nested_images(tmp_path):
    layouts.picture(tmp_path / "flickr30k_images/flickr30k_images/2199200615.jpg", 0)
    rows = [f"2199200615.jpg| {n}| Caption {n}, 7 | dogs ." for n in range(4)]
    rows.append("2199200615.jpg| 4   A dog runs across the grass .")
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(rows) + "\n")
    (record,) = read("flickr30k", tmp_path)
    assert record.captions[3:] == ("Caption 3, 7 | dogs .", "A dog runs across the grass .")


@pytest.mark.parametrize("images", ["", "images"])
def test_vqa_is_one_record_an_image_with_its_questions_untouched(tmp_path, images):
    asked = [
        layouts.question(5, 1, "Is it?", "yes"),
        layouts.question(5, 0, "What?", "x", agree=2),
        layouts.question(2, 0, "Who?", "z"),
    ]
    held = [layouts.question(9, 0, "Where?", "there")]
    records = read("vqa", layouts.vqa(tmp_path, {"train2014": asked, "val2014": held}, images))
    assert [record.image_id for record in records] == ["coco:2", "coco:5", "coco:9"]
    assert by_split(records) == {"train": 2, "vqa_v2_val": 1}
    assert [one["question_id"] for one in records[1].questions] == [5000, 5001]
    assert records[1].questions[0]["answers"] == asked[1]["answers"]
    assert records[2].questions[0]["question"] == "Where?"
    assert all(record.path.is_file() for record in records)


def test_images_declare_classification_and_selection_sets(tmp_path):
    for name in ("cat/1.jpg", "cat/2.png", "dog/3.jpg", "cat/notes.txt"):
        layouts.picture((tmp_path / "pets" / name).with_suffix(".jpg" if "txt" in name else Path(name).suffix), 1)
    (tmp_path / "pets/classnames.txt").write_text("dog\ncat\n")
    (tmp_path / "pets/templates.txt").write_text("a {c}\n")
    layouts.picture(tmp_path / "order/x.jpg", 2)
    (tmp_path / "order/metadata.jsonl").write_text('{"file_name": "x.jpg", "captions": ["a b", "b a"]}\n')
    records = read("images", tmp_path)
    selection, *classified = records
    assert (selection.split, selection.captions) == ("order", ("a b", "b a"))
    assert [record.label for record in classified] == [0, 1, 1, 1]
    assert classified[0].evaluation.class_names == ("dog", "cat")
    assert classified[0].evaluation.templates == ("a {c}",)


ROWS = [{"file": "a.jpg", "one": "A, b", "two": "c"}, {"file": "sub/d.jpg", "one": "E", "two": ""}]


def write_table(path: Path) -> Path:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row | {"pixels": b"x"} for row in ROWS]), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], dialect="excel-tab" if path.suffix == ".TSV" else "excel")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.TSV", "t.jsonl", "t.parquet"])
def test_tables_give_one_record_a_row(tmp_path, name):
    records = read("table", write_table(tmp_path / name), ReadOptions("file", ("one", "two")))
    assert [record.captions for record in records] == [("A, b", "c"), ("E",)]
    assert [record.path for record in records] == [tmp_path / "a.jpg", tmp_path / "sub/d.jpg"]
    assert records[1].image_id == "table:t/sub/d.jpg"


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_missing_column_names_those_that_are_there(tmp_path, name):
    with pytest.raises(DataError, match=r"no column 'caption'; it has .*one.*two"):
        read("table", write_table(tmp_path / name), ReadOptions("file", ("caption",)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"image,caption\n,c\n"),
        ("t.csv", b"image,caption\na.jpg,\xff\xfe\n"),
        ("t.csv", b'image,caption\na.jpg,"' + b"x" * 200_000 + b'"\n'),
        ("t.jsonl", b'{"image": "a.jpg"'),
        ("t.jsonl", b"3\n"),
        ("t.parquet", b"PAR1"),
        ("t.xlsx", b"PK"),
    ],
)
def test_a_malformed_table_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read("table", tmp_path / name)


@pytest.mark.parametrize("name", ["coco", "coco_karpathy", "flickr30k", "vqa", "images"])
def test_an_empty_folder_says_what_was_looked_for(tmp_path, name):
    with pytest.raises(DataError, match="looked for"):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("coco", "annotations/captions_train2014.json", '{"images": [{'),
        ("coco", "annotations/captions_train2014.json", '{"images": []}'),
        ("coco", "annotations/captions_train2014.json", '{"images": [{"id": 1}], "annotations": []}'),
        ("coco", "annotations/captions_train2014.json", '{"images": [], "annotations": [{"image_id": "x"}]}'),
        ("coco_karpathy", "dataset_coco.json", '{"images": [{"cocoid": 1, "filepath": "val2014", "split": "odd"}]}'),
        ("flickr30k", "dataset_flickr30k.json", '{"images": [{"filename": "1.jpg", "split": "odd", "sentences": []}]}'),
        ("flickr30k", "dataset_flickr30k.json", '{"images": [{"filename": "1.jpg", "split": "val"}]}'),
        ("flickr30k", "dataset_flickr30k.json", "[]"),
        ("vqa", "v2_OpenEnded_mscoco_val2014_questions.json", '{"questions": [{"question_id": 404, "image_id": 9}]}'),
        ("vqa", "v2_mscoco_train2014_annotations.json", '{"annotations": [{}]}'),
    ],
)
def test_a_malformed_annotation_file_is_named(tmp_path, name, file, content):
    layouts.coco(tmp_path, {"train2014": [1]})
    layouts.karpathy(tmp_path, {"val": [1]})
    layouts.flickr30k(tmp_path, {"val": [1]})
    asked = {"train2014": [layouts.question(5, 1, "Is it?", "yes")], "val2014": [layouts.question(9, 0, "A?", "b")]}
    layouts.vqa(tmp_path, asked)
    read(name, tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=file):
        read(name, tmp_path)


def test_annotations_without_their_images_are_refused(tmp_path):
    layouts.coco(tmp_path, {"val2017": [1]})
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"looked for .*val2017"):
        read("coco", tmp_path)


def test_words_become_readers_and_paths(tmp_path):
    assert sources.parse([f"coco={tmp_path}"]) == [("coco", tmp_path)]
    assert sources.parse([f"sample={tmp_path}"]) == [
        ("coco", tmp_path / "mscoco"),
        ("vqa", tmp_path / "mscoco"),
        ("flickr30k", tmp_path / "flickr30k"),
        ("images", tmp_path / "images"),
    ]
    for word, said in (("cooc=.", "Did you mean coco"), ("coco", "name=path"), ("coco=/nowhere/at/all", "looked for")):
        with pytest.raises(DataError, match=said):
            sources.parse([word])


@needs_shared
@pytest.mark.parametrize(
    ("name", "folder", "splits", "captions"),
    [
        ("coco", "coco2017_mini", {"train": 50, "coco_2017_val": 50}, 500),
        ("coco", "coco2014_mini", {"coco_2014_val": 50}, 250),
        ("coco_karpathy", "coco2014_mini", {"train": 36, "coco_karpathy_val": 6, "coco_karpathy_test": 8}, 250),
        ("flickr30k", "flickr30k_mini", {"train": 435, "flickr30k_val": 17, "flickr30k_test": 17}, 2345),
        ("vqa", "vqa_v2_mini", {"train": 4, "vqa_v2_val": 19}, 0),
    ],
)
def test_counts_on_real_samples(name, folder, splits, captions):
    records = read(name, SHARED / folder)
    assert by_split(records) == splits
    assert sum(len(record.captions) for record in records) == captions
    assert all(record.path.is_file() for record in records)


@needs_shared
def test_real_questions_are_all_there():
    records = read("vqa", SHARED / "vqa_v2_mini")
    assert sum(len(record.questions) for record in records if not record.evaluation) == 5
    assert sum(len(record.questions) for record in records if record.evaluation) == 21


@needs_shared
def test_the_three_layouts_of_flickr30k_say_the_same(tmp_path):
    expected = {record.image_id: record.captions for record in read("flickr30k", SHARED / "flickr30k_mini")}
    for name in ("results_20130124.token", "results.csv"):
        root = tmp_path / name
        root.mkdir()
        (root / name).symlink_to(SHARED / "flickr30k_mini" / name)
        (root / "flickr30k-images").symlink_to(SHARED / "flickr30k_mini/flickr30k-images")
        found = {record.image_id: record.captions for record in read("flickr30k", root)}
        assert found.keys() == expected.keys()
        same = sum(
            [text.strip() for text in captions] == [text.strip() for text in expected[image]]
            for image, captions in found.items()
        )
        assert same == len(expected), f"{name}: {same} of {len(expected)} images have the same captions"

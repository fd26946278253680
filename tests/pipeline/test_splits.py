"""Whole splits, part after part: every image once, in order, with the captions that training takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import manifest
from data_prep.record import DataError
from pipeline.evaluate import splits
from pipeline.evaluate.splits import open_split
from tests.pipeline import colors
from tests.pipeline.tars import picture, write_tar, write_tars


def every(split):
    return [found for part in range(len(split)) for found in split.items(part)]


def test_a_sealed_dataset_s_train_split_is_its_tars_in_order(dataset):
    split = open_split(str(dataset), "train")
    shards = manifest.read(dataset).split("train")
    assert len(split) == len(shards) == 5
    assert split.size == 70
    assert split.fingerprint == shards.fingerprint()
    rows = [
        (shard.name, row) for shard in shards for row in manifest.read_table(dataset / manifest.table_of(shard.name))
    ]
    assert [(file, item.key, list(item.captions)) for file, item in every(split)] == [
        (name, row["key"], row["captions"]) for name, row in rows
    ]


def test_foreign_tars_are_read_in_place(tmp_path):
    write_tars(tmp_path / "tars", [3, 2])
    plain = {"a.jpg": picture(9), "a.txt": b"one\ncaption", "b.jpg": picture(10), "c.txt": b"no image", "d.JSON": b"{}"}
    plain |= {"e.jpg": picture(11), "e.txt": b"plain", "e.json": json.dumps({"captions": [], "url": "x"}).encode()}
    write_tar(tmp_path / "tars" / "00002.tar", plain)
    before = sorted(tmp_path.rglob("*"))
    split = open_split(str(tmp_path / "tars"), "train")
    assert [(file, item.captions) for file, item in every(split)] == [
        *(("00000.tar", (f"picture {number}", f"number {number} seen again")) for number in range(3)),
        *(("00001.tar", (f"picture {number}", f"number {number} seen again")) for number in (3, 4)),
        *(("00002.tar", captions) for captions in (("one\ncaption",), (), ("plain",))),
    ]
    assert sorted(tmp_path.rglob("*")) == before
    few = open_split(str(tmp_path / "tars" / "{00000..00001}.tar"), "train")
    assert [item.key for _, item in every(few)] == [f"{number:09d}" for number in range(5)]
    assert len({split.identity(part) for part in range(3)}) == 3
    assert few.fingerprint != split.fingerprint


def test_an_evaluation_set_is_cut_into_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "PART", 2)
    for number, name in enumerate(("cat/a.png", "cat/b.png", "dog/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(colors.picture("red", number))
    split = open_split(str(tmp_path), tmp_path.name)
    assert len(split) == 2
    assert [file for file, _ in every(split)] == ["cat/a.png", "cat/b.png", "dog/c.png"]
    whole = split.fingerprint, split.identity(0)
    (tmp_path / "dog/c.png").write_bytes(colors.picture("blue", 5) + b" ")
    changed = open_split(str(tmp_path), tmp_path.name)
    assert changed.fingerprint != whole[0]
    assert changed.identity(0) == whole[1]


def test_a_split_that_is_not_there_is_named(dataset):
    with pytest.raises(DataError, match=r"no split other_test\. It has train"):
        open_split(str(dataset), "other_test")


def test_an_image_that_does_not_decode_is_left_out_and_said(tmp_path, caplog):
    content = {"a.png": colors.picture("red", 0), "a.txt": b"red", "b.png": b"\x89PNG broken", "b.txt": b"green"}
    write_tar(tmp_path / "0.tar", content | {"c.png": colors.picture("blue", 0), "c.txt": b"blue"})
    split = open_split(str(tmp_path), "train")
    made = splits.embed_part(colors.model(), split, 0)
    assert [item.key for item in made.items] == ["a", "c"]
    assert (made.texts, made.owner_M.tolist()) == (["red", "blue"], [0, 1])
    assert made.left_out == ["0.tar b"]
    assert "image b does not decode" in caplog.text
    assert ((made.image_ND * made.text_MD).sum(dim=1) > 0.95).all()


def test_a_part_without_a_sound_image_has_no_rows(tmp_path):
    write_tar(tmp_path / "0.tar", {"b.png": b"broken", "b.txt": b"green"})
    made = splits.embed_part(colors.model(), open_split(str(Path(tmp_path)), "train"), 0)
    assert (len(made.image_ND), len(made.texts), made.left_out) == (0, 0, ["0.tar b"])

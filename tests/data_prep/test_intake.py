"""From sources to splits: what is held out by lot, by licence and by cap; and the same order however records travel."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import manifest, spool
from data_prep.__main__ import main
from data_prep.record import DataError, Record
from data_prep.sources import ReadOptions, webdataset
from data_prep.sources import read as read_source
from tests.data_prep import layouts


def build(out: Path, *arguments: str) -> manifest.Dataset:
    assert main(["build", *arguments, "--out", str(out), "--workers", "1"]) == 0
    return manifest.read(out)


def rows(out: Path, folder: str) -> list[dict]:
    return [row for path in sorted((out / folder).rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def captioned_twice(folder: Path, images: int) -> Path:
    """A table with a row a caption, as many are."""
    table = layouts.table(folder / "pairs.csv", images)
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *lines, *(line + " again" for line in lines)]) + "\n")
    return table


# --- by lot


def test_a_share_is_held_out_by_the_bytes_of_the_images(tmp_path):
    table = captioned_twice(tmp_path, 60)
    for number in (7, 8, 9):  # one photo under three names shares one fate
        (tmp_path / f"pictures/{number}.jpg").write_bytes((tmp_path / "pictures/6.jpg").read_bytes())
    out = build(tmp_path / "out", f"table={table}", "--hold-out", "val=0.2", "--hold-out", "test=0.2", "--name", "mine")
    splits = {name: totals["samples"] for name, totals in out.manifest["splits"].items()}
    assert set(splits) == {"train", "mine_val", "mine_test"}
    assert sum(splits.values()) == 60
    assert 4 <= splits["mine_val"] <= 20
    assert 4 <= splits["mine_test"] <= 20
    held, train = rows(out.path, "eval"), rows(out.path, "train")
    assert not {row["original_sha256"] for row in held} & {row["original_sha256"] for row in train}
    assert {len(row["captions"]) for row in held + train} == {2}
    assert "mine_val" in {path.name for path in (out.path / "eval").iterdir()}


def test_data_with_splits_are_not_divided_again(tmp_path):
    layouts.flickr30k(tmp_path / "f", {"train": list(range(1, 20)), "test": [50]})
    out = build(tmp_path / "out", f"flickr30k={tmp_path / 'f'}", "--hold-out", "val=0.5")
    assert {name: totals["samples"] for name, totals in out.manifest["splits"].items()} == {
        "train": 19,
        "flickr30k_test": 1,
    }


@pytest.mark.parametrize("word", ["val", "val=2", "val=x", "=0.1"])
def test_a_wrong_share_is_named(tmp_path, capsys, word):
    table = layouts.table(tmp_path / "t.csv", 2)
    assert main(["build", f"table={table}", "--out", str(tmp_path / "out"), "--hold-out", word]) == 2
    assert word in capsys.readouterr().err


# --- by licence and by cap


def test_only_licences_that_are_asked_for_train(tmp_path):
    layouts.coco(tmp_path / "c", {"train2017": [1, 2, 3]})
    path = tmp_path / "c/annotations/captions_train2017.json"
    captions = json.loads(path.read_text())
    for image in captions["images"]:
        image["license"] = image["id"]
    path.write_text(json.dumps(captions))
    layouts.vqa(tmp_path / "v", {"train2014": [layouts.question(n, 0, "Is there a cup?", "yes") for n in (1, 3, 9)]})
    sources = f"coco={tmp_path / 'c'}", f"vqa={tmp_path / 'v'}"
    out = build(tmp_path / "out", *sources, "--license", "3", "--license", "2")
    assert {row["image_id"] for row in rows(out.path, "train")} == {"coco:2", "coco:3"}
    # 9 is VQA's alone, so its licence is not known.
    assert out.manifest["counts"]["dropped"] == {"coco+vqa": {"license": 1}, "vqa": {"license": 1}}
    listed = [json.loads(line) for line in (out.path / "quarantine.jsonl").read_text().splitlines()]
    assert {(item["image_id"], item["reason"]) for item in listed} == {("coco:1", "license"), ("coco:9", "license")}


def test_yes_no_questions_are_capped_and_kept_as_questions(tmp_path):
    asked = [layouts.question(1, index, f"Is there a {index}?", "yes", kind="yes/no") for index in range(4)]
    layouts.vqa(tmp_path / "v", {"train2014": [*asked, layouts.question(1, 7, "What color is the cup?", "red")]})
    out = build(tmp_path / "out", f"vqa={tmp_path / 'v'}", "--yes-no-cap", "2")
    (row,) = rows(out.path, "train")
    assert row["statements"] == ["there is a 0", "there is a 1", "the cup is red"]
    assert out.manifest["counts"]["dropped"] == {"vqa": {"yes_no_cap": 2}}
    with tarfile.open(out.path / "train/00000.tar") as tar:
        about = json.loads(tar.extractfile("000000000.json").read())
    assert len(about["questions"]) == 5


def test_restval_may_be_left_out(tmp_path):
    layouts.karpathy(tmp_path, {"train": [4], "restval": [2], "val": [3], "test": [1]})
    records = read_source("coco_karpathy", tmp_path, ReadOptions(restval=False))
    assert [record.image_id for record in records] == ["coco:1", "coco:3", "coco:4"]


# --- images as bytes


def test_a_column_of_bytes_gives_what_files_give(tmp_path):
    table = layouts.table(tmp_path / "t.csv", 5)
    from_files = rows(build(tmp_path / "files", f"table={table}").path, "train")
    images = [(tmp_path / f"pictures/{number}.jpg").read_bytes() for number in range(5)]
    by_name = {row["image_id"].rpartition("/")[2]: row["captions"][0] for row in from_files}
    captions = [by_name[f"{number}.jpg"] for number in range(5)]
    for name, column in (("plain", images), ("hugging_face", [{"bytes": image, "path": None} for image in images])):
        pq.write_table(pa.table({"image": column, "caption": captions}), tmp_path / f"{name}.parquet")
        out = build(tmp_path / name, f"table={tmp_path / name}.parquet")
        kept = ("sha256", "captions", "perceptual_hash")
        assert sorted(str([row[key] for key in kept]) for row in rows(out.path, "train")) == sorted(
            str([row[key] for key in kept]) for row in from_files
        )
        assert {path.name for path in out.path.iterdir()} >= {"manifest.json", "train"}
        assert not (out.path / ".build").exists()


def test_a_table_of_addresses_is_sent_to_img2dataset(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("image,caption\nhttps://example.org/a.jpg,a cat\n")
    assert main(["build", f"table={tmp_path / 't.csv'}", "--out", str(tmp_path / "out")]) == 2
    assert "img2dataset" in capsys.readouterr().err


# --- existing tars


def test_our_own_shards_are_read_again_with_all_their_captions(tmp_path):
    layouts.coco(tmp_path / "c", {"train2017": [1, 2, 3, 4, 5]})
    first = build(tmp_path / "first", f"coco={tmp_path / 'c'}", "--samples-per-shard", "2")
    again = build(tmp_path / "again", f"webdataset={first.path / 'train'}", "--samples-per-shard", "5")
    kept = ("image_id", "captions", "sha256", "license")
    before, after = ({str([row[key] for key in kept]) for row in rows(out.path, "train")} for out in (first, again))
    assert before == after


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_of_other_tools(tmp_path):
    photo = layouts.picture(tmp_path / "a.jpg", 1).read_bytes()
    about = json.dumps({"caption": "a dog", "url": "https://example.org", "status": "success"}).encode()
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000000.jpg": photo,
            "000000000.txt": b"a dog",
            "000000000.json": about,
            "deep/b.PNG": photo,
            "deep/b.txt": b"a cat",
            "deep/b.pyd": b"\x80\x04",
            "text_only.txt": b"nothing to see",
        },
    )
    records = list(webdataset.read(tmp_path))
    assert [(record.image_id, record.captions) for record in records] == [
        ("webdataset:00000/000000000", ("a dog",)),
        ("webdataset:00000/deep/b", ("a cat",)),
    ]
    first, size = records[0].span
    assert (tmp_path / "00000.tar").read_bytes()[first : first + size] == photo


@given(st.data())
def test_a_damaged_tar_is_refused_or_read_and_nothing_else(tmp_path_factory, data):
    """Cut anywhere before its end, it is refused; with any byte changed, no error but ours is seen."""
    folder = tmp_path_factory.mktemp("tar")
    members = {f"{number}.{kind}": b"x" * 700 for number in range(2) for kind in ("jpg", "txt")}
    whole = write_tar(folder / "a.tar", members).read_bytes()
    used = 4 * (512 + 1024)
    cut = data.draw(st.integers(0, used))
    (folder / "a.tar").write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"a\.tar"):
        list(webdataset.read(folder / "a.tar"))
    place = data.draw(st.integers(0, used - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    (folder / "a.tar").write_bytes(changed)
    with contextlib.suppress(DataError):
        assert len(list(webdataset.read(folder / "a.tar"))) <= 4


@pytest.mark.parametrize("word", ["webdataset=pipe:cat /etc/passwd", "webdataset=ftp://x/y.tar"])
def test_commands_and_unknown_schemes_are_refused(tmp_path, capsys, word):
    assert main(["build", word, "--out", str(tmp_path / "out")]) == 2
    assert "only s3://" in capsys.readouterr().err


# --- records under way


def test_records_in_files_give_the_bytes_that_records_in_memory_give(tmp_path, monkeypatch):
    layouts.coco(tmp_path / "c", {"train2017": list(range(1, 40)), "val2017": [90, 91]})
    layouts.vqa(tmp_path / "v", {"train2014": [layouts.question(n, 0, "Is there a cup?", "yes") for n in (1, 3)]})
    sources = f"coco={tmp_path / 'c'}", f"vqa={tmp_path / 'v'}", "--name", "x"
    in_memory = content(build(tmp_path / "a", *sources).path)
    monkeypatch.setattr(spool, "BUFFERED", 7)
    assert content(build(tmp_path / "b", *sources).path) == in_memory


TEXT = st.text(st.characters(codec=None), max_size=20)


@given(st.builds(Record, TEXT, TEXT, st.just(Path("a/b.jpg")), captions=st.lists(TEXT).map(tuple)))
def test_a_line_holds_all_of_a_record(record):
    line = spool.to_line(record)
    assert "\n" not in line
    assert line.isascii()
    assert spool.from_line(line) == record


@given(st.integers(0, 5), st.lists(TEXT, min_size=2, max_size=2))
def test_stretches_lie_in_the_order_of_places(seed, names):
    first, second = sorted(spool.place(seed, name) for name in names)
    assert spool.stretch_of(first) <= spool.stretch_of(second) < spool.STRETCHES

"""Leaks: no held-out photo trains, under whichever id, name or encoding; and distinct images are not taken for it."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from data_prep import manifest
from data_prep.__main__ import main
from data_prep.images import prepare
from data_prep.leakage import MAX_HASH_BITS, HeldOut, all_ids
from data_prep.record import Evaluation, Record
from tests.data_prep import layouts
from tests.data_prep.test_sources import SHARED, needs_shared


def build(out: Path, *sources: str) -> dict:
    assert main(["build", *sources, "--out", str(out), "--workers", "1"]) == 0
    return manifest.read(out).manifest["counts"]["dropped"]


def rows(out: Path, folder: str) -> list[dict]:
    return [row for path in sorted((out / folder).rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def assert_no_overlap(out: Path) -> None:
    train, held = rows(out, "train"), rows(out, "eval")
    assert train
    for column in ("image_id", "sha256", "original_sha256"):
        assert not {row[column] for row in train} & {row[column] for row in held}
    assert not {name for row in train for name in row["ids"]} & {name for row in held for name in row["ids"]}


def test_ids_are_held_out_across_sources(tmp_path):
    """2017's train has a 2014 val photo; VQA's train questions have one too; Flickr30K's test has COCO's 12."""
    layouts.coco(tmp_path / "a", {"train2017": [1, 2, 12], "val2017": [9]}, flickr={12: 777})
    layouts.coco(tmp_path / "b", {"val2014": [2]})
    questions = [layouts.question(image, 0, "Is there a cup?", "yes") for image in (1, 9, 12)]
    layouts.vqa(tmp_path / "v", {"train2014": questions})
    layouts.flickr30k(tmp_path / "f", {"train": [3], "test": [777]})
    sources = [
        f"coco={tmp_path / 'a'}",
        f"coco={tmp_path / 'b'}",
        f"vqa={tmp_path / 'v'}",
        f"flickr30k={tmp_path / 'f'}",
    ]
    assert build(tmp_path / "out", *sources) == {"coco": {"held_out_id": 2}, "vqa": {"held_out_id": 2}}
    assert {row["image_id"] for row in rows(tmp_path / "out", "train")} == {"coco:1", "flickr:3"}
    assert_no_overlap(tmp_path / "out")


def test_copies_are_held_out_by_bytes_and_by_looks(tmp_path):
    """A user's table has an evaluation photo under another name, and again re-encoded."""
    layouts.flickr30k(tmp_path / "f", {"val": [50], "train": [51]})
    table = layouts.table(tmp_path / "t.csv", 4)
    original = tmp_path / "f/flickr30k-images/50.jpg"
    (tmp_path / "pictures/0.jpg").write_bytes(original.read_bytes())
    Image.open(original).save(tmp_path / "pictures/1.jpg", quality=97)
    sources = [f"flickr30k={tmp_path / 'f'}", f"table={table}"]
    assert build(tmp_path / "out", *sources) == {"table": {"held_out_file": 1, "held_out_look": 1}}
    assert_no_overlap(tmp_path / "out")
    argument = ["build", *sources, "--keep-near-duplicates", "--out", str(tmp_path / "kept"), "--workers", "1"]
    assert main(argument) == 0
    assert manifest.read(tmp_path / "kept").manifest["counts"]["dropped"] == {"table": {"held_out_file": 1}}


def drawn(color: str, ground: str = "black") -> bytes:
    """A square on a plain ground: the difference hash sees the edges and no colour."""
    image = Image.new("RGB", (64, 64), ground)
    ImageDraw.Draw(image).rectangle((16, 16, 40, 40), fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_different_pictures_of_nearly_one_difference_hash_both_train():
    held, other, copy = prepare(drawn("red"), None), prepare(drawn("lime"), None), prepare(drawn("#fb0203"), None)
    for one in (other, copy):
        assert (int(held.perceptual_hash, 16) ^ int(one.perceptual_hash, 16)).bit_count() <= MAX_HASH_BITS
    guard = HeldOut(looks=((held.perceptual_hash, held.thumbnail),))
    assert guard.reason_against(other) is None
    assert guard.reason_against(copy) == "held_out_look"


NAMES = st.integers(0, 12).map(lambda number: f"coco:{number}")
ALIASES = st.lists(st.integers(0, 12).map(lambda number: f"flickr:{number}"), max_size=2).map(tuple)
RECORDS = st.lists(
    st.builds(
        Record,
        image_id=NAMES,
        source=st.just("x"),
        path=st.just(Path("x.jpg")),
        evaluation=st.sampled_from([None, None, Evaluation("e", "retrieval")]),
        also_known_as=ALIASES,
    ),
    max_size=12,
)


@given(RECORDS)
def test_no_record_that_may_train_shares_a_photo_with_a_held_out_one(records):
    """Against a second implementation: walk from id to id."""
    linked: dict[str, set[str]] = {}
    for record in records:
        for name in record.ids:
            linked.setdefault(name, set()).update(record.ids)
    todo = [name for record in records if record.evaluation for name in record.ids]
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += linked[name]
    held = {name for record in records if record.evaluation for name in record.ids}
    assert all_ids(held, [record.ids for record in records if record.also_known_as]) == reached


@needs_shared
def test_real_samples_together_have_no_leak(tmp_path):
    folders = {
        "coco2017_mini": "coco",
        "coco2014_mini": "coco_karpathy",
        "vqa_v2_mini": "vqa",
        "flickr30k_mini": "flickr30k",
    }
    sources = [f"{name}={SHARED / folder}" for folder, name in folders.items()]
    dropped = build(tmp_path / "all", *sources)
    assert_no_overlap(tmp_path / "all")
    # coco2017_mini/val2017 is coco2014_mini: what Karpathy trains on of it (36) is held out by coco_2017_val.
    assert dropped["coco_karpathy"] == {"held_out_id": 36}
    assert "held_out_look" not in {reason for reasons in dropped.values() for reason in reasons}


@needs_shared
@pytest.mark.parametrize(("quality", "scale"), [(90, 1), (60, 1), (90, 0.5)])
def test_re_encoded_and_shrunken_photos_are_recognised_and_no_other_one_is(quality, scale):
    paths = sorted((SHARED / "flickr30k_mini/flickr30k-images").glob("*.jpg"))[:120]
    originals = [prepare(path.read_bytes(), None) for path in paths]
    for index, path in enumerate(paths):
        buffer = io.BytesIO()
        with Image.open(path) as image:
            image.resize((round(image.width * scale), round(image.height * scale))).save(
                buffer, "JPEG", quality=quality
            )
        copy = prepare(buffer.getvalue(), None)
        guards = [HeldOut(looks=((one.perceptual_hash, one.thumbnail),)) for one in originals]
        assert [number for number, guard in enumerate(guards) if guard.reason_against(copy)] == [index]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.binary(min_size=192, max_size=192)), max_size=5))
def test_what_is_held_out_survives_its_file(tmp_path_factory, looks):
    path = tmp_path_factory.mktemp("held") / "held_out.npz"
    held_out = HeldOut(frozenset(f"{number:064x}" for number, _ in looks), tuple((f"{n:016x}", t) for n, t in looks))
    held_out.save(path)
    assert HeldOut.load(path) == held_out
    assert HeldOut.load(path).sha256() == held_out.sha256()

"""Evaluation sets: read as CLIP_benchmark lays them out, and refused where they cannot be measured."""

from __future__ import annotations

import io
import tarfile

import pytest
from PIL import Image

from data_prep.manifest import EvaluationSet
from pipeline.evaluate import sets
from pipeline.evaluate.sets import EvaluationError


def write_set(root, members, shards="1\n"):
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text(shards)
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return EvaluationSet("mine", "retrieval", root, 1)


def picture():
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_sets_are_read_as_clip_benchmark_lays_them_out(tmp_path):
    members = [("s0000000.png", picture()), ("s0000000.txt", b"one\ntwo"), ("s0000001.png", picture())]
    items = sets.read(write_set(tmp_path, members))
    assert [(item.key, item.captions) for item in items] == [("s0000000", ("one", "two")), ("s0000001", ())]
    assert items[0].open().mode == "RGB"


def test_sets_that_cannot_be_measured_say_why(tmp_path):
    with pytest.raises(EvaluationError, match="holds no image"):
        sets.read(write_set(tmp_path / "a", []))
    with pytest.raises(EvaluationError, match="cannot be read"):
        sets.read(write_set(tmp_path / "b", [("s0.png", picture())], shards="2\n"))
    source = write_set(tmp_path / "c", [])
    (source.path / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(EvaluationError, match=r"lacks \{c\}"):
        sets.templates(source)

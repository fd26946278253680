"""Embeddings of whole splits in files: those of direct computation, whoever makes them and however often begun."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from data_prep.record import DataError
from pipeline import trained as loading
from pipeline.__main__ import main
from pipeline.evaluate import embeddings, splits
from pipeline.evaluate.splits import open_split
from tests.data_prep.layouts import tree
from tests.pipeline import colors
from tests.pipeline.tars import picture, write_tar
from tests.pipeline.test_during import one_thread, run  # noqa: F401 (fixtures)
from tests.processes import run_ranks


def on_rank(rank, world, run, data, out):  # noqa: F811
    return embeddings.write(loading.load(run), open_split(str(data), "train"), out, rank=rank, world=world)


def directly(model, items):
    """Each image and each caption by itself."""
    with torch.no_grad():
        images = [model.towers.encode_image(model.preprocess(item.open())[None], normalize=True) for item in items]
        texts = [model.towers.encode_text(model.tokenize([t]), normalize=True) for item in items for t in item.captions]
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


def test_rows_are_those_of_direct_computation_and_say_what_they_are(run, dataset, tmp_path):  # noqa: F811
    command = ["embed", str(run), "--data", str(dataset), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    split = open_split(str(dataset), "train")
    found = [pair for part in range(len(split)) for pair in split.items(part)]
    image_ND, text_MD = directly(loading.load(run), [item for _, item in found])
    arrays = load_file(tmp_path / "one" / "embeddings.safetensors")
    np.testing.assert_allclose(arrays["images"], image_ND, atol=1e-6)
    np.testing.assert_allclose(arrays["texts"], text_MD, atol=1e-6)

    items = pq.read_table(tmp_path / "one" / "items.parquet").to_pylist()
    texts = pq.read_table(tmp_path / "one" / "texts.parquet").to_pylist()
    assert [(row["file"], row["key"], row["image_id"]) for row in items] == [
        (file, item.key, item.record["image_id"]) for file, item in found
    ]
    for row, (_, item) in zip(items, found, strict=True):
        data = (dataset / row["file"]).read_bytes()[row["offset"] :][: row["bytes"]]
        assert hashlib.sha256(data).hexdigest() == item.record["sha256"]
        own = texts[row["text"] : row["text"] + row["captions"]]
        assert [text["caption"] for text in own] == list(item.captions)
        assert {items[text["image"]]["key"] for text in own} == {row["key"]}
    assert len(texts) == 140

    assert main([*command, str(tmp_path / "two"), "--format", "npy", "--half"]) == 0
    for name in ("images", "texts"):
        half = np.load(tmp_path / "two" / f"{name}.npy", mmap_mode="r")
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, arrays[name].astype(np.float16))
    about = json.loads((tmp_path / "two" / "embeddings.json").read_text())
    assert (about["images"], about["texts"], about["width"], about["left_out"]) == (70, 140, 16, [])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        *("embeddings.json", "images.npy", "items.parquet", "texts.npy", "texts.parquet")
    ]


def test_files_do_not_depend_on_how_many_ranks_make_them(run, dataset, tmp_path):  # noqa: F811
    few = write_tar(tmp_path / "few.tar", {"a.jpg": picture(0), "a.txt": b"one"})  # the second rank has none
    for number, data in enumerate((dataset, few)):
        one, two = tmp_path / f"one {number}", tmp_path / f"two {number}"
        about = on_rank(0, 1, run, data, one)
        assert run_ranks(2, on_rank, run, data, two) == [about, about]
        assert tree(one) == tree(two)


def test_what_was_cut_off_goes_on(run, dataset, tmp_path, monkeypatch):  # noqa: F811
    embed_part, done = splits.embed_part, []

    def counted(model, split, part):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(part)
        return embed_part(model, split, part)

    monkeypatch.setattr(embeddings, "embed_part", counted)
    with pytest.raises(KeyboardInterrupt):
        on_rank(0, 1, run, dataset, tmp_path / "out")
    with pytest.raises(DataError, match=r"looked for embeddings\.json"):
        embeddings.read(tmp_path / "out")
    done.clear()
    monkeypatch.setattr(embeddings, "embed_part", lambda *given: done.append(given[2]) or embed_part(*given))
    on_rank(0, 1, run, dataset, tmp_path / "out")
    assert done == [2, 3, 4]
    on_rank(0, 1, run, dataset, tmp_path / "out")  # finished: nothing is done again
    assert done == [2, 3, 4]
    monkeypatch.undo()
    on_rank(0, 1, run, dataset, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_other_things_are_not_written_over(run, dataset, tmp_path):  # noqa: F811
    split, out = open_split(str(dataset), "train"), tmp_path / "out"
    embeddings.write(loading.load(run), split, out)
    with pytest.raises(DataError, match="another dtype: float32"):
        embeddings.write(loading.load(run), split, out, half=True)
    with pytest.raises(DataError, match="holds no embeddings"):
        embeddings.write(loading.load(run), split, tmp_path)
    assert main(["embed", str(run), "--data", str(dataset), "--out", str(tmp_path / "new"), "--format", "h5"]) == 2


def test_images_without_texts_and_texts_of_some_only(tmp_path):
    write_tar(tmp_path / "some" / "0.tar", {"a.jpg": picture(0), "b.jpg": picture(1), "b.txt": b"red"})
    write_tar(tmp_path / "some" / "1.tar", {"c.txt": b"no image"})
    write_tar(tmp_path / "none" / "0.tar", {"a.jpg": picture(0)})
    for form in embeddings.FORMS:
        about = embeddings.write(
            colors.model(), open_split(str(tmp_path / "some"), "train"), tmp_path / form, form=form
        )
        assert (about["images"], about["texts"], about["samples"]) == (2, 1, 3)
        found = embeddings.read(tmp_path / form)
        assert [found.items[row]["text"] for row in range(2)] == [None, 0]
        assert [found.items[row]["image_id"] for row in range(2)] == ["webdataset:0/a", "webdataset:0/b"]
        assert found.texts[0] == {"caption": "red", "image": 1}
        about = embeddings.write(
            colors.model(), open_split(str(tmp_path / "none"), "train"), tmp_path / f"no {form}", form=form
        )
        assert (about["images"], about["texts"]) == (1, 0)
    assert np.load(tmp_path / "no npy" / "texts.npy").shape == (0, 3)
    assert load_file(tmp_path / "no safetensors" / "embeddings.safetensors")["texts"].shape == (0, 3)
    write_tar(tmp_path / "bad" / "0.tar", {"a.jpg": b"broken"})
    with pytest.raises(DataError, match="no image that decodes"):
        embeddings.write(colors.model(), open_split(str(tmp_path / "bad"), "train"), tmp_path / "bad out")

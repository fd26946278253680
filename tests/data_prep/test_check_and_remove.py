"""What finished datasets share, and samples that must go."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_prep import check, manifest
from data_prep.__main__ import main
from tests.data_prep import layouts


def build(out: Path, *arguments: str) -> manifest.Dataset:
    assert main(["build", *arguments, "--out", str(out), "--workers", "1"]) == 0
    return manifest.read(out)


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# --- check


def test_a_leak_between_two_datasets_is_found_by_id_by_bytes_and_by_looks(tmp_path, capsys):
    layouts.flickr30k(tmp_path / "f", {"train": [1, 2], "test": [50, 51, 52, 53]})
    evaluated = build(tmp_path / "a", f"flickr30k={tmp_path / 'f'}")
    layouts.coco(tmp_path / "c", {"train2017": [7, 8]}, flickr={7: 50})
    table = layouts.table(tmp_path / "t.csv", 4)
    (tmp_path / "pictures/0.jpg").write_bytes((tmp_path / "f/flickr30k-images/51.jpg").read_bytes())
    with Image.open(tmp_path / "f/flickr30k-images/52.jpg") as image:
        image.save(tmp_path / "pictures/1.jpg", quality=70)
    trained = build(tmp_path / "b", f"coco={tmp_path / 'c'}", f"table={table}")
    for pair in ((evaluated, trained), (trained, evaluated)):
        (leak,) = [overlap for overlap in check.overlaps(*pair) if overlap.leak]
        assert (leak.first, leak.second) == ("b:train", "a:flickr30k_test")
        assert leak.reasons == {"id": 1, "bytes": 1, "looks": 1}
    assert main(["check", str(tmp_path / "b"), str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "b:train and a:flickr30k_test: 3 images" in error
    assert "3 train images are in evaluation sets" in error


def test_sound_datasets_share_nothing(tmp_path, capsys):
    layouts.flickr30k(tmp_path / "f", {"train": [1, 2, 3], "test": [50], "val": [60]})
    ours = build(tmp_path / "a", f"flickr30k={tmp_path / 'f'}")
    assert check.overlaps(ours) == []
    assert main(["check", str(tmp_path / "a")]) == 0
    layouts.flickr30k(tmp_path / "g", {"train": [2, 3, 4]})
    (shared,) = check.overlaps(ours, build(tmp_path / "b", f"flickr30k={tmp_path / 'g'}"))
    assert (shared.images, shared.leak, shared.reasons) == (2, False, {"id": 2, "bytes": 2})


# --- remove


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remove")
    layouts.flickr30k(root / "f", {"train": list(range(1, 10)), "test": [50, 51]})
    return build(root / "out", f"flickr30k={root / 'f'}", "--samples-per-shard", "3").path


def keys(tar: Path) -> set[str]:
    with tarfile.open(tar) as file:
        return {name.partition(".")[0] for name in file.getnames()}


def test_samples_are_gone_and_nothing_else_has_changed(dataset, tmp_path):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    before = content(out)
    assert main(["remove", str(out), "000010001", "flickr:50"]) == 0
    after = content(out)
    changed = {name for name in before if before[name] != after[name]}
    assert set(before) == set(after)
    assert changed == {
        *("train/00001.tar", "train/00001.parquet", "eval/flickr30k_test/test/0.tar", "shards.parquet"),
        *("eval/flickr30k_test/test/0.parquet", "train/sizes.json", "quarantine.jsonl"),
        *("manifest.json", "manifest.sha256", "report.html"),
    }
    assert keys(out / "train/00001.tar") == {"000010000", "000010002"}
    assert keys(out / "eval/flickr30k_test/test/0.tar") == {"s0000001"}
    found = manifest.read(out)
    assert {name: totals["samples"] for name, totals in found.manifest["splits"].items()} == {
        "train": 8,
        "flickr30k_test": 1,
    }
    assert found.manifest["counts"]["dropped"] == {"flickr30k": {"removed": 2}}
    assert json.loads((out / "train/sizes.json").read_text())["00001.tar"] == 2
    assert found.fingerprint("train") != manifest.read(dataset).fingerprint("train")
    assert main(["verify", str(out)]) == 0


def test_an_unknown_name_changes_nothing(dataset, tmp_path, capsys):
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    (tmp_path / "names.txt").write_text("000010001\nflickr:999\n")
    assert main(["remove", str(out), "--file", str(tmp_path / "names.txt")]) == 2
    assert "flickr:999" in capsys.readouterr().err
    assert content(out) == content(dataset)


@pytest.mark.parametrize("writes", range(15))
def test_a_removal_that_is_cut_off_anywhere_is_finished_by_the_next(dataset, tmp_path, monkeypatch, writes):
    names = ["000010001", "flickr:50"]
    undisturbed = Path(shutil.copytree(dataset, tmp_path / "undisturbed"))
    assert main(["remove", str(undisturbed), *names]) == 0
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    replace, left = Path.replace, iter(range(writes))

    def until_killed(self, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", until_killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            raise SystemExit(main(["remove", str(out), *names]))
    # Where the journal was complete, the removal is finished, and the names are then unknown.
    assert main(["remove", str(out), *names]) in (0, 2)
    assert content(out) == content(undisturbed)

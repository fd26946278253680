"""The manifest: one flipped byte anywhere is found, and a fingerprint is of the training bytes alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import manifest
from data_prep.__main__ import main
from data_prep.manifest import Dataset, Shard, Shards
from data_prep.record import DataError
from tests.data_prep import layouts


@pytest.fixture
def data(tmp_path) -> Path:
    layouts.flickr30k(tmp_path / "raw", {"train": [1, 2, 3], "test": [4]})
    arguments = ["build", f"flickr30k={tmp_path / 'raw'}", "--out", str(tmp_path / "out"), "--samples-per-shard", "2"]
    assert main([*arguments, "--workers", "1"]) == 0
    return tmp_path / "out"


def findings(path: Path) -> list[str]:
    try:
        return manifest.verify(path)
    except DataError as error:
        return [str(error)]


def test_a_flipped_byte_in_any_file_is_found_and_its_file_named(data):
    assert findings(data) == []
    for path in [path for path in data.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for place in {0, len(original) // 2, len(original) - 1} if original else ():
            damaged = bytearray(original)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert any(path.name in finding for finding in findings(data)), (path, place)
        path.write_bytes(original)
    assert findings(data) == []


def test_every_byte_of_the_seal_counts(data):
    original = (data / manifest.SEAL).read_bytes()
    for place in range(len(original)):
        damaged = bytearray(original)
        damaged[place] ^= 0x80
        (data / manifest.SEAL).write_bytes(damaged)
        assert findings(data), place


def test_missing_and_foreign_files_are_listed(data, capsys):
    (data / "train/00000.parquet").unlink()
    (data / "train/notes.txt").write_text("mine")
    assert findings(data) == ["train/00000.parquet: missing.", "train/notes.txt: not listed in the manifest."]
    assert main(["verify", str(data)]) == 2
    assert "train/notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", [manifest.MANIFEST, manifest.SEAL, manifest.SHARDS])
def test_what_was_looked_for_is_named(data, name):
    (data / name).unlink()
    with pytest.raises(DataError, match=f"looked for {name}"):
        manifest.read(data)


def test_a_newer_schema_is_refused_by_name(data):
    content = json.loads((data / manifest.MANIFEST).read_text()) | {"schema_version": manifest.SCHEMA_VERSION + 1}
    text = json.dumps(content).encode()
    (data / manifest.MANIFEST).write_bytes(text)
    (data / manifest.SEAL).write_text(f"{hashlib.sha256(text).hexdigest()}  {manifest.MANIFEST}\n")
    with pytest.raises(DataError, match=f"schema version {manifest.SCHEMA_VERSION + 1} is newer"):
        manifest.read(data)


def test_an_unknown_split_names_those_that_there_are(data):
    with pytest.raises(DataError, match="flickr30k_test, train"):
        manifest.read(data).split("val")


def test_the_manifest_does_not_grow_with_the_shards(data):
    assert not any("0000" in name for name in manifest.read(data).manifest["files"])


HASHES = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")
SHARDS = st.lists(
    st.builds(
        Shard,
        split=st.sampled_from(["train", "val"]),
        name=st.text("ab/", min_size=1, max_size=4),
        bytes=st.integers(0, 9),
        sha256=HASHES,
        samples=st.integers(0, 5),
        captions=st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


@given(SHARDS)
def test_a_fingerprint_is_of_the_ordered_rows_and_nothing_else(shards):
    def fingerprint(some: list[Shard]) -> str | None:
        dataset = Dataset(Path("x"), "x", Shards.of(some), (), {})
        return dataset.fingerprint("train") if any(shard.split == "train" for shard in some) else None

    rows = [(shard.sha256, shard.samples) for shard in shards if shard.split == "train"]
    expected = hashlib.sha256("".join(f"{digest} {samples}\n" for digest, samples in rows).encode()).hexdigest()
    assert fingerprint(shards) == (expected if rows else None)
    renamed = [Shard(s.split, "other", s.bytes + 1, s.sha256, s.samples, s.captions + 1) for s in shards]
    assert fingerprint(renamed) == fingerprint(shards)
    if rows != rows[::-1]:
        assert fingerprint(shards[::-1]) != fingerprint(shards)

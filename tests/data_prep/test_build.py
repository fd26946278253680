"""Building: the contract's files, the same bytes whatever happens on the way, and nothing half done."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import manifest
from data_prep.__main__ import main
from data_prep.shards import BUILD
from tests.data_prep import layouts

MANY = 900


def build(*arguments: object, workers: int = 1) -> int:
    return main(["build", *map(str, arguments), "--workers", str(workers)])


def train_rows(out: Path) -> list[dict]:
    return [row for path in sorted((out / "train").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """COCO, VQA, Flickr30K and evaluation folders, COCO and VQA sharing some images."""
    root = tmp_path_factory.mktemp("raw")
    layouts.coco(root / "coco", {"train2014": list(range(1, 41)), "val2014": [100, 101, 102]})
    asked = [layouts.question(image, 0, "What color is the cup?", "red") for image in (3, 4, 60)]
    asked += [layouts.question(3, 1, "Is it?", "yes", agree=2), layouts.question(61, 0, "Is it?", "yes", agree=2)]
    layouts.vqa(root / "vqa", {"train2014": asked, "val2014": [layouts.question(200, 0, "Who?", "z")]})
    layouts.flickr30k(root / "flickr30k", {"train": [5001, 5002], "test": [5003, 5004]})
    for number, name in enumerate(("cat/a.jpg", "cat/b.jpg", "dog/c.jpg")):
        layouts.picture(root / "images/pets" / name, 7000 + number)
    layouts.picture(root / "images/order/x.jpg", 8000)
    layouts.dump(root / "images/order/metadata.jsonl", {"file_name": "x.jpg", "captions": ["a b", "b a"]})
    return [f"{name}={root / name}" for name in ("coco", "vqa", "flickr30k", "images")]


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "mixed"
    assert build(*sources, "--out", out, "--samples-per-shard", 10) == 0
    return out


def test_the_files_of_the_contract(built):
    dataset = manifest.read(built)
    assert manifest.verify(built) == []
    assert not (built / BUILD).exists()
    assert [shard.name for shard in dataset.split("train")] == [f"train/{n:05d}.tar" for n in range(5)]
    assert {known.name: (known.kind, known.samples) for known in dataset.evaluation_sets} == {
        "coco_2014_val": ("retrieval", 3),
        "flickr30k_test": ("retrieval", 2),
        "order": ("selection", 1),
        "pets": ("classification", 3),
        "vqa_v2_val": ("vqa", 1),
    }
    sizes = json.loads((built / "train/sizes.json").read_text())
    assert sizes == {Path(shard.name).name: shard.samples for shard in dataset.split("train")}
    kinds = {known.name: (known.path / "dataset_type.txt").read_text().strip() for known in dataset.evaluation_sets}
    assert kinds == {
        "coco_2014_val": "retrieval",
        "flickr30k_test": "retrieval",
        "order": "image_caption_selection",
        "pets": "classification",
        "vqa_v2_val": "vqa",
    }
    for known in dataset.evaluation_sets:
        assert (known.path / "test/nshards.txt").read_text() == "1\n"
    assert (built / "eval/pets/classnames.txt").read_text() == "cat\ndog\n"
    assert "{c}" in (built / "eval/pets/zeroshot_classification_templates.txt").read_text()


def test_an_image_that_coco_and_vqa_share_is_stored_once(built):
    rows = {row["image_id"]: row for row in train_rows(built)}
    assert len(rows) == len(train_rows(built)) == 40 + 1 + 2
    assert rows["coco:3"]["source"] == "coco+vqa"
    assert rows["coco:3"]["captions"] == ["Picture 3, text 0.", "Picture 3, text 1."]
    assert rows["coco:3"]["statements"] == ["the cup is red"]
    assert rows["coco:60"]["captions"] == []


def test_what_was_dropped_is_counted_and_listed(built):
    counts = manifest.read(built).manifest["counts"]
    assert counts["read"] == {"coco": 43, "vqa": 5, "flickr30k": 4, "images": 4}
    assert counts["dropped"] == {"coco+vqa": {"low_agreement": 1}, "vqa": {"low_agreement": 1, "no_text": 1}}
    listed = [json.loads(line) for line in (built / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((item["image_id"], item["reason"]) for item in listed) == [
        ("coco:3", "low_agreement"),
        ("coco:61", "low_agreement"),
        ("coco:61", "no_text"),
    ]


def test_shards_mix_the_sources(built):
    first = [row["image_id"] for row in train_rows(built)]
    assert first != sorted(first, key=lambda name: (name.partition(":")[0], int(name.partition(":")[2])))


def test_shards_load_in_webdataset(built):
    import webdataset as wds

    keys = set()
    for tar in sorted((built / "train").glob("*.tar")):
        for sample in wds.WebDataset(str(tar), shardshuffle=False).decode("pil"):
            keys.add(sample["__key__"])
            assert sample["jpg"].mode == "RGB"
            assert sample["txt"] == (sample["json"]["captions"] or sample["json"]["statements"])[0]
            assert sample["json"]["split"] == "train"
            assert (sample["json"]["width"], sample["json"]["height"]) == sample["jpg"].size
    assert len(keys) == 43
    (vqa,) = wds.WebDataset(str(built / "eval/vqa_v2_val/test/0.tar"), shardshuffle=False).decode()
    assert vqa["__key__"] == "s0000000"
    assert len(vqa["json"]["questions"][0]["answers"]) == 10
    assert vqa["json"]["statements"] == []
    pets = list(wds.WebDataset(str(built / "eval/pets/test/0.tar"), shardshuffle=False).decode())
    assert [sample["cls"] for sample in pets] == [0, 0, 1]
    retrieval = next(iter(wds.WebDataset(str(built / "eval/flickr30k_test/test/0.tar"), shardshuffle=False).decode()))
    assert retrieval["txt"].splitlines() == [f"Photo 5003, {n}." for n in range(5)]


def test_workers_do_not_change_a_byte(sources, built, tmp_path):
    out = tmp_path / "mixed"
    assert build(*sources, "--out", out, "--samples-per-shard", 10, workers=2) == 0
    assert layouts.tree(out) == layouts.tree(built)


@pytest.mark.slow
def test_ray_does_not_change_a_byte(sources, built, tmp_path, tmp_path_factory, monkeypatch):
    """Embedded Ray, on real worker processes."""
    # Ray leaves its working folder behind in the user's temporary one.
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path_factory.mktemp("r")))
    out = tmp_path / "mixed"
    assert build(*sources, "--out", out, "--samples-per-shard", 10, "--executor", "ray", workers=2) == 0
    assert layouts.tree(out) == layouts.tree(built)


def test_the_seed_changes_the_order_and_not_the_samples(sources, built, tmp_path):
    out = tmp_path / "mixed"
    assert build(*sources, "--out", out, "--samples-per-shard", 10, "--seed", 1) == 0
    ids, others = ([row["image_id"] for row in train_rows(path)] for path in (built, out))
    assert ids != others
    assert sorted(ids) == sorted(others)
    assert manifest.read(out).fingerprint("train") != manifest.read(built).fingerprint("train")


def test_bad_images_are_counted_and_the_rest_is_kept(tmp_path):
    source = layouts.table(tmp_path / "t.csv", 4)
    (tmp_path / "pictures/1.jpg").write_bytes(b"<html>")
    (tmp_path / "pictures/2.jpg").unlink()
    assert build(f"table={source}", "--out", tmp_path / "out") == 0
    assert manifest.read(tmp_path / "out").manifest["counts"]["dropped"] == {
        "table": {"missing_file": 1, "not_an_image": 1}
    }
    assert [row["image_id"] for row in train_rows(tmp_path / "out")] != []
    assert len(train_rows(tmp_path / "out")) == 2


def command(source: Path, out: Path) -> list[str]:
    arguments = ["build", f"table={source}", "--out", str(out), "--samples-per-shard", "3", "--name", "many"]
    return [sys.executable, "-m", "data_prep", *arguments, "--workers", "2"]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_build_leaves_no_seal_no_process_and_goes_on(tmp_path):
    source = layouts.table(tmp_path / "raw/many.csv", MANY)
    out, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    killed = subprocess.Popen(command(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((out / BUILD).glob("train_*.json"))) < 3:
        assert killed.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (out / manifest.SEAL).exists()
    assert len(children) >= 2
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline, "workers outlive the build"
        time.sleep(0.01)
    assert main(["verify", str(out)]) == 2

    made = {
        path.name: path.stat()
        for path in (out / "train").glob("*.tar")
        if (out / BUILD / f"train_{path.name}.json").exists()
    }
    assert 3 <= len(made) < MANY // 3
    assert subprocess.run(command(source, out), stderr=subprocess.DEVNULL).returncode == 0
    assert subprocess.run(command(source, undisturbed), stderr=subprocess.DEVNULL).returncode == 0
    assert layouts.tree(out) == layouts.tree(undisturbed)
    for name, before in made.items():
        after = (out / "train" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), f"{name} was made again"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, workers):
    """A limit on file sizes, which the kernel keeps as it keeps a disk's end."""
    source = layouts.table(tmp_path / "raw/t.csv", 40)
    arguments = ["build", f"table={source}", "--samples-per-shard", "20", "--name", "x", "--workers", workers]

    def run(out: Path, limit: int) -> subprocess.CompletedProcess[str]:
        program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        program += f"from data_prep.__main__ import main; raise SystemExit(main({[*arguments, '--out', str(out)]}))"
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    full = run(tmp_path / "out", 30_000)
    assert full.returncode == 2, full.stderr
    assert "error: File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tar", ".tmp", ".sha256")]
    assert run(tmp_path / "out", 10**9).returncode == 0
    assert run(tmp_path / "undisturbed", 10**9).returncode == 0
    assert layouts.tree(tmp_path / "out") == layouts.tree(tmp_path / "undisturbed")


@pytest.fixture
def cut_off(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A table, and a dataset of it whose build stopped just before the manifest."""
    source, out = layouts.table(tmp_path / "t.csv", 6), tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", interrupt)
        assert build(f"table={source}", "--out", out, "--samples-per-shard", 2) != 0
    return source, out


def test_an_unfinished_dataset_of_other_options_is_refused(cut_off, capsys):
    source, out = cut_off
    before = layouts.tree(out)
    assert build(f"table={source}", "--out", out, "--samples-per-shard", 3) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert layouts.tree(out) == before
    assert build(f"table={source}", "--out", out, "--samples-per-shard", 3, "--overwrite") == 0
    assert manifest.verify(out) == []


def test_a_damaged_shard_of_an_unfinished_dataset_is_made_again(cut_off):
    source, out = cut_off
    (out / "train/00001.tar").write_bytes(b"cut")
    (out / "train/00002.parquet").unlink()
    assert build(f"table={source}", "--out", out, "--samples-per-shard", 2) == 0
    assert manifest.verify(out) == []


def test_a_finished_dataset_is_kept_and_others_are_not_overwritten(tmp_path, capsys):
    source, out = layouts.table(tmp_path / "t.csv", 3), tmp_path / "out"
    assert build(f"table={source}", "--out", out) == 0
    (out / BUILD).mkdir()  # killed between the seal and the end
    before = (out / manifest.SEAL).stat().st_mtime_ns
    assert build(f"table={source}", "--out", out) == 0
    assert (out / manifest.SEAL).stat().st_mtime_ns == before
    assert manifest.verify(out) == []
    assert build(f"table={source}", "--out", out, "--resize", 16) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("option", [(), ("--overwrite",)])
def test_a_folder_that_is_no_dataset_is_left_alone(tmp_path, option):
    source, out = layouts.table(tmp_path / "t.csv", 3), tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    assert build(f"table={source}", "--out", out, *option) == 2
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


def test_resize_is_applied_and_wrong_values_are_named(tmp_path, capsys):
    source = layouts.table(tmp_path / "t.csv", 3)
    assert build(f"table={source}", "--out", tmp_path / "out", "--resize", 16) == 0
    assert {row["height"] for row in train_rows(tmp_path / "out")} == {16}
    for value in ("0", "big", "-3"):
        assert build(f"table={source}", "--out", tmp_path / "no", f"--resize={value}") == 2
        assert value in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_what_it_takes_is_said_first_and_too_little_room_is_refused(tmp_path, capsys, monkeypatch):
    table = layouts.table(tmp_path / "t.csv", 30)
    assert build(f"table={table}", "--out", tmp_path / "a") == 0
    assert "30 images: about 0.00 GB and 0 minutes" in capsys.readouterr().err
    full = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert build(f"table={table}", "--out", tmp_path / "b") == 2
    assert "0.00 GB are free there" in capsys.readouterr().err
    assert not (tmp_path / "b/train").exists()


def test_two_tables_that_call_different_files_by_one_name_are_refused(tmp_path, capsys):
    tables = [layouts.table(tmp_path / name / "t.csv", 2) for name in ("a", "b")]
    assert build(*(f"table={path}" for path in tables), "--out", tmp_path / "out") == 2
    assert "table:t/pictures/0.jpg" in capsys.readouterr().err


def test_a_source_that_is_given_twice_is_refused(tmp_path, capsys):
    layouts.coco(tmp_path / "coco", {"val2017": [1]})
    source = f"coco={tmp_path / 'coco'}"
    assert build(source, source, "--out", tmp_path / "out") == 2
    assert "twice" in capsys.readouterr().err

"""Parts of a build, in any order, at once, killed, late or stale: the bytes are those of one process."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import manifest, shards, spool
from data_prep.__main__ import main
from data_prep.parts import Part, own_folder
from data_prep.record import DataError
from data_prep.shards import BUILD
from data_prep.sources import sample
from tests.data_prep import layouts

PARTS = 4
# JSON and repr write such a name otherwise than it is.
NAME = "größe o'k"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """All of the sample's sources, and a table of images as bytes without splits: some are drawn to be held out, and
    twelve are held-out photos of another source, half of them encoded anew."""
    root = tmp_path_factory.mktemp("raw")
    sample.write(root / "sample", images=48, seed=3, workers=1)
    layouts.table(root / "t.csv", 40)
    pictures = [(root / f"pictures/{number}.jpg").read_bytes() for number in range(40)]
    test = [
        image["filename"]
        for image in json.loads((root / "sample/flickr30k/dataset_flickr30k.json").read_text())["images"]
        if image["split"] == "test"
    ]
    for number, name in enumerate(test):
        path, again = next((root / "sample/flickr30k").rglob(name)), io.BytesIO()
        Image.open(path).save(again, "JPEG", quality=70)
        pictures.append(again.getvalue() if number % 2 else path.read_bytes())
    pictures.append(b"no image")
    captions = [f"picture {number}" for number in range(len(pictures))]
    pq.write_table(pa.table({"image": pictures, "caption": captions}), root / "t.parquet")
    options = ["--samples-per-shard", "9", "--hold-out", "val=0.2", "--workers", "1"]
    return ["build", f"sample={root / 'sample'}", f"table={root / 't.parquet'}", *options]


@pytest.fixture(scope="module")
def one(arguments, tmp_path_factory) -> dict[str, bytes]:
    """The files that one process makes."""
    out = tmp_path_factory.mktemp("one") / NAME
    assert main([*arguments, "--out", str(out)]) == 0
    dropped = manifest.read(out).manifest["counts"]["dropped"]
    assert set(dropped["table"]) == {"held_out_file", "held_out_look", "not_an_image"}
    assert manifest.read(out).split(f"{NAME}_val")
    assert len(manifest.read(out).split("train")) > 2 * PARTS
    return layouts.tree(out)


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    """What changes when a shard's file is made again: of each tar and table."""
    files = [path for path in out.rglob("*") if path.suffix in (".tar", ".parquet") and BUILD not in path.parts]
    return {path.relative_to(out).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def train_shards(out: Path) -> set[int]:
    return {int(path.stem) for path in (out / "train").glob("*.tar")}


# Runs `main`, and does something at the start of the second train table that it writes.
AT_SECOND = """
import os, signal, sys, time
from data_prep import shards
from data_prep.__main__ import main
write, count = shards.write_table, 0
def write_table(path, *rest):
    global count
    count += path.parent.name == "train"
    if count == 2 and path.parent.name == "train":
        {then}
    return write(path, *rest)
shards.write_table = write_table
sys.exit(main(sys.argv[1:]))
"""


def start(arguments: list[str], out: Path, part: str, then: str = "pass") -> subprocess.Popen[str]:
    program = [sys.executable, "-c", AT_SECOND.format(then=then)]
    return subprocess.Popen(
        [*program, *arguments, "--out", str(out), "--part", part], stderr=subprocess.PIPE, text=True
    )


def test_parts_at_once_give_the_bytes_of_one_process_and_their_shards_are_taken(arguments, one, tmp_path, capsys):
    """The first part runs twice: a scheduler may begin a task again whose node lives on."""
    out = tmp_path / NAME
    parts = [
        start([*arguments, "--workers", str(1 + index % 2)], out, f"{index}/{PARTS}") for index in (0, *range(PARTS))
    ]
    said = [part.communicate(timeout=90)[1] for part in parts]
    assert [part.returncode for part in parts] == [0] * len(parts), said
    assert "part 3/4: done" in said[-1]
    assert not (out / manifest.SEAL).exists()
    before = stamps(out)
    assert main([*arguments, "--out", str(out)]) == 0
    assert layouts.tree(out) == one
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"shards.parquet"}
    count = len(train_shards(out))
    assert f"train: {count} of {count} shards were there already" in capsys.readouterr().err


def test_parts_in_any_order_one_of_them_killed_and_begun_again(arguments, one, tmp_path):
    out = tmp_path / NAME
    everything = range(sum(name.startswith("train/") and name.endswith(".tar") for name in one))
    expected: set[int] = set()
    for index in (2, 0, 3, 1):
        if index == 3:
            # Between a shard's tar and its table, when the first shard of the part's is whole.
            killed = start(arguments, out, f"3/{PARTS}", "os.kill(os.getpid(), signal.SIGKILL)")
            killed.communicate(timeout=90)
            assert killed.returncode == -signal.SIGKILL
            assert train_shards(out) == expected | {3}
            before = stamps(out)
        assert main([*arguments, "--out", str(out), "--part", f"{index}/{PARTS}"]) == 0
        expected |= set(everything[index::PARTS])
        assert train_shards(out) == expected
    assert main([*arguments, "--out", str(out)]) == 0
    assert layouts.tree(out) == one
    after = stamps(out)
    assert {name: after[name] for name in before} == before


def test_a_part_that_lives_on_while_the_last_step_runs_changes_nothing(arguments, one, tmp_path):
    """A node that was given up, and was only slow."""
    out = tmp_path / NAME
    wait = f"open({str(tmp_path / 'reached')!r}, 'w').close(); sys.stdin.read()"
    program = [sys.executable, "-c", AT_SECOND.format(then=wait)]
    late = subprocess.Popen(
        [*program, *arguments, "--out", str(out), "--part", "0/2"],
        **{"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    while not (tmp_path / "reached").exists():
        assert late.poll() is None, late.communicate()[1]
    assert main([*arguments, "--out", str(out)]) == 0
    before = stamps(out)
    said = late.communicate(timeout=90)[1]
    assert late.returncode == 2, said
    assert "another build of it began or ended" in said
    assert layouts.tree(out) == one
    assert stamps(out) == before
    # One that begins only now has nothing to do.
    assert main([*arguments, "--out", str(out), "--part", "1/2"]) == 0
    assert layouts.tree(out) == one
    assert not (out / BUILD).exists()


# A quick data set for many builds: a table, and an evaluation set of which the table has a copy.
@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("small")
    layouts.table(root / "t.csv", 14)
    for number in (3, 100, 101):
        layouts.picture(root / f"images/pets/cat/{number}.jpg", number)
    options = ["--samples-per-shard", "2", "--name", "x", "--workers", "1"]
    return ["build", f"table={root / 't.csv'}", f"images={root / 'images'}", *options]


@pytest.fixture(scope="module")
def small_one(small, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one") / "x"
    assert main([*small, "--out", str(out)]) == 0
    assert manifest.read(out).manifest["counts"]["dropped"] == {"table": {"held_out_file": 1}}
    return layouts.tree(out)


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_any_parts_of_any_number_in_any_order(small, small_one, tmp_path_factory, data):
    """Some are missing, some run twice, and not all are of the same number: what is missing is made at the end."""
    out = tmp_path_factory.mktemp("any") / "x"
    numbers = st.integers(1, 9).flatmap(lambda parts: st.tuples(st.integers(0, parts - 1), st.just(parts)))
    ran = data.draw(st.lists(numbers, max_size=4))
    for index, parts in ran:
        assert main([*small, "--out", str(out), "--part", f"{index}/{parts}"]) == 0
    assert train_shards(out) == {number for index, parts in ran for number in range(7)[index::parts]}
    before = stamps(out)
    assert main([*small, "--out", str(out)]) == 0
    assert layouts.tree(out) == small_one
    after = stamps(out)
    assert {name: after[name] for name in before} == before


@given(st.integers(1, 12), st.integers(0, 60))
def test_each_task_is_one_part_s_share_and_all_come_in_turn(parts, count):
    shares = [list(Part(index, parts).share(range(count))) for index in range(parts)]
    assert sorted(number for share in shares for number in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for index, share in enumerate(shares):
        order = Part(index, parts).in_turn(range(count))
        assert sorted(order[: len(share)]) == share
        assert sorted(order) == list(range(count))


def test_parts_come_to_the_others_shards_in_orders_of_their_own():
    orders = [Part(index, 4).in_turn(range(400))[100:] for index in range(4)]
    for first, second in ((0, 1), (1, 3), (2, 3)):
        same = sum(one == two for one, two in zip(orders[first], orders[second], strict=True))
        assert same < 10  # one of 300 is expected


def test_damaged_shards_are_made_again_and_no_others(small, small_one, tmp_path, capsys):
    out = tmp_path / "x"
    for index in range(2):
        assert main([*small, "--out", str(out), "--part", f"{index}/2"]) == 0
    tar = out / "train/00001.tar"
    tar.write_bytes(tar.read_bytes()[:-2000] + bytes(1999) + b"x")
    table = out / "train/00002.parquet"
    table.write_bytes(table.read_bytes()[:-9] + bytes(9))
    (out / "train/00003.parquet").unlink()
    (out / BUILD / "train_00004.tar.json").write_text('{"identity": "')
    before = stamps(out)
    assert main([*small, "--out", str(out)]) == 0
    assert layouts.tree(out) == small_one
    assert "train: 3 of 7 shards were there already" in capsys.readouterr().err
    kept = {name for name, stamp in stamps(out).items() if before.get(name) == stamp and name.startswith("train/")}
    assert kept == {f"train/{number:05d}.{kind}" for number in (0, 5, 6) for kind in ("tar", "parquet")}


def test_shards_of_other_options_are_refused_and_never_taken(small, small_one, tmp_path, capsys):
    out, other = tmp_path / "x", tmp_path / "other"
    assert main([*small, "--out", str(out), "--part", "0/2"]) == 0
    before = layouts.tree(out)
    for changed in (["--resize", "16"], ["--seed", "1"], ["--keep-near-duplicates"]):
        assert main([*small, "--out", str(out), "--part", "1/2", *changed]) == 2
        assert "made from other sources or options" in capsys.readouterr().err
    assert layouts.tree(out) == before
    # Even where the file is not there that tells them apart, as for two that begin at the same moment.
    assert main([*small, "--out", str(other), "--part", "1/2", "--resize", "16"]) == 0
    (other / BUILD / "origin.json").unlink()
    shutil.copytree(other, out, dirs_exist_ok=True)
    assert main([*small, "--out", str(out)]) == 0
    assert layouts.tree(out) == small_one


def test_a_part_that_another_build_took_over_says_so(small, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "x", shards.write_table

    def write_table(path: Path, *rest: object) -> str:
        (out / BUILD / "origin.json").write_text(json.dumps({"origin": "another"}))
        return real(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_table", write_table)
        assert main([*small, "--out", str(out), "--part", "0/2"]) == 2
    assert "made from other sources or options" in capsys.readouterr().err


def test_shards_that_other_versions_made_are_made_again(small, small_one, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x"
    with monkeypatch.context() as patched:
        patched.setattr(shards, "tools", lambda: {"pillow": "0.1"})
        assert main([*small, "--out", str(out), "--part", "0/1"]) == 0
    capsys.readouterr()
    assert main([*small, "--out", str(out)]) == 0
    assert "were there already" not in capsys.readouterr().err
    assert layouts.tree(out) == small_one


def test_what_parts_made_needs_no_room_again(small, tmp_path, monkeypatch):
    for index in range(2):
        assert main([*small, "--out", str(tmp_path / "x"), "--part", f"{index}/2"]) == 0
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert main([*small, "--out", str(tmp_path / "y")]) == 2
    assert main([*small, "--out", str(tmp_path / "x")]) == 0


@pytest.mark.parametrize("word", ["4/4", "-1/4", "1", "0/0", "a/b", "1/4/2", "", "1 / 4", "²/4"])
def test_a_part_that_there_is_not_is_named(small, tmp_path, word, capsys):
    assert main([*small, "--out", str(tmp_path / "x"), f"--part={word}"]) == 2
    assert f"--part {word!r}: write I/N" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_part_removes_nothing(small, tmp_path, capsys):
    assert main([*small, "--out", str(tmp_path / "x"), "--part", "0/2"]) == 0
    before = layouts.tree(tmp_path / "x")
    assert main([*small, "--out", str(tmp_path / "x"), "--part", "1/2", "--overwrite"]) == 2
    assert "Remove the dataset first" in capsys.readouterr().err
    assert layouts.tree(tmp_path / "x") == before


def test_records_whose_files_were_taken_away_are_missed(tmp_path, monkeypatch):
    """A process that lost its folder must not go on with the records that it still holds."""
    monkeypatch.setattr(spool, "BUFFERED", 3)

    def run() -> None:
        with own_folder(tmp_path, alone=False) as folder:
            waiting = spool.Spool(folder / "train")
            for number in range(4):
                waiting.add(number % 2, str(number))
            assert list(waiting.lines(1)) == ["1", "3"]
            with own_folder(tmp_path, alone=True):
                assert list((tmp_path / BUILD).iterdir()) == []
            assert list(waiting.lines(1)) == []

    with pytest.raises(DataError, match=r"took .* away"):
        run()


def test_a_file_that_is_missing_elsewhere_is_no_fault_of_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError), own_folder(tmp_path, alone=False):
        (tmp_path / "nowhere").read_bytes()

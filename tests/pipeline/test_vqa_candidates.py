"""Where candidate answers come from, and that they give nothing away; and a VQA set as a user measures it."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_prep import manifest
from data_prep.manifest import Shard
from pipeline.__main__ import main
from pipeline.evaluate import measures, vqa, vqa_candidates
from pipeline.evaluate.compare import compare
from pipeline.evaluate.run import evaluate
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.vqa_candidates import candidates, read_answers
from tests.pipeline.test_report import write_run
from tests.pipeline.test_vqa import raw
from tests.processes import run_ranks


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for number, questions in enumerate(samples):
            for extension, data in (
                ("png", picture.getvalue()),
                ("json", json.dumps({"questions": questions}).encode()),
            ):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def dataset(root, train, held_out):
    """A dataset of ours with a train shard a list of samples, each with its questions, and a VQA set."""
    shards = []
    for number, samples in enumerate(train):
        path = root / f"train/{number:05d}.tar"
        write_tar(path, samples)
        texts = [["a statement"] if questions else [] for questions in samples]
        pq.write_table(pa.table({"statements": pa.array(texts, pa.list_(pa.string()))}), path.with_suffix(".parquet"))
        shards.append(
            Shard("train", f"train/{number:05d}.tar", path.stat().st_size, manifest.sha256(path), len(samples), 0)
        )
    write_tar(root / "eval/asked_val/test/0.tar", held_out)
    (root / "eval/asked_val/test/nshards.txt").write_text("1\n")
    splits = {"asked_val": {"kind": "vqa", "samples": len(held_out), "shards": 1, "captions": 0, "bytes": 1}}
    if train:
        splits["train"] = {"kind": "train", "samples": sum(map(len, train)), "shards": len(train)}
    manifest.write(root, {"name": "small", "splits": splits, "counts": {}}, shards, [])
    return root / "eval/asked_val"


TRAIN = [
    [[raw(1, "red"), raw(2, "2", "number")], [raw(3, "blue"), raw(4, "yes", "yes/no")]],
    [[raw(5, "blue")], [raw(6, "10", "number"), raw(7, "2", "number"), raw(8, "azure")], []],
]


def test_candidates_are_the_most_frequent_train_answers(tmp_path, monkeypatch):
    folder = dataset(tmp_path / "all", TRAIN, [[raw()]])
    assert candidates(folder) == {"yes/no": ("yes", "no"), "number": ("2", "10"), "other": ("blue", "azure", "red")}
    monkeypatch.setattr(vqa_candidates, "MOST_FREQUENT", {"number": 1, "other": 2})
    folder = dataset(tmp_path / "few", TRAIN, [[raw()]])
    assert candidates(folder) == {"yes/no": ("yes", "no"), "number": ("2",), "other": ("blue", "azure")}


def test_candidates_do_not_depend_on_the_set(tmp_path):
    """Its answers give nothing away, whatever they are."""
    found = [
        candidates(dataset(tmp_path / word, TRAIN, [[raw(9, word), raw(10, "77", "number")]]))
        for word in ("red", "mauve")
    ]
    assert found[0] == found[1]
    assert not {"mauve", "77"} & {answer for answers in found[1].values() for answer in answers}


def test_shards_without_statements_are_not_read(tmp_path):
    """Such as a million of them of pairs from the web, in the same dataset."""
    folder = dataset(tmp_path, [*TRAIN, [[], []]], [[raw()]])
    (tmp_path / "train/00002.tar").unlink()
    assert candidates(folder)["number"] == ("2", "10")


@pytest.mark.parametrize("train", [[], [[[], []]]], ids=["no train split", "no train questions"])
def test_without_train_questions_candidates_must_be_named(tmp_path, train):
    folder = dataset(tmp_path, train, [[raw()]])
    with pytest.raises(EvaluationError, match=r"no train questions.*--answers FILE"):
        candidates(folder)
    (tmp_path / "answers.txt").write_text("red\n\n 2 \ntwo dogs\nred\n\nt-shirt\n")
    given = read_answers(tmp_path / "answers.txt")
    expected = {"yes/no": ("yes", "no"), "number": ("2", "two dogs"), "other": ("red", "t-shirt")}
    assert candidates(folder, given) == expected


def test_files_of_candidates_that_cannot_be_used_say_why(tmp_path):
    for name, data, message in (
        ("absent.txt", None, "looked for candidate answers"),
        ("empty.txt", b"\n \n", "found none"),
        ("binary.txt", b"\xff\xfe\x00", "looked for candidate answers"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(EvaluationError, match=message):
            read_answers(tmp_path / name)


# -- as a user measures it --

HELD_OUT = [
    [raw(20, "red"), raw(21, "no", "yes/no", question="Is the bus red?")],
    [raw(22, "2", "number", question="How many buses are there?")],
    [raw(23, "blue"), raw(24, "3", "number", question="How many cars are there?")],
]


@pytest.fixture(scope="module")
def measurable(tmp_path_factory):
    """(a run, a dataset with a VQA set)."""
    root = tmp_path_factory.mktemp("vqa")
    write_run(root / "run")
    dataset(root / "data", TRAIN, HELD_OUT)
    return root / "run", root / "data"


def on_rank(rank, world, run, data, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    vqa.BLOCK = 4
    return evaluate(run, data, out=out)


def test_two_ranks_find_what_one_finds(measurable, tmp_path, monkeypatch):
    monkeypatch.setattr(vqa, "BLOCK", 4)  # several blocks, as on_rank has
    run, data = measurable
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = evaluate(str(run), data, out=tmp_path / "1")
    torch.set_num_threads(threads)
    assert run_ranks(2, on_rank, str(run), data, tmp_path / "2") == [alone] * 2
    (record,) = alone
    assert record["task"] == "zeroshot_vqa"
    assert record["images"] == 3
    assert record["questions"] == 5
    assert record["candidates"] == {"yes/no": 2, "number": 2, "other": 3}
    kinds = ("", "_yes_no", "_number", "_other")
    assert list(record["metrics"]) == list(record["intervals"]) == [f"vqa_accuracy{kind}" for kind in kinds]
    assert record["question_types"][0]["questions"] == 5
    # Of what is embedded block after block nothing is kept, of images all.
    assert len(list((tmp_path / "1" / "embeddings").iterdir())) == 1


def test_what_is_compared_has_the_same_questions_and_candidates(measurable, tmp_path):
    run, data = measurable
    dataset(tmp_path / "other", TRAIN, [[raw(20, "blue"), *HELD_OUT[0][1:]], *HELD_OUT[1:]])
    (tmp_path / "answers.txt").write_text("red\n2\n")
    ways = {"a": (data, None), "b": (data, tmp_path / "answers.txt"), "c": (tmp_path / "other", None)}
    for name, (where, answers) in ways.items():
        evaluate(str(run), where, out=tmp_path / name, answers=answers)
    assert all(one.difference == 0 for one in compare(tmp_path / "a", tmp_path / "a"))
    for name in ("b", "c"):
        with pytest.raises(EvaluationError, match="not the same set"):
            compare(tmp_path / "a", tmp_path / name)


def test_a_set_without_candidates_is_left_out_unless_it_is_asked_for(tmp_path, caplog):
    dataset(tmp_path, [], HELD_OUT)
    manifest_of = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest_of["splits"].keys() == {"asked_val"}
    caplog.set_level("INFO")
    with pytest.raises(EvaluationError, match="no evaluation set that can be measured"):
        measures.choose(tmp_path)
    assert "asked_val: left out" in caplog.text
    with pytest.raises(EvaluationError, match="no train questions"):
        measures.choose(tmp_path, ["asked_val"])
    (tmp_path / "answers.txt").write_text("red\n")
    (source,) = measures.choose(tmp_path, answers=tmp_path / "answers.txt")
    with pytest.raises(EvaluationError, match="2 questions have an answer of the type number"):
        measures.open_set(source)


def test_answers_are_for_vqa_sets(measurable, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(measurable[1], data)
    known = json.loads((data / "manifest.json").read_text())
    known["splits"]["asked_val"]["kind"] = "retrieval"
    manifest.write(data, known, manifest.read(data).shards, [])
    with pytest.raises(EvaluationError, match=r"chosen are asked_val \(retrieval\)"):
        measures.choose(data, answers=tmp_path / "answers.txt")


def test_it_is_left_out_while_training(measurable, caplog):
    """Its texts are embedded block after block, again each time."""
    caplog.set_level("INFO")
    with pytest.raises(EvaluationError, match=r"while training.*Known kinds: classification, retrieval, selection\."):
        measures.choose(measurable[1], while_training=True)
    assert "asked_val: left out while training" in caplog.text


def test_the_command_takes_a_file_of_answers(measurable, tmp_path, capsys):
    run, data = measurable
    (tmp_path / "answers.txt").write_text("red\n2\n")
    arguments = ["evaluate", str(run), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--answers", str(tmp_path / "answers.txt")]) == 0
    assert "vqa_accuracy_other" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "asked_val.json").read_text())
    assert record["candidates"] == {"yes/no": 2, "number": 1, "other": 1}
    assert main([*arguments, "--answers", str(tmp_path / "absent.txt")]) == 2
    assert "looked for candidate answers" in capsys.readouterr().err

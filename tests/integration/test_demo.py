"""The whole road on little data: every stage runs as the demo starts it, and the summary says what they found."""

from __future__ import annotations

import json
import tarfile

import pytest
import webdataset as wds

from launch.__main__ import main
from pipeline.tracking import read_metrics

STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    settings = [f"train.steps={STEPS}", "train.batch_size=32", "optim.warmup_steps=2", "data.workers=1"]
    assert main(["demo", "--run", str(folder), "--seed", "5", "--images", "600", *settings]) == 0
    return folder


def test_the_summary_has_its_form(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"] == [str(run / "data")]
    assert set(summary["zero_shot"]) == {"top1", "seen_top1", "chance"}
    assert summary["zero_shot"]["chance"] == pytest.approx(1 / 36)
    recalls = {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)}
    assert set(summary["retrieval"]) == recalls
    fractions = [*summary["zero_shot"].values(), *summary["retrieval"].values()]
    assert all(0 <= value <= 1 for value in fractions)
    assert summary["export"]["parity"]["open_clip"] <= 1e-5
    assert list(summary["seconds"]) == ["sample", "data", "tokenizer", "train", "evaluate", "export", "report"]


@pytest.mark.slow
def test_the_demo_names_pairs_it_has_never_seen(tmp_path):
    """At its full size and at the defaults. Seeds and processors differ: .9 is usual, chance is .03."""
    assert main(["demo", "--run", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["zero_shot"]["top1"] > 0.5
    assert summary["zero_shot"]["seen_top1"] > 0.8
    assert summary["retrieval"]["image_retrieval_recall@5"] > 0.7
    assert summary["export"]["parity"]["open_clip"] <= 1e-5


def test_training_wrote_a_line_a_step(run):
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    required = {"epoch", "samples_seen", "wall_s", "loss", "logit_scale", "lr", "samples_per_s", "batch_sha256"}
    assert all(required <= set(line) for line in lines)
    assert json.loads((run / "exit.json").read_text())["status"] == "done"


def test_the_page_needs_no_network(run):
    page = (run / "report.html").read_text()
    assert 'src="data:image/' in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for name in ("sample_unseen_test", "sample_binding_test", "flickr30k_test"):
        assert name in page


def test_train_shards_load_in_webdataset_as_jpg_txt_json(run):
    shards = sorted(str(path) for path in (run / "data" / "train").glob("*.tar"))
    samples = list(wds.WebDataset(shards, shardshuffle=False).to_tuple("__key__", "jpg", "txt", "json"))
    expected = sum(json.loads((run / "data" / "train" / "sizes.json").read_text()).values())
    assert len(samples) == len({sample[0] for sample in samples}) == expected
    assert all(image[:2] == b"\xff\xd8" and text and json.loads(about)["image_id"] for _, image, text, about in samples)


def test_no_unseen_pair_is_in_train(run):
    """Neither in a caption nor in a statement nor in a question."""
    from data_prep.sources.sample_scenes import UNSEEN_TEST, UNSEEN_VAL

    unseen = [" ".join(pair) for pair in UNSEEN_VAL + UNSEEN_TEST]
    for shard in sorted((run / "data" / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            texts = [
                tar.extractfile(member).read().decode() for member in tar if member.name.endswith((".json", ".txt"))
            ]
        assert texts
        assert not [pair for text in texts for pair in unseen if pair in text]

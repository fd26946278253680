"""The vocabulary: reproducible, its reserved ids as the tokenizer expects them, trained on train texts only."""

from __future__ import annotations

import pytest
import sentencepiece

from data_prep import manifest, vocabulary
from data_prep.__main__ import main
from tests.data_prep import layouts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    layouts.coco(root / "coco", {"train2017": list(range(1, 9)), "val2017": [90]})
    asked = [layouts.question(3, 0, "What color is the zebra?", "blue")]
    layouts.vqa(root / "vqa", {"train2014": asked})
    sources = [f"coco={root / 'coco'}", f"vqa={root / 'vqa'}"]
    assert main(["build", *sources, "--out", str(root / "out"), "--workers", "1"]) == 0
    return root / "out"


def test_texts_are_the_train_captions_and_statements(data):
    texts = list(vocabulary.texts(manifest.read(data)))
    assert len(texts) == 8 * 2 + 1
    assert "the zebra is blue" in texts
    assert not any("90" in text for text in texts)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_data_gives_the_same_model(data, tmp_path, kind, capsys):
    files = [tmp_path / name for name in ("a.model", "deep/b.model")]
    for file in files:
        assert main(["vocabulary", str(data), "--out", str(file), "--size", "32", "--type", kind]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(files[0]))
    assert model.vocab_size() == 32
    assert (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2, 3)
    assert model.encode("THE Zebra") == model.encode("the zebra")
    said = capsys.readouterr().err
    assert "32 pieces" in said
    assert "unknown" in said
    assert "tokens each" in said


def test_of_too_many_texts_an_even_part_is_taken(data, tmp_path, monkeypatch):
    whole = vocabulary.train(data, tmp_path / "a.model", size=32, kind="bpe")
    monkeypatch.setattr(vocabulary, "MAX_TEXTS", 6)
    part = vocabulary.train(data, tmp_path / "b.model", size=32, kind="bpe")
    assert (whole.texts, part.texts) == (17, 6)
    assert whole.covered == 1


def test_a_size_that_the_texts_do_not_yield_is_the_users_to_change(data, tmp_path, capsys):
    assert main(["vocabulary", str(data), "--out", str(tmp_path / "x"), "--size", "5000", "--type", "bpe"]) == 2
    assert "--size" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["vocabulary", str(data), "--out", str(tmp_path / "x"), "--type", "words"]) == 2

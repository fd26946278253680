"""Train captions → a SentencePiece model, and how well it covers them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep import manifest
from data_prep.record import TRAIN, DataError

# eos is not 2: transformers' CLIPModel takes an eos id of 2 for a sign of old models and pools another token.
PAD, UNK, BOS, EOS = 0, 1, 2, 3


@dataclass(frozen=True)
class Coverage:
    """What a vocabulary does to the texts that it was trained on."""

    pieces: int
    texts: int
    unknown_rate: float
    tokens_per_text: float


def texts(dataset: manifest.Dataset) -> Iterator[str]:
    """Every caption and statement of the train split, in shard order."""
    for shard in dataset.split(TRAIN):
        for row in manifest.read_table(dataset.path / manifest.table_of(shard.name), ["captions", "statements"]):
            yield from row["captions"]
            yield from row["statements"]


def train(data: Path, out: Path, *, size: int, kind: str) -> Coverage:
    """Train a vocabulary of `size` pieces on a dataset's train texts; the same data gives the same model.

    Raises:
        DataError: the texts do not yield so many pieces.
    """
    import sentencepiece

    corpus = list(texts(manifest.read(data)))
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=buffer,
            vocab_size=size,
            model_type=kind,
            normalization_rule_name="nmt_nfkc_cf",
            character_coverage=1.0 if size < 4000 else 0.9995,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            num_threads=1,
            shuffle_input_sentence=False,
            input_sentence_size=0,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"{data}: SentencePiece cannot make {size} {kind} pieces of {len(corpus)} texts: {error} "
            "Choose another --size."
        ) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_atomically(out, buffer.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    encoded = model.encode(corpus)
    tokens = sum(map(len, encoded))
    unknown = sum(ids.count(UNK) for ids in encoded)
    return Coverage(model.vocab_size(), len(corpus), unknown / max(tokens, 1), tokens / max(len(corpus), 1))

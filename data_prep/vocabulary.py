"""Train captions → a SentencePiece model, and how well it covers them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep import manifest
from data_prep.record import TRAIN, DataError

# eos is not 2: transformers' CLIPModel takes an eos id of 2 for a sign of old models and pools another token.
PAD, UNK, BOS, EOS = 0, 1, 2, 3
# Of more texts than this, every second, every third … is taken: SentencePiece holds them in memory.
MAX_TEXTS = 2_000_000


@dataclass(frozen=True)
class Coverage:
    """What a vocabulary does to the texts that it was trained on.

    Attributes:
        covered: share of the texts that have no unknown piece.
        unknown_rate: share of the pieces that are unknown.
    """

    pieces: int
    texts: int
    covered: float
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

    dataset = manifest.read(data)
    stride = 1 + sum(shard.captions for shard in dataset.split(TRAIN)) // MAX_TEXTS
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(texts(dataset), 0, None, stride),
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
            f"{data}: SentencePiece cannot make {size} {kind} pieces of its train texts: {error} Choose another --size."
        ) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_atomically(out, buffer.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    count = tokens = unknown = covered = 0
    for text in itertools.islice(texts(dataset), 0, None, stride):
        ids = model.encode(text)
        count += 1
        tokens += len(ids)
        unknown += ids.count(UNK)
        covered += UNK not in ids
    return Coverage(
        model.vocab_size(), count, covered / max(count, 1), unknown / max(tokens, 1), tokens / max(count, 1)
    )

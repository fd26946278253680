"""Texts that a model found not to fit their images (`python -m pipeline score`), to be left out of train."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.captions import BadText, TextRules, Texts, clean_text
from data_prep.locations import exists, open_file, read_json
from data_prep.record import DataError, Record

SUMMARY = "scores.json"
REASON = "low_score"


@dataclass(frozen=True)
class LowScores:
    """The texts below a similarity; only those are held, so that memory grows with what is dropped.

    Attributes:
        texts: image id → the texts that must go, as they are written into shards.
        below: the similarity.
    """

    texts: Mapping[str, frozenset[str]]
    below: float

    def of(self, record: Record) -> frozenset[str]:
        """The texts of a record that must go."""
        return frozenset[str]().union(*(self.texts.get(name, ()) for name in record.ids))

    def summary(self) -> dict[str, object]:
        """What the manifest says of it; it names the texts by a hash, wherever the scores lay."""
        digest = hashlib.sha256()
        for image_id in sorted(self.texts):
            digest.update(json.dumps([image_id, sorted(self.texts[image_id])]).encode())
        count = sum(map(len, self.texts.values()))
        return {"min_score": self.below, "texts": count, "sha256": digest.hexdigest()}


def read(folder: Path, below: float, rules: TextRules) -> LowScores:
    """The texts whose similarity is below a bound.

    Args:
        folder: what `python -m pipeline score` wrote.
        below: the bound; what equals it stays.
        rules: what the build does to texts, so that texts compare equal.

    Raises:
        DataError: no scores there, or they were cut off.
    """
    if not exists(folder / SUMMARY):
        raise DataError(f"{folder}: looked for {SUMMARY} and found none. `python -m pipeline score` writes it, last.")
    found: dict[str, set[str]] = defaultdict(set)
    for name in read_json(folder / SUMMARY)["tables"]:
        for image_id, caption in _low_rows(folder / name, below):
            with contextlib.suppress(BadText):  # the build drops it for that
                text = clean_text(caption, rules)
                found[image_id].add(text)
    return LowScores({image_id: frozenset(texts) for image_id, texts in found.items()}, below)


def without(texts: Texts, low: frozenset[str]) -> Texts:
    """Cleaned texts without those that must go, which are counted as dropped."""
    going = [text for text in (*texts.captions, *texts.statements) if text in low]
    return replace(
        texts,
        captions=[text for text in texts.captions if text not in low],
        statements=[text for text in texts.statements if text not in low],
        dropped=[*texts.dropped, *((REASON, text) for text in going)],
    )


def _low_rows(path: Path, below: float) -> list[tuple[str, str]]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with open_file(path) as file:
        columns = ["image_id", "caption", "similarity"]
        table = pq.ParquetFile(file, pre_buffer=False).read(columns=columns, use_threads=False)
    low = table.filter(pc.less(table.column("similarity"), below))
    return list(zip(*(low.column(name).to_pylist() for name in columns[:2]), strict=True))

"""How well each train text fits its image, by a model: tables that people look at, and that data_prep drops pairs by.

OUT/NNNNN.parquet    one a train tar, one row a caption: key, image_id, caption, similarity; the image's best and mean
OUT/scores.json      of which model and data, and how the similarities are distributed; written last
OUT/lowest.html      the lowest pairs, with their pictures

Shapes: N images and M texts of a tar, D = embedding width.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.locations import appearing, is_local, path_of
from data_prep.manifest import write_atomically
from data_prep.record import sample_id
from pipeline import exchange, ranks
from pipeline import trained as loading
from pipeline.evaluate import pictures
from pipeline.evaluate.pixels import transformed
from pipeline.evaluate.run import LOG_WIDTH
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.splits import Embedded, TrainSplit, embed_part, open_train, shared
from pipeline.trained import LoadedModel

log = logging.getLogger(__name__)

SEAL, PAGE = "scores.json", "lowest.html"
COLUMNS = pa.schema(
    {
        **{name: pa.string() for name in ("key", "image_id", "caption")},
        **{name: pa.float32() for name in ("similarity", "best", "mean")},
    }
)
# Quantiles come from a histogram of so many bins over -1 … 1, so that memory does not grow; to half a bin's width.
BINS = 20_000
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
# Bins that scores.json keeps, and that the terminal shows.
COARSE, BARS, BAR = 200, 40, 50
LOWEST, PRINTED = 50, 10


def score(
    source: str,
    data: str,
    out: Path | None = None,
    *,
    step: int | None = None,
    average: bool = False,
    transform: str = "exact",
) -> dict[str, Any]:
    """Score all train pairs, on all ranks, and print how the similarities are distributed and which are lowest.

    A tar whose table is there, by the same model, is not scored again.

    Args:
        source: a run folder, or any other model (see trained.load_any).
        data: a dataset, or another tool's tars; nothing is written in it.
        out: where tables go, on a file system that all ranks share; None for DATA.scores.
        step: a run's checkpoint; None for the newest.
        average: a run's moving average of the weights.
        transform: of pixels.TRANSFORMS, how images become the model's input.

    Returns:
        What scores.json says.

    Raises:
        DataError: no such model or data, or no place for the tables.

    Collective: every rank that a launcher started calls it.
    """
    folder = out or _beside(data)
    with ranks.inference() as (rank, world, device):
        split = exchange.from_main(lambda: open_train(data))
        model = loading.load_any(source, step, device, average=average)
        model = replace(model, preprocess=transformed(transform, model.preprocess))

        # While tables of two models may lie there, nothing says that they are one's.
        exchange.from_main(lambda: (folder / SEAL).unlink(missing_ok=True))

        def make() -> None:
            for part in shared(len(split), rank, world, "score"):
                _score_part(model, split, part, folder)

        exchange.together(make)
        found = exchange.from_main(lambda: _summarise(model, split, folder))
        if rank == 0:
            _print(found, folder)
    return found


def similarities(made: Embedded) -> NDArray[np.float32]:
    """(M,) the cosine of each text and its image."""
    own_MD = made.image_ND[made.owner_M]
    found: NDArray[np.float32] = (own_MD.double() * made.text_MD.double()).sum(dim=1).float().numpy()
    return found


def _beside(data: str) -> Path:
    """DATA.scores: contract 1 has nothing written in a folder of tars."""
    if not is_local(path_of(data)) or "{" in data or data.endswith(".tar"):
        raise EvaluationError(f"{data} is no folder of this machine's, so where scores go must be said: --out FOLDER.")
    path = Path(data).resolve()
    return path.with_name(f"{path.name}.scores")


def _table_of(split: TrainSplit, part: int) -> str:
    """The name of a tar's table; a dataset's own tars lie in train/, others where they please."""
    return split.shards[part].name.removeprefix("train/").removesuffix(".tar") + ".parquet"


def _made_of(model: LoadedModel, split: TrainSplit, part: int) -> str:
    return hashlib.sha256(f"{model.identity} {split.identity(part)}".encode()).hexdigest()


def _score_part(model: LoadedModel, split: TrainSplit, part: int, folder: Path) -> None:
    path, made_of = folder / _table_of(split, part), _made_of(model, split, part)
    if path.is_file() and pq.read_schema(path).metadata.get(b"made_of") == made_of.encode():
        return
    made = embed_part(model, split, part)
    similarity_M, owner_M = similarities(made), made.owner_M.numpy()
    best_N = np.full(len(made.items), -np.inf, np.float32)
    np.maximum.at(best_N, owner_M, similarity_M)
    counts = np.bincount(owner_M, minlength=len(made.items))
    mean_N = np.bincount(owner_M, similarity_M, len(made.items)) / np.maximum(counts, 1)
    ids = [sample_id(Path(file), item.key, item.record) for file, item in zip(made.files, made.items, strict=True)]
    table = pa.table(
        {
            "key": [made.items[owner].key for owner in owner_M],
            "image_id": [ids[owner] for owner in owner_M],
            "caption": made.texts,
            "similarity": similarity_M,
            "best": best_N[owner_M],
            "mean": mean_N[owner_M].astype(np.float32),
        },
        schema=COLUMNS.with_metadata(
            {
                **{"made_of": made_of, "images": str(len(made.items)), "left_out": json.dumps(made.left_out)},
                "without_caption": str(int((counts == 0).sum())),
            }
        ),
    )
    with appearing(path) as file:
        pq.write_table(table, file)


def _summarise(model: LoadedModel, split: TrainSplit, folder: Path) -> dict[str, Any]:
    """Read the tables once, and write scores.json and the page of the lowest pairs."""
    histogram, lowest = np.zeros(BINS, np.int64), _Lowest(LOWEST)
    about: dict[str, Any] = {"images": 0, "pairs": 0, "without_caption": 0, "left_out": []}
    for part in range(len(split)):
        table = pq.ParquetFile(folder / _table_of(split, part), pre_buffer=False).read(use_threads=False)
        said = table.schema.metadata
        about["images"] += int(said[b"images"])
        about["without_caption"] += int(said[b"without_caption"])
        about["left_out"] += json.loads(said[b"left_out"])
        about["pairs"] += table.num_rows
        similarity_M = table.column("similarity").to_numpy()
        histogram += np.histogram(similarity_M.clip(-1, 1), BINS, (-1, 1))[0]
        lowest.add(part, table, similarity_M)
    if not about["pairs"]:
        raise EvaluationError(f"{split.address}: none of its {about['images']} images has a caption.")
    rows = lowest.rows()
    found = {
        **{"model": model.name, "pretrained": model.source, "weights": model.identity},
        **{"data": split.address, "fingerprint": split.fingerprint, **about},
        "quantiles": dict(zip(map(str, QUANTILES), quantiles(histogram), strict=True)),
        "histogram": histogram.reshape(COARSE, -1).sum(axis=1).tolist(),
        "lowest": [{**row, "file": split.shards[part].name} for part, row in rows],
        "tables": [_table_of(split, part) for part in range(len(split))],
    }
    pictures.write(
        folder / PAGE, f"The pairs of {split.address} that fit the least, by {model.name}", _shown(split, rows)
    )
    write_atomically(folder / SEAL, json.dumps(found, indent=1).encode())
    return found


class _Lowest:
    """The rows of the lowest similarity, as tables pass by."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[float, int, int, dict[str, Any]]] = []

    def add(self, part: int, table: pa.Table, similarity_M: NDArray[np.float32]) -> None:
        for row in np.argsort(similarity_M, kind="stable")[: self._count].tolist():
            entry = (-float(similarity_M[row]), -part, -row)
            if len(self._heap) == self._count and entry <= self._heap[0][:3]:
                break
            push = heapq.heappush if len(self._heap) < self._count else heapq.heappushpop
            push(self._heap, (*entry, table.slice(row, 1).to_pylist()[0]))

    def rows(self) -> list[tuple[int, dict[str, Any]]]:
        """(part, row), the lowest first."""
        return [(-part, row) for _, part, _, row in sorted(self._heap, key=lambda entry: entry[:3], reverse=True)]


def quantiles(histogram: NDArray[np.int64]) -> list[float]:
    """QUANTILES of what a histogram over -1 … 1 holds: the middle of the bin that each falls into."""
    until = np.cumsum(histogram)
    bins = np.searchsorted(until, np.array(QUANTILES) * until[-1])
    return [round((2 * int(number) + 1) / len(histogram) - 1, 6) for number in bins]


def _shown(split: TrainSplit, rows: list[tuple[int, dict[str, Any]]]) -> Iterator[pictures.Shown]:
    wanted = {(part, row["key"]) for part, row in rows}
    items = {
        (part, item.key): item
        for part in sorted({part for part, _ in rows})
        for _, item in split.items(part)
        if (part, item.key) in wanted
    }
    for part, row in rows:
        place = f"{split.address}/{split.shards[part].name} {row['key']}"
        yield pictures.Shown(row["similarity"], row["caption"], place, items[part, row["key"]].open())


def _print(found: Mapping[str, Any], folder: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(
        f"{found['pairs']:,} pairs of {found['images']:,} images, by {found['model']} ({found['pretrained']})"
    )
    for name, count in (("without a caption", found["without_caption"]), ("do not decode", len(found["left_out"]))):
        if count:
            console.print(f"{count:,} images {name}: left out")
    console.print(
        "similarity  " + "  ".join(f"{float(share):.0%} {at:.3f}" for share, at in found["quantiles"].items())
    )
    counts = np.array(found["histogram"]).reshape(BARS, -1).sum(axis=1)
    occupied = np.flatnonzero(counts)
    for number in range(occupied[0], occupied[-1] + 1):
        bar = "█" * round(BAR * counts[number] / counts.max())
        console.print(f"{2 * number / BARS - 1:+.2f} … {bar} {counts[number]:,}", highlight=False)
    table = Table("similarity", "key", "caption", box=None, title=f"the lowest {PRINTED}", title_justify="left")
    for row in found["lowest"][:PRINTED]:
        table.add_row(f"{row['similarity']:.3f}", escape(row["key"]), escape(row["caption"]))
    console.print(table)
    pictures.say(console, folder / PAGE)
    console.print(
        f"To leave low pairs out: python -m data_prep build … --scores {folder} --min-score X", soft_wrap=True
    )

"""The embeddings of a whole split in a folder, for searches and for other tools (faiss …).

OUT/images.npy, texts.npy    (N, D) and (M, D), unit-norm; or both in OUT/embeddings.safetensors
OUT/items.parquet            one row an image, in the order of `images`: its key, where it lies, and where its texts are
                             (`captions` rows from `text`)
OUT/texts.parquet            one row a text, in the order of `texts`: its caption, and its image's row
OUT/embeddings.json          of which model and data; written last
OUT/.parts/                  what is done of one that is under way

Each part of the split is embedded by one rank into files of its own; then they are joined, a part at a time. So memory
holds a part, ranks share no open file (which network file systems do not promise to keep whole), and what was cut off
goes on. Meanwhile the disk holds everything twice.

Shapes: N images, M texts, D = embedding width.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep.locations import appearing
from data_prep.manifest import write_atomically
from data_prep.record import sample_id
from pipeline import exchange, ranks
from pipeline import trained as loading
from pipeline.evaluate.arrays import FORMS, Array
from pipeline.evaluate.pixels import transformed
from pipeline.evaluate.sets import EvaluationError
from pipeline.evaluate.splits import Split, embed_part, open_split, shared
from pipeline.trained import LoadedModel

log = logging.getLogger(__name__)

SEAL, ITEMS, TEXTS, PARTS = "embeddings.json", "items.parquet", "texts.parquet", ".parts"
ARRAYS = ("images", "texts")
ITEM_COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "image_id": pa.string(),
        "file": pa.string(),
        "offset": pa.int64(),
        "bytes": pa.int64(),
        "text": pa.int64(),
        "captions": pa.int64(),
    }
)
TEXT_COLUMNS = pa.schema({"caption": pa.string(), "image": pa.int64()})


def embed(
    source: str,
    data: str,
    split: str,
    out: Path,
    *,
    form: str = "safetensors",
    half: bool = False,
    step: int | None = None,
    average: bool = False,
    transform: str = "exact",
) -> dict[str, Any]:
    """Embed a split into a folder, on all ranks; what is there already is not made again.

    Args:
        source: a run folder, or any other model (see trained.load_any).
        data: the dataset, or another tool's tars.
        split: see splits.open_split.
        out: the folder, on a file system that all ranks share.
        form: of the arrays, one of FORMS.
        half: float16 instead of float32.
        step: a run's checkpoint; None for the newest.
        average: a run's moving average of the weights.
        transform: of pixels.TRANSFORMS, how images become the model's input.

    Returns:
        What embeddings.json says.

    Raises:
        DataError: no such split or model, or `out` holds something else.

    Collective: every rank that a launcher started calls it.
    """
    if form not in FORMS:
        raise EvaluationError(f"--format {form!r}: choose one of {', '.join(FORMS)}.")
    with ranks.inference() as (rank, world, device):
        opened = exchange.from_main(lambda: open_split(data, split))
        model = loading.load_any(source, step, device, average=average)
        model = replace(model, preprocess=transformed(transform, model.preprocess))
        return write(model, opened, out, form=form, half=half, rank=rank, world=world)


def write(
    model: LoadedModel, split: Split, out: Path, *, form: str = "npy", half: bool = False, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Embed an open split; see `embed`.

    Collective: every rank calls it.
    """
    dtype = np.dtype("float16" if half else "float32")
    about = {
        **{"weights": model.identity, "split": split.name, "fingerprint": split.fingerprint},
        **{"format": form, "dtype": dtype.name},
    }
    if found := exchange.from_main(lambda: _begin(out, about)):
        return found
    names = [_name(split.identity(part), about) for part in range(len(split))]

    def make() -> None:
        for part in shared(len(split), rank, world, "embed"):
            if not (out / PARTS / f"{names[part]}.safetensors").is_file():
                _write_part(model, split, part, out / PARTS / names[part], half)

    exchange.together(make)
    said = {"model": model.name, "pretrained": model.source, **about, "data": split.address, "samples": split.size}
    return exchange.from_main(lambda: _join(out, names, said, dtype))


@dataclass(frozen=True)
class Embeddings:
    """A finished folder, read a stretch at a time.

    Attributes:
        folder: where it is.
        about: what embeddings.json says.
    """

    folder: Path
    about: Mapping[str, Any]

    @functools.cached_property
    def items(self) -> Rows:
        return Rows(self.folder / ITEMS)

    @functools.cached_property
    def texts(self) -> Rows:
        return Rows(self.folder / TEXTS)

    def array(self, name: str) -> Any:
        """`images` (N, D) or `texts` (M, D): only what is sliced of it is read."""
        return FORMS[self.about["format"]].read(self.folder, name)


class Rows:
    """The rows of a table, a group of them at a time in memory."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, pre_buffer=False)
        sizes = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self.bounds = np.cumsum([0, *sizes])
        self._group = functools.lru_cache(maxsize=8)(
            lambda number: self._file.read_row_group(number, use_threads=False)
        )

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return self._group(number).slice(row - int(self.bounds[number]), 1).to_pylist()[0]


def is_finished(folder: Path) -> bool:
    """Whether `embed` wrote a folder, to its end."""
    return (folder / SEAL).is_file()


def read(folder: Path) -> Embeddings:
    """A folder that `embed` wrote.

    Raises:
        EvaluationError: there is none, or it is not finished.
    """
    if not is_finished(folder):
        raise EvaluationError(
            f"{folder}: looked for {SEAL} and found none. `python -m pipeline embed` writes it, last."
        )
    return Embeddings(folder, json.loads((folder / SEAL).read_text(encoding="utf-8")))


def _begin(out: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished folder says, None where there is something to do.

    Raises:
        EvaluationError: it holds something else.
    """
    if is_finished(out):
        found: dict[str, Any] = json.loads((out / SEAL).read_text(encoding="utf-8"))
        if other := [name for name, value in about.items() if found.get(name) != value]:
            raise EvaluationError(
                f"{out}: holds embeddings of another {other[0]}: {found.get(other[0])}, and asked for is "
                f"{about[other[0]]}. Choose another --out, or remove it."
            )
        log.info("%s: is there already.", out)
        return found
    if out.is_dir() and any(out.iterdir()) and not (out / PARTS).is_dir():
        raise EvaluationError(f"{out} is not empty and holds no embeddings. Choose another --out.")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    return None


def _name(identity: str, about: Mapping[str, Any]) -> str:
    """Of a part's files: by all that they depend on."""
    return hashlib.sha256(json.dumps([identity, about["weights"], about["dtype"]]).encode()).hexdigest()[:32]


def _write_part(model: LoadedModel, split: Split, part: int, stem: Path, half: bool) -> None:
    """STEM.items.parquet and .texts.parquet, and STEM.safetensors, last."""
    made = embed_part(model, split, part)
    first = np.cumsum([0, *(len(item.captions) for item in made.items)]).tolist()
    items = [
        {
            "key": item.key,
            "image_id": sample_id(Path(file), item.key, item.record),
            "file": file,
            "offset": item.offset,
            "bytes": item.size,
            "text": text if item.captions else None,
            "captions": len(item.captions),
        }
        for file, item, text in zip(made.files, made.items, first, strict=False)
    ]
    texts = pa.table({"caption": made.texts, "image": made.owner_M.tolist()}, schema=TEXT_COLUMNS)
    for suffix, table in ((ITEMS, pa.Table.from_pylist(items, schema=ITEM_COLUMNS)), (TEXTS, texts)):
        with appearing(stem.with_name(f"{stem.name}.{suffix}")) as file:
            pq.write_table(table, file)
    arrays = {"images": made.image_ND, "texts": made.text_MD}
    partial = stem.with_name(f"{stem.name}.tmp")
    save_file(
        {name: (array.half() if half else array).contiguous() for name, array in arrays.items()},
        partial,
        {"left_out": json.dumps(made.left_out)},
    )
    partial.replace(stem.with_name(f"{stem.name}.safetensors"))


def _join(out: Path, names: list[str], about: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """One file each of the parts' arrays and tables; then the parts go."""
    parts = [out / PARTS / name for name in names]
    shapes: dict[str, list[tuple[int, int]]] = {name: [] for name in ARRAYS}
    left_out: list[str] = []
    for part in parts:
        with _opened(part) as file:
            left_out += json.loads(file.metadata()["left_out"])
            for name in ARRAYS:
                shapes[name].append(tuple(file.get_slice(name).get_shape()))
    width = max(width for _, width in shapes["images"])
    if not width:
        raise EvaluationError(f"{about['data']}: the split {about['split']} holds no image that decodes.")
    rows = {name: sum(rows for rows, _ in found) for name, found in shapes.items()}

    def blocks(name: str) -> Iterator[Array]:
        for part in parts:
            with _opened(part) as file:
                yield file.get_tensor(name)

    FORMS[about["format"]].write(out, {name: (count, width) for name, count in rows.items()}, dtype, blocks)
    _join_tables(out / ITEMS, parts, ITEM_COLUMNS, "text", [rows for rows, _ in shapes["texts"]])
    _join_tables(out / TEXTS, parts, TEXT_COLUMNS, "image", [rows for rows, _ in shapes["images"]])
    about |= {"images": rows["images"], "texts": rows["texts"], "width": width, "left_out": left_out}
    write_atomically(out / SEAL, json.dumps(about, indent=1).encode())
    shutil.rmtree(out / PARTS)
    log.info("%s: %d images and %d texts, %d wide; %d do not decode", out, *rows.values(), width, len(left_out))
    return about


def _join_tables(path: Path, parts: list[Path], columns: pa.Schema, shifted: str, counts: list[int]) -> None:
    """One group of rows a part; `shifted` holds rows of the other table, of which each part has so many."""
    place, first = columns.get_field_index(shifted), 0
    with appearing(path) as file, pq.ParquetWriter(file, columns) as writer:
        for part, count in zip(parts, counts, strict=True):
            table = pq.ParquetFile(part.with_name(f"{part.name}.{path.name}")).read(use_threads=False)
            writer.write_table(table.set_column(place, shifted, pc.add(table.column(place), first)))
            first += count


@contextlib.contextmanager
def _opened(part: Path) -> Iterator[Any]:
    with safe_open(str(part.with_name(f"{part.name}.safetensors")), "np") as file:
        yield file

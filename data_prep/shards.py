"""Records → one tar with its table: verified images, cleaned texts, the same bytes for the same input.

A shard is one task: it can be made alone, on any machine, and made again. Files get their final names when they are
complete, the task's result (`Made`) last; a build that was killed redoes the tasks without a result, and those whose
files are not what the result says.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import platform
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.captions import TextRules, Texts, clean_texts
from data_prep.images import BadImage, StoredImage, prepare
from data_prep.leakage import HeldOut
from data_prep.locations import appearing, is_local, read_bytes
from data_prep.manifest import Shard, sha256, table_of, write_atomically
from data_prep.record import TRAIN, Record
from data_prep.scores import without

# Where the tasks' results lie while a build is under way, and what train shards must not contain.
BUILD = ".build"


@dataclass(frozen=True)
class Task:
    """One shard to make.

    Attributes:
        out: the dataset's folder.
        scratch: a folder that only the process which gave the task writes to, with its workers: what it makes grows
            there.
        tar: the shard's name below it, such as train/00000.tar.
        keys: a name for each record, unique in its split.
        resize: see `data_prep.images.prepare`.
        rules: of its texts.
        held_out: sha256 of the images that this shard must not contain (`held_out_file`); empty where there are none.
        low: for each record the texts that fit it too little, see `data_prep.scores`; empty where there are none.
    """

    out: Path
    scratch: Path
    tar: str
    split: str
    records: tuple[Record, ...]
    keys: tuple[str, ...]
    resize: int | None
    rules: TextRules
    held_out: str = ""
    low: tuple[frozenset[str], ...] = ()

    @property
    def result(self) -> Path:
        return self.out / BUILD / (self.tar.replace("/", "_") + ".json")

    def identity(self) -> str:
        """The hash of all that decides the shard's bytes but the image files."""
        content = (self.tar, self.split, self.records, self.keys, self.resize, self.rules, self.held_out, tools())
        low = [list(map(sorted, self.low))] if any(self.low) else []
        # Where images that came as bytes were put for now does not matter.
        text = repr((*content, *low)).replace(repr(str(self.scratch))[1:-1], "")
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Made:
    """What became of a task.

    Attributes:
        table: sha256 of the table beside the shard.
        kept: images by source.
        dropped: one {image_id, source, split, reason, detail} for each image or text left out.
        scrubbed: e-mail addresses, phone numbers and URLs taken out of texts.
        files, looks: hashes of an evaluation set's images, and (perceptual hash, thumbnail in hex) of each: what the
            guard against leaks compares with.
        found: whether an earlier run, or another part, had made it.
    """

    identity: str
    shard: Shard
    table: str
    kept: Mapping[str, int]
    dropped: tuple[Mapping[str, str], ...]
    scrubbed: Mapping[str, int]
    files: tuple[str, ...]
    looks: tuple[tuple[str, str], ...]
    found: bool = False


def make(task: Task) -> Made:
    """Make a shard, or return the result of an earlier run that left it whole."""
    done = _earlier_result(task)
    if done:
        return done
    rows: list[dict[str, Any]] = []
    dropped: list[Mapping[str, str]] = []
    scrubbed: Counter[str] = Counter()
    files: set[str] = set()
    looks: set[tuple[str, str]] = set()

    def drop(record: Record, reason: str, detail: str = "") -> None:
        where = {"image_id": record.image_id, "source": record.source, "split": record.split}
        dropped.append({**where, "reason": reason, "detail": detail})

    path = task.out / task.tar
    held_out = _held_out(held_out_file(task.out, task.held_out)) if task.held_out else HeldOut()
    with appearing(path, task.scratch) as file:
        with tarfile.open(fileobj=file, mode="w|") as tar:
            lows = task.low or (frozenset[str](),) * len(task.records)
            for key, record, low in zip(task.keys, task.records, lows, strict=True):
                cleaned = without(clean_texts(record, task.rules), low)
                scrubbed.update(cleaned.scrubbed)
                for reason, text in cleaned.dropped:
                    drop(record, reason, text[:200])
                if not _is_usable(record, cleaned):
                    drop(record, "no_text")
                    continue
                try:
                    image = prepare(_read(record), task.resize)
                except BadImage as error:
                    # Images that came as bytes lie in a file that nobody will find again.
                    drop(record, str(error), "" if task.scratch in record.path.parents else str(record.path))
                    continue
                if leak := held_out.reason_against(image):
                    drop(record, leak)
                    continue
                for extension, data in sorted({image.extension: image.data, **members(record, cleaned, image)}.items()):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                rows.append(_row(key, record, cleaned, image, task.rules.scrub))
                if record.evaluation:
                    files |= {image.sha256, image.original_sha256}
                    looks.add((image.perceptual_hash, image.thumbnail.hex()))
        file.flush()
        digest, size = sha256(Path(file.name)), file.tell()
        table = write_table(task.out / table_of(task.tar), rows, task.scratch)
    shard = Shard(
        split=task.split,
        name=task.tar,
        bytes=size,
        sha256=digest,
        samples=len(rows),
        captions=sum(len(row["captions"]) for row in rows),
    )
    kept = dict(Counter(row["source"] for row in rows))
    made = Made(
        task.identity(), shard, table, kept, tuple(dropped), dict(scrubbed), tuple(sorted(files)), tuple(sorted(looks))
    )
    write_atomically(task.result, json.dumps(asdict(made)).encode(), task.scratch)
    return made


def held_out_file(out: Path, sha256: str) -> Path:
    """Where the images with this hash lie, which train shards must not contain."""
    return out / BUILD / f"{sha256}.npz"


@functools.lru_cache(maxsize=1)
def _held_out(path: Path) -> HeldOut:
    return HeldOut.load(path)


@functools.cache
def tools() -> dict[str, str]:
    """The versions of what bytes depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("pillow", "pyarrow")}
    return {"python": platform.python_version(), **packages}


def members(record: Record, cleaned: Texts, image: StoredImage) -> dict[str, bytes]:
    """The members beside the image: `json`, and `txt` or `cls` as the split's readers expect them."""
    about = {
        "captions": cleaned.captions,
        "statements": cleaned.statements,
        "questions": list(record.questions),
        "image_id": record.image_id,
        "source": record.source,
        "split": record.split,
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        "license": record.license,
        "sha256": image.sha256,
    }
    found = {"json": json.dumps(about, ensure_ascii=False).encode("utf-8", "replace")}
    kind = record.evaluation.kind if record.evaluation else TRAIN
    if kind == "classification":
        found["cls"] = str(record.label).encode()
    elif kind == TRAIN:
        found["txt"] = (cleaned.captions or cleaned.statements)[0].encode()
    elif kind != "vqa":
        found["txt"] = "\n".join(cleaned.captions).encode()
    return found


def _is_usable(record: Record, cleaned: Texts) -> bool:
    kind = record.evaluation.kind if record.evaluation else TRAIN
    return {
        TRAIN: bool(cleaned.captions or cleaned.statements),
        "retrieval": bool(cleaned.captions),
        # The first caption is the right one: a set of others would be scored against a wrong one.
        "selection": len(cleaned.captions) == len(record.captions) > 1,
        "classification": record.label is not None,
        "vqa": bool(record.questions),
    }[kind]


def _read(record: Record) -> bytes:
    try:
        return read_bytes(record.path, record.span)
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("missing_file") from None
    except (OSError, ValueError):  # a folder, no permission, or a name that no file can have
        raise BadImage("unreadable_file") from None


def _row(key: str, record: Record, cleaned: Texts, image: StoredImage, scrub: bool) -> dict[str, Any]:
    return {
        "key": key,
        "image_id": record.image_id,
        "ids": list(record.ids),
        "source": record.source,
        "captions": cleaned.captions,
        # What was scrubbed is not to be kept.
        "original_captions": None if scrub or list(record.captions) == cleaned.captions else list(record.captions),
        "statements": cleaned.statements,
        "license": None if record.license is None else str(record.license),
        "width": image.width,
        "height": image.height,
        "bytes": len(image.data),
        "sha256": image.sha256,
        "original_sha256": image.original_sha256,
        "perceptual_hash": image.perceptual_hash,
        "thumbnail": image.thumbnail,
    }


def write_table(path: Path, rows: list[dict[str, Any]], within: Path | None = None) -> str:
    """Write the table of a shard's samples, and return its sha256; `within` as in `data_prep.locations.appearing`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words, text, number = pa.list_(pa.string()), pa.string(), pa.int64()
    types = {"key": text, "image_id": text, "ids": words, "source": text, "captions": words}
    types |= {"original_captions": words, "statements": words}
    types |= {"license": text, "width": number, "height": number, "bytes": number}
    types |= {"sha256": text, "original_sha256": text, "perceptual_hash": text, "thumbnail": pa.binary()}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(types)), buffer)
    write_atomically(path, buffer.getvalue(), within)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _earlier_result(task: Task) -> Made | None:
    try:
        stored = json.loads(task.result.read_text(encoding="utf-8"))
        if stored["identity"] != task.identity():
            return None
    except (FileNotFoundError, ValueError):
        return None
    looks = tuple(map(tuple, stored["looks"]))
    made = Made(**{**stored, "shard": Shard(**stored["shard"]), "looks": looks, "found": True})
    tar, table = task.out / task.tar, task.out / table_of(task.tar)
    whole = tar.is_file() and tar.stat().st_size == made.shard.bytes and table.is_file()
    # Several machines may have written here. An object store, which puts files whole, is not read again for it.
    whole = whole and (not is_local(tar) or (sha256(tar), sha256(table)) == (made.shard.sha256, made.table))
    return made if whole else None

"""A sharded dataset as one page that a person can look at: counts, distributions, pictures, near-duplicates."""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
import itertools
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest
from data_prep.leakage import THUMBNAIL_BYTES, alike
from data_prep.locations import open_file
from data_prep.manifest import Dataset, Shard, Shards
from data_prep.record import TRAIN

PICTURES = {TRAIN: 24}
PICTURES_OF_OTHERS = 6
PICTURE_SIDE = 160
WORDS = 40
GROUPS, GROUP_PICTURES = 8, 6
# Looks of so many train images are compared, those with the lowest hashes of their keys: every pair is looked at.
COMPARED = 20_000
COLUMNS = ["key", "captions", "statements", "width", "height", "perceptual_hash", "thumbnail"]


@dataclass(order=True)
class Pick:
    """A sample, by the hash of its key: an even draw that needs no random numbers."""

    order: bytes
    key: str = field(compare=False)
    shard: str = field(compare=False)
    row: dict[str, Any] = field(compare=False)


def write(path: Path, shards: Sequence[Shard], content: dict[str, Any]) -> None:
    """Write the page of a dataset whose shards are there and whose manifest is about to be written."""
    dataset = Dataset(path, content["name"], Shards.of(shards), (), content)
    manifest.write_atomically(path / manifest.PAGE, render(dataset).encode())


def render(dataset: Dataset) -> str:
    """The page, the same for the same dataset."""
    import jinja2

    lengths: Counter[int] = Counter()
    sides: Counter[int] = Counter()
    words: Counter[str] = Counter()
    shown: dict[str, list[Pick]] = {}
    looks: list[Pick] = []
    for split in dict.fromkeys(shard.split for shard in dataset.shards):
        picks: list[Pick] = []
        for pick in _rows(dataset, split):
            texts = [*pick.row["captions"], *pick.row["statements"]]
            sides[min(pick.row["width"], pick.row["height"])] += 1
            if split == TRAIN:
                lengths.update(len(text.split()) for text in texts)
                words.update(word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower()))
                _keep_lowest(looks, pick, COMPARED)
            _keep_lowest(picks, pick, PICTURES.get(split, PICTURES_OF_OTHERS))
        shown[split] = _in_order(picks)
    groups = _near_duplicates(_in_order(looks))
    shown_groups = [group[:GROUP_PICTURES] for group in groups[:GROUPS]]
    images = _images(dataset, itertools.chain(*shown.values(), *shown_groups))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    return environment.get_template(manifest.PAGE).render(
        name=dataset.name,
        splits=dataset.manifest["splits"],
        counts=dataset.manifest["counts"],
        lengths=_histogram(lengths, "words a text"),
        sides=_histogram(sides, "shorter side, pixels"),
        words=words.most_common(WORDS),
        pictures={split: _pictures(picks, images) for split, picks in shown.items()},
        compared=len(looks),
        duplicates=sum(map(len, groups)),
        groups=[_pictures(picks, images) for picks in shown_groups],
        group_count=len(groups),
    )


def _rows(dataset: Dataset, split: str) -> Iterator[Pick]:
    for shard in dataset.split(split):
        for row in manifest.read_table(dataset.path / manifest.table_of(shard.name), COLUMNS):
            yield Pick(_inverted(hashlib.sha256(row["key"].encode()).digest()), row["key"], shard.name, row)


def _inverted(digest: bytes) -> bytes:
    """heapq drops the lowest: so the lowest hashes are kept by keeping the highest of these."""
    return bytes(255 - value for value in digest[:16])


def _keep_lowest(heap: list[Pick], pick: Pick, size: int) -> None:
    if len(heap) < size:
        heapq.heappush(heap, pick)
    else:
        heapq.heappushpop(heap, pick)


def _in_order(picks: list[Pick]) -> list[Pick]:
    return sorted(picks, reverse=True)


def _near_duplicates(picks: list[Pick]) -> list[list[Pick]]:
    """Groups of images that look alike, the largest first."""
    if not picks:
        return []
    hash_N = np.array([int(pick.row["perceptual_hash"], 16) for pick in picks], dtype=np.uint64)
    thumbnail_NP: NDArray[np.uint8] = np.frombuffer(b"".join(pick.row["thumbnail"] for pick in picks), np.uint8)
    thumbnail_NP = thumbnail_NP.reshape(-1, THUMBNAIL_BYTES)
    leader = list(range(len(picks)))

    def first(number: int) -> int:
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    for number, pick in enumerate(picks):
        for other in alike(pick.row["perceptual_hash"], pick.row["thumbnail"], hash_N, thumbnail_NP):
            leader[first(int(other))] = first(number)
    groups: dict[int, list[Pick]] = defaultdict(list)
    for number, pick in enumerate(picks):
        groups[first(number)].append(pick)
    found = [sorted(group, key=lambda pick: pick.key) for group in groups.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group[0].key))


def _pictures(picks: Sequence[Pick], images: dict[str, str]) -> list[dict[str, Any]]:
    """Key, first text and a small picture of each."""
    return [
        {
            "key": pick.key,
            "text": next(iter([*pick.row["captions"], *pick.row["statements"]]), ""),
            "image": images[pick.key],
        }
        for pick in picks
    ]


def _images(dataset: Dataset, picks: Iterable[Pick]) -> dict[str, str]:
    """Key → a small JPEG, in base64; each shard is gone through once, as far as the last picture wanted of it."""
    from PIL import Image

    wanted: dict[str, set[str]] = defaultdict(set)
    for pick in picks:
        wanted[pick.shard].add(pick.key)
    found = {}
    for shard, keys in wanted.items():
        with open_file(dataset.path / shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while keys:
                member = tar.next()
                assert member, f"{shard} has no image for {keys}"
                key, _, extension = member.name.partition(".")
                if key not in keys or extension not in ("jpg", "png", "webp"):
                    continue
                content = tar.extractfile(member)
                assert content
                with Image.open(io.BytesIO(content.read())) as image:
                    small = image.convert("RGB")
                small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=80)
                found[key] = base64.b64encode(buffer.getvalue()).decode()
                keys.remove(key)
    return found


def _histogram(counts: Counter[int], label: str) -> str:
    """An SVG image, in base64."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "data_prep", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.2), layout="constrained")
        axes = figure.subplots()
        if counts:
            bins = min(40, max(counts) - min(counts) + 1)
            axes.hist(list(counts), weights=list(counts.values()), bins=bins, color="#4477aa")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()

"""Sample data: generated scenes in the official layouts of COCO, VQA v2 and Flickr30K, and evaluation folders.

ROOT/mscoco/       COCO 2014 captions, and VQA v2 questions on half of the images
ROOT/flickr30k/    Flickr30K with Karpathy's file and the original .token file
ROOT/images/       zero-shot classification of colour-shape pairs, seen and never seen in training, and caption
                   selection sets that ask for one thing each: binding, relation, position, number
ROOT/sample.json   the options, written last
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import executor
from data_prep.manifest import write_atomically
from data_prep.record import DataError
from data_prep.sources import sample_scenes as scenes
from data_prep.sources.sample_scenes import PAIRS, SEEN, UNSEEN_TEST, UNSEEN_VAL, Pair, Scene

VERSION = 2
MARKER = "sample.json"
CHUNK = 250

# No article: it would have to fit both "red star" and "orange star".
TEMPLATES = ("one {c}", "there is one {c}", "a picture of one {c}")

# Ids as large as the real ones, and apart: COCO's integers, and two stretches of Flickr photo ids.
COCO_TRAIN, COCO_VAL, FLICKR_OF_COCO, FLICKR = 100_000, 500_000, 6_000_000_000, 1_000_000_000

COCO_LICENSE = {"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}


@dataclass(frozen=True)
class Batch:
    """Some images to draw: (file, what decides its scene), all of one kind."""

    root: Path
    kind: str
    seed: int
    files: tuple[str, ...]
    pairs: tuple[Pair, ...]
    first: int


def write(
    root: Path, *, images: int, seed: int, workers: int, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Write sample data with `images` train images; the same options give the same bytes, whatever `workers`.

    Returns at once where the same data is there already. `progress` hears how many images are drawn.

    Raises:
        DataError: fewer than 20 images, or `root` holds sample data of other options.
    """
    if images < 20:
        raise DataError(f"--images {images}: at least 20 are needed to fill every split.")
    options = {"version": VERSION, "images": images, "seed": seed}
    if (root / MARKER).is_file():
        found = json.loads((root / MARKER).read_text(encoding="utf-8"))
        if found == options:
            return
        raise DataError(f"{root} holds sample data made with {found}, not {options}. Choose another folder.")
    coco_train = images * 3 // 5
    held_out = min(200, max(12, images // 100))
    counts = {"train": images - coco_train, "val": held_out, "test": held_out}
    plan = [
        ("coco_train", [f"mscoco/train2014/COCO_train2014_{COCO_TRAIN + i:012d}.jpg" for i in range(coco_train)]),
        ("coco_val", [f"mscoco/val2014/COCO_val2014_{COCO_VAL + i:012d}.jpg" for i in range(held_out)]),
        ("flickr30k", [f"flickr30k/flickr30k-images/{FLICKR + i}.jpg" for i in range(sum(counts.values()))]),
    ]
    batches = [batch for kind, files in plan for batch in _batches(root, kind, seed, files, SEEN)]
    batches += [batch for name in EVALUATION_SETS for batch in _evaluation_batches(root, name, seed, held_out)]
    drawn: dict[str, list[dict[str, Any]]] = {}
    done = 0
    for batch, described in zip(batches, executor.run(_draw, batches, workers), strict=True):
        drawn.setdefault(batch.kind, []).extend(described)
        done += len(described)
        progress(min(done, images))
    _write_coco(root / "mscoco", "train2014", drawn["coco_train"], COCO_TRAIN)
    _write_coco(root / "mscoco", "val2014", drawn["coco_val"], COCO_VAL)
    _write_flickr(root / "flickr30k", drawn["flickr30k"], counts)
    for name in EVALUATION_SETS:
        _write_evaluation_set(root / "images" / name, drawn[name])
    _write_json(root / MARKER, options)


def _batches(root: Path, kind: str, seed: int, files: Sequence[str], pairs: tuple[Pair, ...]) -> Iterator[Batch]:
    for first in range(0, len(files), CHUNK):
        yield Batch(root, kind, seed, tuple(files[first : first + CHUNK]), pairs, first)


def _evaluation_batches(root: Path, name: str, seed: int, held_out: int) -> Iterator[Batch]:
    pairs = CLASSIFICATION.get(name)
    if not pairs:
        return _batches(root, name, seed, [f"images/{name}/{i:05d}.jpg" for i in range(held_out)], SEEN)
    each = max(2, 3 * held_out // (2 * len(pairs)))
    files = [f"images/{name}/{' '.join(pair)}/{i:05d}.jpg" for pair in pairs for i in range(each)]
    return _batches(root, name, seed, files, pairs)


def _draw(batch: Batch) -> list[dict[str, Any]]:
    """Draw a batch's images, and return what the annotation files say of each."""
    described = []
    purpose = zlib.crc32(batch.kind.encode())
    for index, file in enumerate(batch.files, start=batch.first):
        random = np.random.default_rng([batch.seed, purpose, index])
        scene, about = EVALUATION_SETS.get(batch.kind, _captioned)(random, batch.pairs, file)
        path = batch.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scenes.render(scene, random))
        described.append({"file": file, "things": [thing.pair for thing in scene.things], **about})
    return described


def _captioned(random: scenes.Random, pairs: Sequence[Pair], file: str) -> tuple[Scene, dict[str, Any]]:
    scene = scenes.draw_scene(random, pairs)
    return scene, {"captions": scenes.captions(scene, random), "questions": scenes.questions(scene, random, pairs)}


def _single(random: scenes.Random, pairs: Sequence[Pair], file: str) -> tuple[Scene, dict[str, Any]]:
    """One thing, of the pair that the file's folder names."""
    color, _, shape = Path(file).parent.name.partition(" ")
    return scenes.draw_scene(random, [(color, shape)], count=1), {}


def _binding(random: scenes.Random, pairs: Sequence[Pair], file: str) -> tuple[Scene, dict[str, Any]]:
    """Two things; in the wrong caption they have swapped colours. Every pair is one that training has shown."""
    while True:
        scene = scenes.draw_scene(random, pairs, count=2, distinct=True)
        first, second = scene.things
        swapped = [(second.color, first.shape), (first.color, second.shape)]
        if first.color != second.color and first.shape != second.shape and set(swapped) <= set(pairs):
            wrong = " and ".join(scenes.article(" ".join(pair)) for pair in swapped)
            return scene, {"captions": [f"{scenes.article(first.name())} and {scenes.article(second.name())}", wrong]}


def _relations(random: scenes.Random, pairs: Sequence[Pair], file: str) -> tuple[Scene, dict[str, Any]]:
    scene = scenes.draw_scene(random, pairs, count=2, distinct=True)
    first, second = scene.things
    said = scenes.relation(first, second)
    form = f"{scenes.article(first.name())} {{}} {scenes.article(second.name())}"
    return scene, {"captions": [form.format(said), form.format(scenes.OPPOSITE[said])]}


def _position(random: scenes.Random, pairs: Sequence[Pair], file: str) -> tuple[Scene, dict[str, Any]]:
    scene = scenes.draw_scene(random, pairs, count=1)
    thing = scene.things[0]
    right = scenes.position(thing)
    wrong = sorted({place for place in PLACES if place != right})
    other = wrong[int(random.integers(len(wrong)))]
    return scene, {"captions": [f"{scenes.article(thing.name())} {place}" for place in (right, other)]}


def _count(random: scenes.Random, pairs: Sequence[Pair], file: str) -> tuple[Scene, dict[str, Any]]:
    """Two or three of one pair, against the other number."""
    pair, number = pairs[int(random.integers(len(pairs)))], int(random.integers(2, 4))
    scene = scenes.draw_scene(random, [pair], count=number)
    name = scenes.plural(" ".join(pair))
    return scene, {"captions": [f"{scenes.NUMBERS[said]} {name}" for said in (number, 5 - number)]}


_PLACES = itertools.product(("top", "", "bottom"), ("left", "", "right"))
PLACES = [f"near the {' '.join(filter(None, words))}" if any(words) else "in the middle" for words in _PLACES]

CLASSIFICATION = {"sample_seen_test": SEEN, "sample_unseen_val": UNSEEN_VAL, "sample_unseen_test": UNSEEN_TEST}

# Evaluation set → how its scenes are drawn; those that are not of CLASSIFICATION select captions.
EVALUATION_SETS: dict[str, Callable[[scenes.Random, Sequence[Pair], str], tuple[Scene, dict[str, Any]]]] = {
    **dict.fromkeys(CLASSIFICATION, _single),
    "sample_binding_test": _binding,
    "sample_relations_test": _relations,
    "sample_position_test": _position,
    "sample_count_test": _count,
}


def _write_coco(root: Path, split: str, drawn: list[dict[str, Any]], first: int) -> None:
    images, annotations = [], []
    questions, answers = [], []
    for number, item in enumerate(drawn):
        identity = first + number
        images.append(
            {
                "id": identity,
                "file_name": Path(item["file"]).name,
                "width": scenes.SIDE,
                "height": scenes.SIDE,
                "license": COCO_LICENSE["id"],
                "coco_url": f"http://images.cocodataset.org/{split}/{Path(item['file']).name}",
                "flickr_url": f"http://farm1.staticflickr.com/1/{FLICKR_OF_COCO + identity}_0_z.jpg",
                "date_captured": "2026-01-01 00:00:00",
            }
        )
        for index, caption in enumerate(item["captions"]):
            annotations.append({"image_id": identity, "id": identity * scenes.CAPTIONS + index, "caption": caption})
        for index, asked in enumerate(item["questions"] if number % 2 == 0 else []):
            common = {"image_id": identity, "question_id": identity * 1000 + index}
            questions.append({**common, "question": asked["question"]})
            answers.append({**common, **{key: value for key, value in asked.items() if key != "question"}})
    info = {"description": "Generated scenes", "version": str(VERSION)}
    captions = {"info": info, "licenses": [COCO_LICENSE], "images": images, "annotations": annotations}
    _write_json(root / "annotations" / f"captions_{split}.json", captions)
    vqa = {"info": info, "data_type": "mscoco", "data_subtype": split}
    asked_file = {**vqa, "task_type": "Open-Ended", "questions": questions}
    _write_json(root / f"v2_OpenEnded_mscoco_{split}_questions.json", asked_file)
    _write_json(root / f"v2_mscoco_{split}_annotations.json", {**vqa, "annotations": answers})


def _write_flickr(root: Path, drawn: list[dict[str, Any]], counts: dict[str, int]) -> None:
    splits = [split for split, count in counts.items() for _ in range(count)]
    images, lines = [], []
    for number, (item, split) in enumerate(zip(drawn, splits, strict=True)):
        name = Path(item["file"]).name
        sentences = []
        for index, caption in enumerate(item["captions"]):
            lines.append(f"{name}#{index}\t{caption}\n")
            identity = number * scenes.CAPTIONS + index
            tokens = caption.replace(",", "").split()
            sentences.append({"tokens": tokens, "raw": caption, "imgid": number, "sentid": identity})
        identities = [sentence["sentid"] for sentence in sentences]
        images.append(
            {"sentids": identities, "imgid": number, "sentences": sentences, "split": split, "filename": name}
        )
    _write_json(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    write_atomically(root / "results_20130124.token", "".join(lines).encode())


def _write_evaluation_set(folder: Path, drawn: list[dict[str, Any]]) -> None:
    if folder.name in CLASSIFICATION:
        write_atomically(folder / "classnames.txt", "".join(f"{' '.join(pair)}\n" for pair in PAIRS).encode())
        write_atomically(folder / "templates.txt", "".join(f"{template}\n" for template in TEMPLATES).encode())
        return
    rows = [{"file_name": Path(item["file"]).name, "captions": item["captions"]} for item in drawn]
    write_atomically(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content).encode())

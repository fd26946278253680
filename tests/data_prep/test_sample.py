"""Sample data: the same bytes each time, official layouts, and no held-out composition anywhere in training."""

import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.record import DataError
from data_prep.sources import sample
from data_prep.sources import sample_scenes as scenes
from data_prep.sources.sample_scenes import COLORS, PAIRS, SEEN, SHAPES, UNSEEN_TEST, UNSEEN_VAL

IMAGES = 200
HELD_OUT = set(UNSEEN_VAL + UNSEEN_TEST)
SPLITS = ("train2014", "val2014")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    sample.write(folder, images=IMAGES, seed=3, workers=1)
    return folder


def load(root: Path, name: str) -> dict:
    return json.loads((root / name).read_text(encoding="utf-8"))


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pairs_named(text: str) -> set[tuple[str, str]]:
    """Every colour directly before a shape, in the singular or the plural."""
    found = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:e?s)?\b", text.lower())
    return {(color, shape) for color, shape in found}


# --- what is held out


def test_held_out_sets_are_halves_of_a_diagonal():
    """Each colour and each shape lacks one partner in training, whichever set it is in."""
    assert not set(UNSEEN_VAL) & set(UNSEEN_TEST)
    assert len(UNSEEN_VAL) == len(UNSEEN_TEST) == len(COLORS) // 2
    assert set(SEEN) == set(PAIRS) - HELD_OUT
    assert sorted(color for color, _ in HELD_OUT) == sorted(COLORS)
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)


def test_no_scene_has_a_held_out_pair():
    random = np.random.default_rng(0)
    drawn = [scenes.draw_scene(random, SEEN) for _ in range(500)]
    assert not HELD_OUT & {thing.pair for scene in drawn for thing in scene.things}
    assert {len(scene.things) for scene in drawn} == {1, 2, 3, 4}


def test_no_text_of_a_training_scene_names_a_held_out_pair():
    """Also not in denial: `Is there a red star?` would give the pair away."""
    random = np.random.default_rng(1)
    texts = []
    for _ in range(500):
        scene = scenes.draw_scene(random, SEEN)
        texts += scenes.captions(scene, random)
        for asked in scenes.questions(scene, random, SEEN):
            texts.append(asked["question"])
            # A question about a thing's color, answered, is a statement about the pair.
            subject = re.fullmatch(r"What (?:color is the (\w+)|shape is the (\w+) object)\?", asked["question"])
            for given in asked["answers"] if subject else []:
                shape, color = subject.groups()
                texts.append(f"{color or given['answer']} {shape or given['answer']}")
    assert {pair for text in texts for pair in pairs_named(text)} == set(SEEN)


def test_no_written_training_file_names_a_held_out_pair(root):
    unseen = ("images/sample_unseen_val/", "images/sample_unseen_test/")
    # Every set is classified among all names, so these lists hold them by design.
    texts = {
        name: content.decode()
        for name, content in files(root).items()
        if not name.endswith((".jpg", "classnames.txt")) and not name.startswith(unseen)
    }
    assert len(texts) > 10
    assert not {name for name, text in texts.items() if pairs_named(text) & HELD_OUT}


@pytest.mark.parametrize(("name", "pairs"), list(sample.CLASSIFICATION.items()))
def test_classification_sets_hold_their_pairs_and_all_names(root, name, pairs):
    folder = root / "images" / name
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {" ".join(pair) for pair in pairs}
    assert (folder / "classnames.txt").read_text().splitlines() == [" ".join(pair) for pair in PAIRS]
    assert all("{c}" in line for line in (folder / "templates.txt").read_text().splitlines())


def named(text: str) -> set[str]:
    return {shape for shape in SHAPES if shape in text}


@pytest.mark.parametrize(
    "texts",
    [
        lambda scene, random: [{thing.shape for thing in scene.things}],
        lambda scene, random: [named(text) for text in scenes.captions(scene, random)],
        lambda scene, random: [
            named(text) for text in scenes.captions(scene, random) if not any(color in text for color in COLORS)
        ],
    ],
    ids=["scenes", "captions", "captions without colors"],
)
def test_halves_of_held_out_pairs_meet_as_often_as_those_of_seen_pairs(texts):
    """Less often, and `red` would speak against `star` merely because no red star was drawn; more often, and it would
    give the red star away without a look at its shape. So in the pictures, and between pictures and their captions."""
    random = np.random.default_rng(2)
    together, colors, shapes, drawn = Counter(), Counter(), Counter(), 0
    for _ in range(4000):
        scene = scenes.draw_scene(random, SEEN)
        present_colors = {thing.color for thing in scene.things}
        for present_shapes in texts(scene, random):
            drawn += 1
            colors.update(present_colors)
            shapes.update(present_shapes)
            together.update((color, shape) for color in present_colors for shape in present_shapes)
    lift = {pair: together[pair] * drawn / colors[pair[0]] / shapes[pair[1]] for pair in PAIRS}
    held_out, seen = (np.mean([lift[pair] for pair in pairs]) for pairs in (HELD_OUT, SEEN))
    assert held_out == pytest.approx(seen, rel=0.1)


# --- layouts


@pytest.mark.parametrize("split", SPLITS)
def test_coco_layout(root, split):
    coco = load(root, f"mscoco/annotations/captions_{split}.json")
    assert {"info", "licenses", "images", "annotations"} <= set(coco)
    counts = Counter(annotation["image_id"] for annotation in coco["annotations"])
    assert counts == {image["id"]: scenes.CAPTIONS for image in coco["images"]}
    assert len({annotation["id"] for annotation in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        assert image["file_name"] == f"COCO_{split}_{image['id']:012d}.jpg"
        with Image.open(root / "mscoco" / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert picture.format == "JPEG"


def test_photo_ids_differ_between_splits_and_sources(root):
    coco = [image for split in SPLITS for image in load(root, f"mscoco/annotations/captions_{split}.json")["images"]]
    of_coco = [re.search(r"/(\d+)_\w+_z\.jpg", image["flickr_url"])[1] for image in coco]
    of_flickr = [path.stem for path in (root / "flickr30k/flickr30k-images").iterdir()]
    assert len(set(of_coco + of_flickr)) == len(of_coco) + len(of_flickr)
    assert len({image["id"] for image in coco}) == len(coco)


def test_flickr30k_layout(root):
    karpathy = load(root, "flickr30k/dataset_flickr30k.json")
    assert karpathy["dataset"] == "flickr30k"
    splits = Counter(image["split"] for image in karpathy["images"])
    assert set(splits) == {"train", "val", "test"}
    assert splits["val"] == splits["test"]
    lines = (root / "flickr30k/results_20130124.token").read_text().splitlines()
    by_file = dict(line.split("\t") for line in lines)
    for image in karpathy["images"]:
        assert (root / "flickr30k/flickr30k-images" / image["filename"]).is_file()
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        for number, sentence in enumerate(image["sentences"]):
            assert by_file[f"{image['filename']}#{number}"] == sentence["raw"]
            assert sentence["tokens"] == re.findall(r"\w+", sentence["raw"])
            assert sentence["imgid"] == image["imgid"]


@pytest.mark.parametrize("split", SPLITS)
def test_vqa_form(root, split):
    questions = load(root, f"mscoco/v2_OpenEnded_mscoco_{split}_questions.json")["questions"]
    annotations = load(root, f"mscoco/v2_mscoco_{split}_annotations.json")["annotations"]
    keys = [(entry["image_id"], entry["question_id"]) for entry in questions]
    assert keys
    assert keys == [(entry["image_id"], entry["question_id"]) for entry in annotations]
    assert len({question for _, question in keys}) == len(keys)
    assert {image for image, _ in keys} < {
        image["id"] for image in load(root, f"mscoco/annotations/captions_{split}.json")["images"]
    }
    for entry in annotations:
        assert [given["answer_id"] for given in entry["answers"]] == list(range(1, 11))
        assert {given["answer_confidence"] for given in entry["answers"]} <= {"yes", "maybe", "no"}
        assert entry["answer_type"] in ("yes/no", "number", "other")
        majority = Counter(given["answer"] for given in entry["answers"]).most_common(1)[0][0]
        assert entry["multiple_choice_answer"] == majority
    agreement = [max(Counter(given["answer"] for given in entry["answers"]).values()) for entry in annotations]
    assert np.mean(agreement) > 8
    assert min(agreement) < 10


@pytest.mark.parametrize("name", [name for name in sample.EVALUATION_SETS if name not in sample.CLASSIFICATION])
def test_caption_selection_sets_have_one_right_caption_first(root, name):
    folder = root / "images" / name
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in rows) == sorted(path.name for path in folder.glob("*.jpg"))
    assert all(len(row["captions"]) == len(set(row["captions"])) == 2 for row in rows)


def test_wrong_captions_of_the_binding_set_say_the_same_words():
    """Whoever only sees which words are true of the picture must be at chance."""
    random = np.random.default_rng(4)
    for _ in range(50):
        _, about = sample.EVALUATION_SETS["sample_binding_test"](random, SEEN, "0.jpg")
        right, wrong = ({word for pair in pairs_named(caption) for word in pair} for caption in about["captions"])
        assert right == wrong


def test_relations_are_what_the_eye_sees():
    def thing(x: float, y: float) -> scenes.Thing:
        return scenes.Thing("red", "star", "small", x, y, 10)

    assert scenes.relation(thing(10, 30), thing(50, 31)) == "left of"
    assert scenes.relation(thing(30, 50), thing(31, 10)) == "below"
    assert scenes.position(thing(10, 10)) == "near the top left"
    assert scenes.position(thing(32, 32)) == "in the middle"


@pytest.mark.parametrize(("color", "shape"), PAIRS)
def test_the_picture_shows_the_color(color, shape):
    thing = scenes.Thing(color, shape, "large", 32, 32, 17)
    picture = Image.open(io.BytesIO(scenes.render(scenes.Scene((thing,), "dark"), np.random.default_rng(0))))
    pixels = np.asarray(picture, dtype=float).reshape(-1, 3)
    colored = pixels[np.ptp(pixels, axis=1) > 80]
    assert 0.05 < len(colored) / len(pixels) < 0.5

    def chroma(values):
        gray_free = values - values.mean(axis=1, keepdims=True)
        return gray_free / np.linalg.norm(gray_free, axis=1, keepdims=True)

    nearest = (chroma(colored) @ chroma(np.array(list(COLORS.values()), dtype=float)).T).argmax(axis=1)
    assert (nearest == list(COLORS).index(color)).mean() > 0.9


# --- reproducible


def test_bytes_do_not_depend_on_the_number_of_workers(root, tmp_path):
    sample.write(tmp_path / "again", images=IMAGES, seed=3, workers=2)
    assert files(tmp_path / "again") == files(root)


def test_another_seed_draws_other_images(root, tmp_path):
    sample.write(tmp_path, images=IMAGES, seed=4, workers=1)
    ours, theirs = (
        {hashlib.sha256(content).digest() for name, content in files(folder).items() if name.endswith(".jpg")}
        for folder in (root, tmp_path)
    )
    assert not ours & theirs


def test_all_images_differ(root):
    images = [content for name, content in files(root).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images)


def test_same_options_return_at_once_and_others_are_refused(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    sample.write(root, images=IMAGES, seed=3, workers=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(DataError, match="Choose another folder"):
        sample.write(root, images=IMAGES, seed=4, workers=1)


def test_progress_ends_at_the_number_asked_for(tmp_path):
    heard: list[int] = []
    sample.write(tmp_path, images=40, seed=0, workers=1, progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 40


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least 20"):
        sample.write(tmp_path, images=3, seed=0, workers=1)

"""Class folders and other foreign sets: which label each image has, and what cannot be measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.evaluate import class_texts, image_folder, sources
from pipeline.evaluate.measures import choose, open_set
from pipeline.evaluate.run import evaluate
from pipeline.evaluate.sets import EvaluationError
from tests.pipeline.tars import picture, write_tar
from tests.pipeline.test_during import data, one_thread, run  # noqa: F401 (fixtures)

NAMES = ["tench", "great white shark", "hen"]


def write_folder(root, files):
    """Class folders; `files` are CLASS/NAME → number of a picture."""
    root.mkdir(parents=True, exist_ok=True)
    for name, number in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def labelled(items):
    return {item.key: item.label for item in items}


def test_labels_are_the_sorted_folders_and_other_files_are_left_out(tmp_path):
    folder = write_folder(
        tmp_path / "f", {"b/1.JPEG": 1, "a/2.jpg": 2, "b/0.jpg": 3, "c_d/x.PNG": 4, ".hidden/x.jpg": 5}
    )
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / "a" / "._2.jpg").write_text("what macOS leaves")
    (source,) = sources.find(folder)
    assert (source.name, source.kind, source.class_names()) == ("f", "classification", ("a", "b", "c d"))
    assert labelled(source.items()) == {"a/2.jpg": 0, "b/0.jpg": 1, "b/1.JPEG": 1, "c_d/x.PNG": 2}
    assert source.templates() == ("a photo of a {c}.",)
    assert source.items()[0].open().mode == "RGB"


def test_numbered_folders_count_as_numbers(tmp_path):
    """ImageNet-V2's are 0 to 999: as words, 10 comes before 9."""
    folder = write_folder(tmp_path, {f"{number}/x.jpg": number for number in (0, 2, 9, 10)})
    assert image_folder.class_names(folder) == ("0", "2", "9", "10")
    eleven = [f"class {number}" for number in range(11)]
    assert labelled(image_folder.read(folder, eleven)) == {"0/x.jpg": 0, "2/x.jpg": 2, "9/x.jpg": 9, "10/x.jpg": 10}
    assert [item.label for item in image_folder.read(folder, eleven[:4])] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("folders", "names", "expected"),
    [
        (["n01", "n02", "n03"], NAMES, [0, 1, 2]),  # by place
        (["great_white_shark", "hen", "tench"], NAMES, [1, 2, 0]),  # by name, whatever the order
        (["Hen", "tench"], NAMES, [2, 0]),  # a class has no images
        (["0", "2"], NAMES, [0, 2]),
        (["1", "2", "3"], NAMES, [0, 1, 2]),
        (["n01", "n02", "n03"], ["sunglasses", "hen", "sunglasses"], [0, 1, 2]),  # as in ImageNet
        (["n01", "hen"], ["tench", "hen"], [0, 1]),
    ],
)
def test_folders_have_labels_by_name_by_number_or_by_place(tmp_path, folders, names, expected):
    assert image_folder.labels(tmp_path, folders, names) == expected


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        (["n01", "n02"], NAMES, "has 2 class folders, n01 to n02, and there are 3 names"),
        (["n01", "n02", "n03", "n04"], NAMES, "has 4 class folders"),
        (["1", "3"], NAMES, "has 2 class folders"),  # from 0 or from 1: nobody knows
        (["hen", "n02", "n03"], NAMES, "the folder hen would be the class 'tench'"),
    ],
)
def test_folders_that_do_not_fit_the_names_are_refused(tmp_path, folders, names, message):
    with pytest.raises(EvaluationError, match=message):
        image_folder.labels(tmp_path, folders, names)


def test_a_class_without_images_stays_a_class(tmp_path):
    folder = write_folder(tmp_path, {"a/x.jpg": 1, "c/x.jpg": 2})
    (folder / "b").mkdir()
    opened = open_set(*choose(folder))
    assert [item.label for item in opened.items] == [0, 2]
    assert opened.texts == ["a photo of a a.", "a photo of a b.", "a photo of a c."]


def test_what_is_no_set_says_what_was_looked_for(tmp_path):
    for folder in (tmp_path / "none", tmp_path, write_folder(tmp_path / "deep", {"val/hen/x.jpg": 1})):
        with pytest.raises(EvaluationError, match="looked for a dataset"):
            sources.find(folder)
    folder = write_folder(tmp_path / "f", {"a/x.jpg": 1})
    with pytest.raises(EvaluationError, match=r"no evaluation set other\. It has f"):
        choose(folder, ["other"])
    (folder / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(EvaluationError, match="has 1 class folders, a to a, and there are 2 names"):
        open_set(*choose(folder))


def test_imagenet_s_names_and_prompts_are_built_in():
    names = class_texts.class_names("imagenet")
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet paper")
    assert len(class_texts.templates("openai_imagenet")) == 80
    simple = class_texts.templates("simple")
    assert len(simple) == 7
    assert "itap of a {c}." in simple


def test_names_and_prompts_from_files(tmp_path):
    (tmp_path / "names").write_bytes("großer Hai\r\nHenne\n".encode())
    assert class_texts.class_names(str(tmp_path / "names")) == ("großer Hai", "Henne")
    (tmp_path / "prompts").write_text("a {} here\na {c} there\n")
    assert class_texts.templates(str(tmp_path / "prompts")) == ("a {c} here", "a {c} there")
    (tmp_path / "prompts").write_text("a photo\n")
    with pytest.raises(EvaluationError, match=r"'a photo' lacks \{c\}"):
        class_texts.templates(str(tmp_path / "prompts"))
    with pytest.raises(EvaluationError, match="neither a file nor one of imagenet"):
        class_texts.class_names("imagenet2")
    with pytest.raises(EvaluationError, match="neither a file nor one of openai_imagenet, simple"):
        class_texts.templates(str(tmp_path))


def benchmark(root, folder, names, prompts="a photo of a {c}.\n", kind=None):
    """The images of class folders in CLIP_benchmark's layout."""
    items = image_folder.read(folder, names)
    members = {}
    for number, item in enumerate(items):
        members |= {f"s{number:07d}.cls": str(item.label).encode(), f"s{number:07d}.jpg": item.read()}
    write_tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1\n")
    for name, text in {
        "classnames.txt": "\n".join(names) + "\n",
        "zeroshot_classification_templates.txt": prompts,
        "dataset_type.txt": kind,
    }.items():
        if text:
            (root / name).write_text(text)
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "animals", {f"{name}/{n}.jpg": n for n in range(12) for name in (f"n0{n % 3}",)})


def figures(record):
    return {name: record[name] for name in ("metrics", "intervals", "chance", "classes", "confusion", "images")}


def test_an_image_folder_gives_the_figures_of_the_same_images_in_tars(folder, run, tmp_path):  # noqa: F811
    """And so do the names and prompts that are given, as those that a set brings."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\nthe {}\n")
    code = main(
        [
            *("evaluate", str(run), "--data", str(folder), "--classnames", str(tmp_path / "names.txt")),
            *("--templates", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")),
        ]
    )
    assert code == 0
    ours = json.loads((tmp_path / "out" / "animals.json").read_text())
    assert ours["templates"] == ["a photo of a {c}.", "the {c}"]
    assert [one["name"] for one in ours["classes"]] == NAMES
    tars = benchmark(tmp_path / "tars", folder, NAMES, "a photo of a {c}.\nthe {c}\n")
    (theirs,) = evaluate(str(run), tars, out=tmp_path / "out")
    assert figures(json.loads(json.dumps(theirs))) == figures(ours)
    (tmp_path / "prompts.txt").write_text("{c}\n")
    (other,) = evaluate(str(run), tars, out=tmp_path / "out", templates=str(tmp_path / "prompts.txt"))
    assert other["data"] != theirs["data"]
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert {row.split(",")[3] for row in rows[1:]} == {"animals", "tars"}


def test_sets_in_clip_benchmark_s_layout_say_what_they_are(folder, tmp_path):
    names = NAMES
    assert sources.find(benchmark(tmp_path / "a", folder, names))[0].kind == "classification"
    assert sources.find(benchmark(tmp_path / "b", folder, names, kind="Retrieval\n"))[0].kind == "retrieval"
    with pytest.raises(EvaluationError, match="no evaluation set that can be measured, of 1"):
        choose(benchmark(tmp_path / "c", folder, names, kind="multilabel"))
    without = benchmark(tmp_path / "d", folder, names)
    (without / "classnames.txt").unlink()
    with pytest.raises(EvaluationError, match=r"classnames\.txt: looked for this file .* --classnames"):
        open_set(*choose(without))
    assert len(open_set(*choose(without, class_names="imagenet")).texts) == 1000


def test_names_must_be_as_many_as_the_set_has(folder, tmp_path):
    tars = benchmark(tmp_path / "tars", folder, NAMES)
    with pytest.raises(EvaluationError, match="has 3 classes, and 1000 names were given"):
        open_set(*choose(tars, class_names="imagenet"))
    (tars / "classnames.txt").unlink()
    (tmp_path / "two").write_text("a\nb\n")
    with pytest.raises(EvaluationError, match="labels run from 0 to 2, but 2 classes have names"):
        open_set(*choose(tars, class_names=str(tmp_path / "two")))


def test_names_and_prompts_are_for_one_classification_set(data):  # noqa: F811
    with pytest.raises(EvaluationError, match="are for one classification set"):
        choose(data, templates="simple")
    with pytest.raises(EvaluationError, match="pairs_test \\(retrieval\\)"):
        choose(data, ["pairs_test"], templates="simple")
    (chosen,) = choose(data, ["colors_test"], templates="simple")
    assert len(open_set(chosen).texts) == 3 * 7


def test_an_image_that_does_not_decode_is_named(folder):
    (folder / "n00" / "0.jpg").write_bytes(b"no jpeg")
    (source,) = sources.find(folder)
    with pytest.raises(EvaluationError, match=r"image n00/0\.jpg does not decode"):
        source.items()[0].open()


def test_a_webp_and_a_grey_png_are_images_too(tmp_path):
    (tmp_path / "a").mkdir()
    grey = Image.fromarray(np.zeros((5, 6), dtype=np.uint8))
    grey.save(tmp_path / "a" / "0.png")
    grey.save(tmp_path / "a" / "1.WEBP", "WEBP")
    assert [item.open().size for item in sources.find(tmp_path)[0].items()] == [(6, 5), (6, 5)]

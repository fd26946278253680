"""The page about a dataset: the manifest's figures, its pictures, and nothing that is run or fetched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from data_prep import manifest, report
from data_prep.__main__ import main
from tests.data_prep import layouts


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A caption that is markup, and two photos of which one is a copy, saved again."""
    root = tmp_path_factory.mktemp("page")
    layouts.flickr30k(root / "f", {"train": [1, 2], "test": [50, 51]})
    table = layouts.table(root / "t.csv", 4)
    rows = table.read_text().splitlines()[:-1]
    table.write_text("\n".join([*rows, "pictures/3.jpg,<script>alert(1)</script> & more"]) + "\n")
    with Image.open(root / "pictures/0.jpg") as image:
        image.save(root / "pictures/1.jpg", quality=60)
    (root / "pictures/2.jpg").write_bytes(b"no image")
    sources = f"flickr30k={root / 'f'}", f"table={table}"
    assert main(["build", *sources, "--out", str(root / "out"), "--workers", "1"]) == 0
    return root / "out"


def test_figures_are_those_of_the_manifest(data):
    page = (data / "report.html").read_text()
    for split, totals in manifest.read(data).manifest["splits"].items():
        row = re.search(rf"<tr><td>{split}<td>.*?</tr>", page, re.DOTALL)[0]
        for name in ("samples", "captions"):
            assert f">{totals[name]}" in row
    assert re.search(r"<td>table<td class=\"number\">4\s+<td class=\"number\">3\s+<td>not_an_image 1", page)


def test_texts_are_shown_and_not_run_and_nothing_is_fetched(data):
    page = (data / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "http" not in page
    assert page.count("data:image/jpeg;base64,") == 5 + 2 + 2  # train, test, and a group of two


def test_copies_within_train_are_a_group(data):
    page = (data / "report.html").read_text()
    assert "2 of 5 images compared look like another one; 1 groups." in page


def test_the_page_is_part_of_the_dataset_and_always_the_same(data):
    assert report.render(manifest.read(data)) == (data / "report.html").read_text()
    assert "report.html" in manifest.read(data).manifest["files"]
    assert main(["verify", str(data)]) == 0


def test_what_is_removed_is_not_shown_any_more(data):
    before = (data / "report.html").read_text()
    assert main(["remove", str(data), "flickr:1"]) == 0
    page = (data / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == before.count("data:image/jpeg;base64,") - 1
    assert report.render(manifest.read(data)) == page
    assert main(["verify", str(data)]) == 0

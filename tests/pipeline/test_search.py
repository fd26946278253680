"""Searches: the right matches first, from embeddings that are made once, and a page that needs no network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep.__main__ import main as prepare
from data_prep.locations import path_of
from data_prep.record import DataError
from pipeline import trained as loading
from pipeline.__main__ import main
from pipeline.evaluate import embeddings, search
from pipeline.evaluate.score import score
from pipeline.evaluate.search import nearest
from tests.data_prep.layouts import tree
from tests.pipeline import colors
from tests.pipeline.tars import write_tar
from tests.pipeline.test_during import one_thread, run  # noqa: F401 (fixtures)

PLANTED = 13


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Thirty red and blue pictures and a green one, and a model that knows colours, whatever it is called."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "load_any", lambda *given, **named: colors.model())
    names = ["green" if number == PLANTED else ("red", "blue")[number % 2] for number in range(31)]
    rows = [(name, [f"<b>{name}</b> [bold] {number}", f"{name} or so"]) for number, name in enumerate(names)]
    table = colors.write_table(tmp_path / "raw", rows)
    for number, name in enumerate(("red", "blue")):
        (tmp_path / "raw/sets/shown" / name).mkdir(parents=True)
        (tmp_path / "raw/sets/shown" / name / "x.png").write_bytes(colors.picture(name, 100 + number))
    sources = [f"table={table}", f"images={tmp_path / 'raw/sets'}", "--keep-near-duplicates"]
    out = ["--out", str(tmp_path / "data"), "--samples-per-shard", "8"]
    assert prepare(["build", *sources, *colors.COLUMNS, *out]) == 0
    return tmp_path / "data"


def test_a_planted_picture_is_found_and_shown(known, tmp_path, capsys):
    before = tree(known)
    page = tmp_path / "found.html"
    assert main(["search", "any", "something green", "--data", str(known), "--top", "3", "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert f"<b>green</b> [bold] {PLANTED}" in said
    assert str(page) in said.replace("\n", "")
    found = search.search("any", "something green", str(known), "train", top=3).images
    assert [match.caption.split()[0] for match in found[:1]] == ["<b>green</b>"]
    assert found[0].score > 0.95 > 0.6 > found[1].score
    tar, (offset, size) = (known.parent / found[0].place).read_bytes(), found[0].span
    assert tar[offset : offset + size] == colors.picture("green", PLANTED)
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 3
    assert "http" not in html
    assert "&lt;b&gt;green" in html
    assert tree(known) == before


def test_an_image_finds_images_and_captions_that_are_said_once(known, tmp_path):
    (tmp_path / "query.png").write_bytes(colors.picture("green", 99))
    found = search.search("any", str(tmp_path / "query.png"), str(known), "train", top=4)
    assert found.images[0].caption == f"<b>green</b> [bold] {PLANTED}"
    captions = [match.caption for match in found.texts]
    assert set(captions[:2]) == {f"<b>green</b> [bold] {PLANTED}", "green or so"}
    assert len(set(captions)) == 4
    assert found.page.read_text().count("data:image/jpeg;base64,") == 5
    (tmp_path / "notes.txt").write_text("red")
    with pytest.raises(DataError, match="does not decode"):
        search.search("any", str(tmp_path / "notes.txt"), str(known), "train")


def test_images_are_embedded_once_and_anew_for_another_split_or_data(known, tmp_path, monkeypatch):
    embed_part, calls = embeddings.embed_part, []
    monkeypatch.setattr(embeddings, "embed_part", lambda *given: calls.append(given[1].name) or embed_part(*given))
    for _ in range(2):
        search.search("any", "red", str(known), "train")
    trained = len(calls)
    assert set(calls) == {"train"}
    assert trained > 1
    first = search.search("any", "red", str(known), "shown", top=2)
    assert calls[trained:] == ["shown"]
    assert all(match.place.startswith(str(known / "eval" / "shown")) for match in first.images)
    folder = tmp_path / "kept"
    assert main(["embed", "any", "--data", str(known), "--out", str(folder), "--half"]) == 0
    del calls[:]
    kept = search.search("any", "green", str(known), "train", kept=folder, top=1)
    own = search.search("any", "green", str(known), "train", top=1)
    assert [match.key for match in kept.images] == [match.key for match in own.images]
    assert kept.page == folder / "search.html"
    assert calls == []
    with pytest.raises(DataError, match="another split: train, and asked for is shown"):
        search.search("any", "red", str(known), "shown", kept=folder)
    with pytest.raises(DataError, match="looked for embeddings"):
        search.search("any", "red", str(known), "train", kept=tmp_path / "nothing")


def test_a_run_keeps_embeddings_with_its_results(run, dataset):  # noqa: F811
    found = search.search(str(run), "picture number 3", str(dataset), "train", top=70)
    assert found.page.parent.parent == run / "eval" / "step-00000060" / "embeddings"
    assert [match.score for match in found.images] == sorted((match.score for match in found.images), reverse=True)
    assert len({match.key for match in found.images}) == 70


def test_images_without_captions_are_found_too(known, tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", {"a.png": colors.picture("red", 0), "b.png": colors.picture("blue", 0)})
    (tmp_path / "query.png").write_bytes(colors.picture("red", 5))
    found = search.search("any", str(tmp_path / "query.png"), str(tmp_path / "tars"), "train")
    assert [(match.key, match.caption) for match in found.images] == [("a", ""), ("b", "")]
    assert found.texts == []


def test_tars_behind_an_address_are_searched_and_scored_as_they_lie(known, tmp_path, bucket):
    for tar in (known / "train").glob("*.tar"):
        path_of(f"{bucket}/tars/{tar.name}").write_bytes(tar.read_bytes())
    there, here = (search.search("any", "green", data, "train") for data in (f"{bucket}/tars", str(known)))
    assert [(match.score, match.key) for match in there.images] == [(match.score, match.key) for match in here.images]
    assert there.images[0].place.startswith(f"{bucket}/tars/0000")
    pages = [found.page.read_text().partition('<div class="grid">')[2] for found in (there, here)]
    assert len({page.replace(f"{bucket}/tars", f"{known}/train") for page in pages}) == 1
    with pytest.raises(DataError, match="--out FOLDER"):
        score("any", f"{bucket}/tars")
    assert score("any", f"{bucket}/tars", tmp_path / "scores")["pairs"] == 62


@given(
    st.lists(st.sampled_from([(1, 0), (0, 1), (0.6, 0.8), (-0.8, 0.6), (0.8, 0.6)]), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(1, 7),
    st.integers(1, 40),
)
def test_nearest_is_what_sorting_everything_gives(rows, top, stretch, kinds):
    key_ND = F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1).numpy()
    bounds = np.array([*range(0, len(rows), stretch), len(rows)])
    query_D = torch.tensor([0.28, 0.96])
    score_N = (key_ND.astype(np.float64) @ query_D.double().numpy()).astype(np.float32)
    expected: dict[int, tuple[float, int]] = {}
    for row in np.argsort(-score_N, kind="stable").tolist():
        expected.setdefault(row % kinds, (float(score_N[row]), row))
    assert nearest(key_ND, bounds, query_D, top, lambda row: row % kinds) == list(expected.values())[:top]


def test_a_part_without_rows_at_the_end_is_passed_over(tmp_path):
    """As safetensors has it, `embed`'s own form: it gives no empty slice."""
    save_file({"images": torch.eye(2)}, tmp_path / "rows.safetensors")
    with safe_open(tmp_path / "rows.safetensors", "np") as file:
        found = nearest(file.get_slice("images"), np.array([0, 2, 2]), torch.eye(2)[1], 1, lambda row: row)
    assert found == [(1.0, 1)]

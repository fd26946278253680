"""Recipes: strict, explained, and refused when they would make a resumed run another one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from pipeline import config
from pipeline.config import RecipeError

MINIMAL = {
    "model": {"name": "ViT-B-32"},
    "train": {"steps": 10, "batch_size": 8},
}


def recipe(**sections):
    return config.parse({**MINIMAL, **sections}, "test")


def test_defaults_are_written_out_and_read_back():
    whole = recipe()
    assert config.parse(yaml.safe_load(whole.to_yaml()), "dump") == whole
    assert whole.loss.init_scale == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optim": {"learning_rate": 1}}, ["unknown key optim.learning_rate", "lr"]),
        ({"optm": {}}, ["unknown key optm", "Did you mean optim?"]),
        ({"optim": {"lr": -1}}, ["optim.lr", "greater than 0", "found -1"]),
        ({"model": {"name": "a", "config": {"embed_dim": 1}}}, ["model", "not both"]),
        ({"model": {"config": {"embed_dim": 1}}}, ["lacks", "text_cfg", "vision_cfg"]),
        ({"model": {"name": "a", "image_std": [0.5, 0, 0.5]}}, ["model.image_std.1", "greater than 0", "found 0"]),
        ({"train": {"steps": 3}}, ["train.batch_size is required"]),
        ({"data": {"fields": {"caption": 1.0}}}, ["caption", "captions", "statements"]),
        ({"data": {"crop_scale": [1.0, 0.5]}}, ["must ascend"]),
        ({"data": {"datasets": [{"pat": "a"}]}}, ["unknown key data.datasets.0.pat", "Did you mean path"]),
        ({"data": {"datasets": "a@-1"}}, ["data.datasets.0.weight", "greater than 0"]),
        (
            {"train": {"steps": 3, "batch_size": 8, "sharding": "fsdp2", "precision": "fp16"}},
            ["goes without train.precision=fp16", "bf16"],
        ),
        ({"checkpoint": {"keep": 1}}, ["checkpoint.keep", "greater than or equal to 2"]),
    ],
)
def test_a_mistake_is_named_with_the_value_and_the_fix(sections, words):
    with pytest.raises(RecipeError) as error:
        recipe(**sections)
    for word in words:
        assert word in str(error.value)


def test_settings_override_and_are_typed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    loaded = config.load(str(path), ["optim.lr=1e-3", "train.steps=20", "data.workers=0", "optim.clip_norm=null"])
    assert (loaded.optim.lr, loaded.train.steps, loaded.data.workers, loaded.optim.clip_norm) == (1e-3, 20, 0, None)
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        config.load(str(path), ["optim.lr"])
    with pytest.raises(RecipeError, match="Did you mean steps"):
        config.load(str(path), ["train.step=20"])


def test_a_model_s_file_stands_beside_what_it_said_in_a_run_only(tmp_path):
    path = tmp_path / "mine.yaml"
    described = {"embed_dim": 1, "vision_cfg": {}, "text_cfg": {}}
    path.write_text(yaml.safe_dump({**MINIMAL, "model": {"name": "mine.json", "config": described}}))
    assert config.load_file(path).model.config == described
    with pytest.raises(RecipeError, match=r"either `name` or `config`; found 'mine\.json' beside"):
        config.load(str(path))


def test_every_shipped_recipe_parses():
    names = [path.stem for path in config.RECIPES.glob("*.yaml")]
    assert "demo" in names
    for name in names:
        config.load(name)


def test_missing_recipes_are_named(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean demo"):
        config.load("demoo")
    with pytest.raises(RecipeError, match="no such file"):
        config.load(str(tmp_path / "none.yaml"))


def test_yaml_cannot_make_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("seed: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(RecipeError, match="plain YAML"):
        config.load(str(path))


def test_resume_may_change_length_and_place_only():
    stored = recipe()
    assert config.changes(stored, recipe(train={"steps": 99, "batch_size": 8, "threads": 2})) == []
    assert config.changes(stored, recipe(data={"workers": 7, "datasets": "elsewhere"})) == []
    assert config.changes(stored, recipe(optim={"lr": 0.1})) == ["optim.lr: 0.0005 -> 0.1"]
    assert config.changes(stored, recipe(seed=1)) == ["seed: 0 -> 1"]


def test_datasets_are_a_list_or_a_line_of_words(tmp_path):
    listed = recipe(data={"datasets": [{"path": "a"}, {"path": "s3://b/c", "weight": 0.5}]}).data.datasets
    assert recipe(data={"datasets": "a s3://b/c@0.5"}).data.datasets == listed
    assert [(one.path, one.weight) for one in listed] == [("a", 1.0), ("s3://b/c", 0.5)]
    spaced = tmp_path / "with a space"
    spaced.mkdir()
    assert [one.path for one in recipe(data={"datasets": str(spaced)}).data.datasets] == [str(spaced)]
    assert recipe(data={"datasets": "me@work/data"}).data.datasets[0].path == "me@work/data"


def test_a_recipe_is_checked_without_torch():
    code = "import sys, pipeline.config as c; c.load('demo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "word",
    [
        "data.datasets=https://me:S3CRET@host/{0..3}.tar",
        "data.datasets=/data/a https://host/{0..3}.tar?sig=S3CRET@2",
        "checkpoint.copy_to=s3://key:S3CRET@bucket/run",
        "https://me:S3CRET@host/a.tar",
    ],
)
def test_an_address_with_credentials_is_refused_without_repeating_them(tmp_path, word):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError) as refused:
        config.load(str(path), [word])
    assert "S3CRET" not in str(refused.value)
    if word.startswith(("data.", "checkpoint.")):
        assert str(refused.value).startswith(f"{word.partition('=')[0]} = ")
        assert "AWS_ACCESS_KEY_ID" in str(refused.value)

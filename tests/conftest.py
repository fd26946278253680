"""What several tests share: a small sharded dataset, and a recipe whose towers train on it in moments."""

from __future__ import annotations

import csv
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import settings
from PIL import Image

# In CI the same examples each time: a rare one is to be found at a desk, not to fail somebody else's change.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

SAMPLES = 70


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is known of shards, and copies of remote ones, are kept apart from those of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# LayerNorm only: results do not depend on how a batch is cut over ranks.
RECIPE = {
    "seed": 3,
    "data": {"workers": 1, "crop_scale": [0.6, 1.0]},
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        }
    },
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"steps": 15, "batch_size": 10, "threads": 1, "device": "cpu"},
    "checkpoint": {"every_steps": 4, "keep": 3},
    "tracking": {"tensorboard": False},
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 random pictures with two captions each, built by data_prep into train shards of 16."""
    from data_prep.__main__ import main

    root = tmp_path_factory.mktemp("dataset")
    random = np.random.default_rng(0)
    with (root / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "other"])
        for number in range(SAMPLES):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{number}.png")
            writer.writerow([f"{number}.png", f"picture number {number}", f"noise {number % 7} of {number // 7}"])
    columns = ["--image-column", "image", "--caption-column", "caption", "--caption-column", "other"]
    source = f"table={root / 'pairs.csv'}"
    assert main(["build", source, *columns, "--out", str(root / "out"), "--samples-per-shard", "16"]) == 0
    return root / "out"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """recipe(train={"steps": 3}) writes the small recipe with these changes, and returns its path."""

    def write(**changes: dict) -> Path:
        path = tmp_path / "recipe.yaml"
        merged = {**RECIPE, **{name: {**RECIPE.get(name, {}), **values} for name, values in changes.items()}}
        path.write_text(yaml.safe_dump(merged))
        return path

    return write


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """The address of an empty bucket, on a real S3 API."""
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    bucket = f"photos-{uuid.uuid4()}"
    files.mkdir(bucket)
    yield f"s3://{bucket}"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()

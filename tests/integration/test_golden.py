"""A hundred losses as they were when this file was written: what changes them unseen is found here.

python -m tests.integration.test_golden     # writes them anew, after a change that is meant
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.tracking import read_metrics
from tests.conftest import RECIPE
from tests.pipeline.tars import write_tars
from tests.processes import train

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 100


def losses(folder: Path) -> list[float]:
    """Of a run on generated tars, LayerNorm towers, one thread."""
    for path, size in zip(write_tars(folder / "tars", (40, 40)), (40, 40), strict=True):
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": size}))
    recipe = RECIPE | {"train": RECIPE["train"] | {"steps": STEPS}, "data": RECIPE["data"] | {"decoder": "exact"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train([str(folder / "recipe.yaml"), str(folder / "run"), "--data", str(folder / "tars")]) == 0
    return [line["loss"] for line in read_metrics(folder / "run")]


def test_a_hundred_losses_are_the_committed_ones_and_repeat_to_the_bit(tmp_path):
    (tmp_path / "again").mkdir()
    found = losses(tmp_path)
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)
    assert found[-1] < 0.9 * found[0]
    assert losses(tmp_path / "again") == found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(losses(Path(temporary)), indent=0) + "\n")

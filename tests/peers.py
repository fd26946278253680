"""Neighbouring tools' own code, run by the Python of an environment of theirs: what they make of our files."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = ROOT / ".peers" / "bin"
# albumentations asks the network for its newest version, and open_clip's hub for models, unless told not to.
ENVIRONMENT = {"NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1"}
CLIP_BENCHMARK = """
import sys
from unittest import mock
for name in ("tokenizer.ptbtokenizer", "bleu.bleu", "meteor.meteor", "rouge.rouge", "cider.cider", "spice.spice"):
    sys.modules["pycocoevalcap." + name] = mock.MagicMock()
from clip_benchmark.cli import main
main()
"""


def install() -> None:
    """Make the environment, or bring it up to date with tests/peers.txt."""
    # A test must not install into .venv, which it runs in, should pyproject.toml just have changed.
    command = ["make", "--old-file=.venv/.installed", "peers"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stdout}"


def environment() -> dict[str, str]:
    """This process's variables, less those that would bring our packages into theirs."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT


def clip_benchmark(model: Path, dataset: Path, out: Path, *options: object) -> list[str]:
    """Its command for a model in an open_clip folder and an evaluation set, in a process of its own: `out` is written.

    Its module for captioning imports a package of 100 MB that no other uses; empty ones stand in for that.
    """
    arguments = ["eval", "--pretrained_model", f"local-dir:{model},", "--dataset", f"wds/{dataset.name}"]
    arguments += ["--dataset_root", str(dataset), "--task", task(dataset), "--recall_k", "1", "5", "10"]
    arguments += ["--output", str(out), *map(str, options)]
    return [str(BIN / "python"), "-c", CLIP_BENCHMARK, *arguments]


def task(dataset: Path) -> str:
    """As CLIP_benchmark calls what is measured on a set in its layout."""
    kind = (dataset / "dataset_type.txt").read_text().strip() if (dataset / "dataset_type.txt").exists() else ""
    return "zeroshot_retrieval" if kind == "retrieval" else "zeroshot_classification"


def ask(script: str, *arguments: object, python: Path = BIN / "python", variables: Mapping[str, str] = {}) -> Any:
    """Run a Python script, and return what it has written, as JSON, to the file that sys.argv[1] names.

    `arguments` are sys.argv[2:]. The script runs in an empty folder, so that it sees our files only by their paths.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [python, "-c", script, answer, *map(str, arguments)],
            cwd=folder,
            env=environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return json.loads(answer.read_text())

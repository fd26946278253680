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


def install() -> None:
    """Make the environment, or bring it up to date with tests/peers.txt."""
    # A test must not install into .venv, which it runs in, should pyproject.toml just have changed.
    command = ["make", "--old-file=.venv/.installed", "peers"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stdout}"


def environment() -> dict[str, str]:
    """This process's variables, less those that would bring our packages into theirs."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT


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

"""The command line: exit codes, messages without tracebacks, and help that loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data_prep import executor
from data_prep.__main__ import main

COMMANDS = ("download", "build", "verify", "check", "remove", "show", "vocabulary", "sample")
HEAVY = {"torch", "pyarrow", "PIL", "numpy", "webdataset", "sentencepiece"}


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_loads_nothing_heavy(command):
    code = "import sys; from data_prep.__main__ import main; assert 'pydantic' not in sys.modules; "
    # Typer itself loads pydantic for a command's parameters.
    code += f"code = main({[*command, '--help']}); "
    code += f"print('loaded', sorted({HEAVY} & set(sys.modules))); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded []\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "/nowhere"],
        ["show", "/nowhere"],
        ["build", "cooc=/nowhere", "--out", "x"],
        ["build", "coco=/nowhere", "--out", "x"],
        ["vocabulary", "/nowhere", "--out", "x"],
        ["build"],
        ["nonsense"],
    ],
)
def test_a_users_mistake_is_two_and_one_message(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.strip()
    assert "Traceback" not in said


def double(number: int) -> int:
    return 2 * number


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_come_back_in_their_order(workers):
    assert list(executor.run(double, range(25), workers)) == [2 * number for number in range(25)]

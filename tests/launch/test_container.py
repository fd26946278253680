"""The image's recipe, as far as it can be checked without building it; and that what it installs is whole."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LINES = re.sub(r"\\\n", " ", (ROOT / "launch/Containerfile").read_text()).splitlines()


def arguments(instruction: str) -> list[str]:
    return [line.removeprefix(instruction).strip() for line in LINES if line.startswith(f"{instruction} ")]


def test_what_is_copied_is_there_and_is_not_ignored():
    """.dockerignore takes away all but what it names; podman reads it too."""
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    kept = {line.removeprefix("!") for line in rest if line.startswith("!")}
    assert first == "*"
    copied = {source for words in arguments("COPY") for source in words.split()[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_every_package_is_copied():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == {words.split()[0] for words in arguments("COPY") if "." not in words}


def test_it_runs_as_an_ordinary_user_and_signals_reach_what_it_runs():
    assert arguments("USER") == ["1000"]
    (entry,) = arguments("ENTRYPOINT")
    assert entry.startswith("[")  # not through a shell, which would keep signals for itself


def test_versions_are_those_that_are_tested():
    installs = [line for line in arguments("RUN") if line.startswith("pip install")]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


def test_extras_are_those_of_the_project():
    (extras,) = [words for words in arguments("ARG") if words.startswith("EXTRAS=")]
    known = (ROOT / "pyproject.toml").read_text()
    for extra in extras.partition("=")[2].strip('"').split(","):
        assert re.search(rf"^{extra} = \[", known, re.MULTILINE), extra


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of the wheel that `pip install .` makes, from what git knows and what is new."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(folder)], cwd=folder / "source", check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_everything_that_the_packages_read(wheel):
    """Templates, recipes, cluster files; all that lies in a package beside its code."""
    for package in ("data_prep", "pipeline", "launch"):
        for path in (ROOT / package).rglob("*"):
            name = str(path.relative_to(ROOT))
            if path.is_file() and not fnmatch.fnmatch(name, "*__pycache__*") and path.name != "Containerfile":
                assert name in wheel, name
    assert {"launch/templates/job.yaml.j2", "launch/clusters/local.yaml", "pipeline/recipes/demo.yaml"} <= wheel

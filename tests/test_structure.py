"""The arrows between packages, and what `--help` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_prep", "pipeline", "launch")
# pipeline reads what data_prep wrote, through these only; and says answers as statements in the words that trained.
OPEN_TO_PIPELINE = {"data_prep.captions", "data_prep.locations", "data_prep.manifest", "data_prep.record"}
COMPONENTS = (
    *("data", "loss", "evaluate", "export", "model.py", "layers.py", "pretrained.py", "average.py", "tokenizer.py"),
    *("checkpoint.py", "checkpoint_writer.py", "checkpoint_copy.py", "checkpoint_sharded.py", "sharding.py"),
    *("backward.py", "ranks.py", "network_check.py", "exchange.py", "tracking.py", "throughput.py", "symptoms.py"),
)


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, `from a import b` counted as a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = ROOT / inner.replace(".", "/")
                found.add(inner if target.is_dir() or target.with_suffix(".py").is_file() else node.module)
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def of(package: str, modules: set[str]) -> set[str]:
    return {module for module in modules if module == package or module.startswith(package + ".")}


@pytest.mark.parametrize("path", files("data_prep"), ids=lambda path: path.name)
def test_data_prep_imports_no_sibling_and_no_torch(path):
    found = imports(path)
    assert not of("pipeline", found) | of("launch", found) | of("torch", found)


@pytest.mark.parametrize("path", files("pipeline"), ids=lambda path: path.name)
def test_pipeline_imports_only_the_contract_of_data_prep(path):
    found = imports(path)
    assert of("data_prep", found) <= OPEN_TO_PIPELINE
    assert not of("launch", found)


@pytest.mark.parametrize("path", files("launch"), ids=lambda path: path.name)
def test_launch_imports_no_sibling_and_no_torch(path):
    found = imports(path)
    assert not of("pipeline", found) | of("data_prep", found) | of("torch", found)


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_know_neither_the_recipe_nor_the_loop(component):
    path = ROOT / "pipeline" / component
    for file in [path] if path.suffix else sorted(path.rglob("*.py")):
        assert not imports(file) & {"pipeline.config", "pipeline.train"}, file


@pytest.mark.parametrize("package", PACKAGES)
def test_help_loads_nothing_heavy(package):
    code = (
        f"import sys; from {package}.__main__ import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'pyarrow', 'open_clip', 'numpy', 'PIL', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_option_is_explained(package):
    import importlib

    import typer

    group = typer.main.get_command(importlib.import_module(f"{package}.__main__").app)
    commands = getattr(group, "commands", {"": group})
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{package} {name} {parameter.name}"


def test_files_are_short():
    for package in PACKAGES:
        for path in files(package):
            assert len(path.read_text().splitlines()) <= 500, path

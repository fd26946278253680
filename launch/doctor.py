"""Checks of a site before jobs go there: what was found, and what to change; and the checks of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from launch.cluster import AnyCluster, LocalCluster, SlurmCluster

PACKAGE = "clip-pipeline"
GB = 1e9
# Loader processes hand batches over in it; containers often give 64 MB.
SHARED_MEMORY = Path("/dev/shm")
LOW_SHARED_MEMORY_BYTES = 1e9
LOW_DISK_BYTES = 10e9
PATIENCE_S = 20


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        state: ok; warning: jobs run, but not as well as they could; fail: jobs will not run.
        found: what there is.
        fix: what to do, unless all is well.
    """

    check: str
    state: Literal["ok", "warning", "fail"]
    found: str
    fix: str = ""


def doctor(cluster: AnyCluster, folder: Path, nodes: int, wait_s: float) -> Iterator[Finding]:
    """Findings in the order in which jobs meet what is checked.

    Args:
        cluster: the site.
        folder: where run folders will be; checks write there, and remove it.
        nodes: how many nodes jobs will have.
        wait_s: how long the job that is tried may wait for nodes.
    """
    yield from _programs()
    if isinstance(cluster, LocalCluster):
        yield from _machine(folder, cluster.processes)
    elif isinstance(cluster, SlurmCluster):
        from launch import doctor_slurm

        yield from doctor_slurm.findings(cluster, folder, nodes, wait_s)
    else:
        from launch import doctor_kubernetes

        yield from doctor_kubernetes.findings(cluster, folder, nodes)


def failed(check: str, error: str) -> Finding:
    """A fail that a LaunchError tells of."""
    found, _, fix = error.partition(" The fix: ")
    return Finding(check, "fail", found, fix)


def table(findings: list[Finding]) -> Any:
    """The findings as a rich table."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "fail": "bold red"}
    shown = Table("check", "", "found", "fix")
    shown.columns[1].no_wrap = True
    for one in findings:
        shown.add_row(one.check, Text(one.state, colours[one.state]), Text(one.found), Text(one.fix))
    return shown


def _programs() -> Iterator[Finding]:
    """Python, and whether the packages that the project needs are there in versions that suit."""
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}")
    try:
        needed = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "fail", f"{PACKAGE} is not installed for this Python", "make setup; or pip install .")
        return
    yield from packages(needed, _version)


def packages(needed: list[str], version: Callable[[str], str | None]) -> Iterator[Finding]:
    """Whether each requirement without an extra is met by the version that is installed, None for none."""
    from packaging.requirements import Requirement

    wrong, seen = [], 0
    for requirement in map(Requirement, needed):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        seen += 1
        found = version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found or 'not installed'}, needed {requirement.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "make setup; or pip install -c constraints.txt .")
    else:
        yield Finding("packages", "ok", f"all {seen}; torch {version('torch')}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine(folder: Path, processes: int) -> Iterator[Finding]:
    yield from gpus(_nvidia_smi(), processes, _version("torch") or "")
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    found = f"{cores} cores, {memory.available / GB:.1f} of {memory.total / GB:.1f} GB free"
    if processes > cores:
        yield Finding("cores", "warning", f"{found} for {processes} ranks", "fewer `processes` in the cluster file")
    else:
        yield Finding("cores", "ok", found)
    yield from _space("shared memory", SHARED_MEMORY, LOW_SHARED_MEMORY_BYTES, "start the container with --shm-size=8g")
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
    if not os.access(place, os.W_OK):
        yield Finding("folder", "fail", f"{place} may not be written to", "another --folder")
    yield from _space("disk", place, LOW_DISK_BYTES, "remove old runs, or take another --folder")


def gpus(listed: list[str] | None, processes: int, torch: str) -> Iterator[Finding]:
    """Whether there are GPUs for all ranks, and a torch that can use them.

    Args:
        listed: what nvidia-smi says of each; None where there is no nvidia-smi.
        processes: ranks on this machine.
        torch: its version, with the local part that names its build.
    """
    if not listed:
        why = "nvidia-smi is not installed" if listed is None else "nvidia-smi lists none"
        yield Finding("GPUs", "ok", f"none ({why}): ranks compute on the CPU, and meet by gloo")
    elif torch.endswith("+cpu"):
        fix = "install torch's CUDA build (https://pytorch.org/get-started/locally)"
        yield Finding("GPUs", "fail", f"{len(listed)}, but torch {torch} is built without CUDA", fix)
    elif processes > len(listed):
        fix = f"`processes: {len(listed)}` in the cluster file, or --processes"
        yield Finding("GPUs", "fail", f"{len(listed)} for {processes} ranks: {'; '.join(listed)}", fix)
    else:
        yield Finding("GPUs", "ok", "; ".join(listed))


def _nvidia_smi() -> list[str] | None:
    words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _space(check: str, folder: Path, low: float, fix: str) -> Iterator[Finding]:
    if not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free in {folder}"
    yield Finding(check, "warning", found, fix) if usage.free < low else Finding(check, "ok", found)

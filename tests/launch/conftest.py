"""SLURM for tests: one cluster that they share, and as many of their own as they ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.hosts import Hosts
from tests.slurm_cluster import Cluster, missing

CLUSTERS = pytest.StashKey[list[Cluster]]()


@pytest.fixture(scope="session")
def _slurm_installed() -> None:
    """Skips where SLURM is not; CI asks with REQUIRE_SLURM=1 that it be there."""
    if absent := missing():
        told = f"no {', '.join(absent)} on this machine: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)(told)


@pytest.fixture(scope="session")
def _shared_cluster(_slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), gpus=2) as cluster:
        yield cluster


@pytest.fixture
def slurm(_shared_cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four nodes with 4 processors and 2 GPUs each. What a test breaks is mended after it, and its jobs are ended."""
    request.node.stash.setdefault(CLUSTERS, []).append(_shared_cluster)
    yield _shared_cluster
    _shared_cluster.reset()


@pytest.fixture
def slurm_hosts(slurm: Cluster) -> Cluster:
    """`slurm`, whose `machines` are Hosts; skips where they cannot be."""
    if not isinstance(slurm.machines, Hosts):
        pytest.skip("nodes that are hosts need root, and network namespaces that are not refused")
    return slurm


@pytest.fixture
def new_cluster(
    _slurm_installed: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Cluster]]:
    """new_cluster(nodes=2, settings={…}) starts a Cluster that ends with the test."""
    with ExitStack() as stack:

        def start(**options: object) -> Cluster:
            cluster = Cluster(tmp_path_factory.mktemp("slurm"), **options)
            request.node.stash.setdefault(CLUSTERS, []).append(cluster)
            return stack.enter_context(cluster)

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What a failed test's clusters logged stands in its report."""
    report = yield
    if report.failed:
        for cluster in item.stash.get(CLUSTERS, []):
            report.sections.append((f"logs in {cluster.folder}", cluster.logs()))
    return report

"""One cluster a session, and clean nodes for every test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from tests.slurm.cluster import Cluster, Unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """A fresh cluster in SLURM_TEST_DIR; where there can be none the tests fail, unless S3_SLURM=skip."""
    folder = Path(os.environ.get("SLURM_TEST_DIR", "/var/tmp/s3-slurm"))
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        pytest.fail(f"another session has the cluster in {folder}: wait for it, or set SLURM_TEST_DIR", pytrace=False)
    with lock:
        cluster = Cluster(folder)
        try:
            cluster.up(fresh=True)
        except Unavailable as reason:
            if os.environ.get("S3_SLURM") == "skip":
                pytest.skip(f"S3_SLURM=skip: {reason}")
            pytest.fail(f"{reason} (S3_SLURM=skip leaves these tests out)", pytrace=False)
        yield cluster
        cluster.down()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node up and idle; what a test leaves behind is cancelled and revived."""
    running_cluster.clean()
    yield running_cluster
    running_cluster.clean()

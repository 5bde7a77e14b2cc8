"""What several test files share: converted models that none changes, a disk, a running Slurm."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.local_slurm import LocalSlurm


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A ConversionWorld."""
    from tests.support.conversion_models import (
        ConversionWorld,  # takes seconds, and few tests need it
    )

    return ConversionWorld(tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory, preloaded_python):
    """Two nodes; no job is left when a test ends well."""
    with LocalSlurm(tmp_path_factory.mktemp("s"), num_nodes=2) as cluster:
        cluster.environment["VIRTUAL_ENV"] = str(preloaded_python.venv)
        cluster.environment.pop("KOSMOSG_HOME", None)
        yield cluster


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)

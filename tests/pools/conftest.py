from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pools.directory import DirectoryPool
from tests.support.filesystems import mounted


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("xfs", 320 << 20, tmp_path_factory.mktemp("image")) as point:
        yield point


@pytest.fixture(scope="session")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("btrfs", 320 << 20, tmp_path_factory.mktemp("image")) as point:
        yield point


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A small one of its own, to be filled."""
    with mounted("tmpfs", 16 << 20, tmp_path) as point:
        yield point


@pytest.fixture(params=["plain", "shm", "xfs", "btrfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory, on each kind of file system."""
    parents = {"plain": lambda: tmp_path, "shm": lambda: Path("/dev/shm")}
    parent = parents.get(request.param, lambda: request.getfixturevalue(request.param))()
    yield from _empty_directory(parent)


@pytest.fixture(params=["xfs", "btrfs"])
def reflink_directory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory, on each file system that can reflink."""
    yield from _empty_directory(request.getfixturevalue(request.param))


@pytest.fixture
def pool(directory: Path) -> DirectoryPool:
    """An activated pool, on each kind of file system."""
    pool = DirectoryPool("default", directory)
    pool.activate()
    return pool


@pytest.fixture
def copying_pool(tmp_path: Path) -> Iterator[DirectoryPool]:
    """An activated pool on a file system without reflink."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        pool = DirectoryPool("default", Path(path))
        pool.activate()
        assert not pool.live_clone
        yield pool


def _empty_directory(parent: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="pool-", dir=parent))
    yield path
    shutil.rmtree(path)

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagecache.cache import Cache
from imagecache.sandbox import Sandbox
from tests.support.filesystems import mounted


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("xfs", 320 << 20, tmp_path_factory.mktemp("image")) as point:
        yield point


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A small one of its own, to be filled."""
    with mounted("tmpfs", 16 << 20, tmp_path) as point:
        yield point


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return activated(tmp_path / "cache")


@pytest.fixture
def small_cache(tmpfs: Path) -> Cache:
    """On a file system of 16 MiB."""
    return activated(tmpfs / "cache")


@pytest.fixture
def sandbox() -> Sandbox:
    return Sandbox()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on tmpfs: what is written there costs no disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def activated(root: Path) -> Cache:
    root.mkdir()
    cache = Cache(root)
    cache.activate()
    return cache

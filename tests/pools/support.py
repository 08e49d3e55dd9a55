"""Bytes of volumes, and a pool in another process that can be ended in the middle of its work."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from pools import DRIVERS, Pool
from pools.directory import DirectoryPool

MIB = 1 << 20


def write(pool: Pool, volume_id: UUID, content: bytes, offset: int = 0) -> None:
    with pool.backing(volume_id).path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def read(pool: Pool, volume_id: UUID) -> bytes:
    return pool.backing(volume_id, read_only=True).path.read_bytes()


def names(pool: DirectoryPool) -> set[str]:
    """All that lies in the pool, but for its layout."""
    return {str(path.relative_to(pool.path)) for path in pool.path.rglob("*.raw")}


@contextmanager
def stopped_at(
    step: str | int, path: Path, method: str, *arguments: object, driver: str = "directory"
) -> Iterator[subprocess.Popen[str]]:
    """A process that calls the pool's method and stands still at `step`: of that name, or the one of that number.

    It is SIGKILLed at the end of the block.
    """
    argv = [sys.executable, "-m", "tests.pools.support", driver, str(step), path, method, *map(str, arguments)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{step}\n"
            yield process
        finally:
            process.kill()


def _main(driver: str, step: str, path: str, method: str, *arguments: str) -> None:
    count = itertools.count()
    acting = False

    def stop(reached: str) -> None:
        if acting and step in (reached, str(next(count))):
            print(step, flush=True)
            signal.pause()

    pool = DRIVERS[driver]("default", Path(path), trace=stop)
    pool.activate()
    acting = True
    getattr(pool, method)(*(int(word) if word.isdigit() else UUID(word) for word in arguments))


if __name__ == "__main__":
    _main(*sys.argv[1:])

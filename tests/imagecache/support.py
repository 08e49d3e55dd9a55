"""Images to be looked at, and a cache in another process that can be ended in the middle of its work."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from imagecache.cache import Cache, no_progress
from imagecache.fetch import Wanted
from imagecache.inspect import ImageLimits
from imagecache.sandbox import NODES, Sandbox
from imagecache.store import Store
from imagecache.web import Web

MIB = 1 << 20
LIMITS = ImageLimits(max_size=1 << 30, max_source_size=1 << 30)
__all__ = ["no_progress"]
KEY = UUID("6f0c3f52-8f0e-4a57-9d5c-1d1f0a7f3b11")


def qemu_img(*arguments: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def content(name: str, size: int) -> bytes:
    """Bytes that are the same for the same name, and do not compress."""
    seed = uuid5(KEY, name).bytes
    return (b"".join(uuid5(KEY, f"{name}{number}").bytes for number in range(256)) * (size // 4096 + 1) + seed)[:size]


def make_raw(path: Path, size: int = 8 * MIB) -> Path:
    """A disk with a boot sector, some data, and holes."""
    with path.open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa")
        file.seek(MIB)
        file.write(content("disk", 2 * MIB))
        file.truncate(size)
    return path


def make_qcow2(path: Path, *options: str, raw: Path | None = None) -> Path:
    source = raw or make_raw(path.with_suffix(".source"))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, source, path)
    return path


def everything(root: Path) -> set[str]:
    """All files that lie in a cache, but for its marker and its locks."""
    names = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    return {name for name in names if name != ".stratus-cache" and not name.startswith("locks/")}


def commit(cache: Cache, data: bytes, key: UUID = KEY) -> str:
    with cache.stage(key) as stage:
        (stage.path / "image").write_bytes(data)
        return cache.commit(stage, stage.path / "image")


def store(cache: Cache, limits: ImageLimits = LIMITS) -> Store:
    """One that fetches from loopback too."""
    return Store(cache, Web(allow_networks=["127.0.0.0/8"]), Sandbox(), limits)


def wanted(*urls: str, **facts: Any) -> Wanted:
    return Wanted(urls, **{"checksums": {}, "size": None, "compression": None, "max_size": 1 << 30} | facts)


def _add(cache: Cache, url: str) -> None:
    """With two steps more: in the middle of the fetch, and of the flattening."""

    def progress(done: int, total: int) -> None:
        if total:
            cache.trace("flattening" if 2 * done > total else "fetching" if 5 * done > total else "beginning")

    store(cache).add(KEY, wanted(url), None, progress)


Act = Callable[[Cache, str], object]
ACTS: dict[str, Act] = {
    "commit": lambda cache, argument: commit(cache, argument.encode()),
    "evict": lambda cache, argument: cache.evict(argument),
    "add": _add,
}


@contextmanager
def stopped_at(step: str | int, root: Path, act: str, argument: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that acts on the cache at `root` and stands still at `step`: of that name, or the one of that number.

    It is SIGKILLed at the end of the block.
    """
    argv = [sys.executable, "-m", "tests.imagecache.support", str(step), str(root), act, argument]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{step}\n"
            yield process
        finally:
            process.kill()


def _main(step: str, root: str, act: str, argument: str) -> None:
    count = itertools.count()

    def stop(reached: str) -> None:
        if step in (reached, str(next(count))):
            print(step, flush=True)
            signal.pause()

    cache = Cache(Path(root), stop)
    cache.activate()
    ACTS[act](cache, argument)


if __name__ == "__main__":
    _main(*sys.argv[1:])


def nodes_of(device: Path) -> list[Path]:
    """What sandboxes have of it at this moment; other tests have others."""
    found = []
    for path in NODES.glob("*/[0-9]*"):
        with suppress(FileNotFoundError):
            if path.stat().st_rdev == device.stat().st_rdev:
                found.append(path)
    return found

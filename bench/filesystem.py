"""An XFS of its own for a benchmark, in a file."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def xfs(work: Path, size: int) -> Iterator[Path]:
    """A new XFS of `size` bytes (at least 300 MiB), mounted below `work` until the block ends."""
    image, point = work / "xfs.img", work / "xfs"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    point.mkdir()
    try:
        # Direct I/O of the loop device: the benchmark's bytes are not kept twice in memory.
        device = _output("losetup", "--find", "--show", "--direct-io=on", str(image))
        try:
            subprocess.run(["mount", device, point], check=True)
            try:
                yield point
            finally:
                subprocess.run(["umount", point], check=True)
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)
    finally:
        image.unlink()


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

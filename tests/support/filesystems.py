"""Real file systems, made and mounted for a test, and gone after it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Kind = Literal["xfs", "btrfs", "tmpfs"]
SMALLEST = {"xfs": 300 << 20, "btrfs": 128 << 20, "tmpfs": 1 << 20}


@contextmanager
def mounted(kind: Kind, size: int, workdir: Path) -> Iterator[Path]:
    """A new file system of `size` bytes, at least SMALLEST, mounted at workdir/<kind>, on <kind>.img beside it."""
    point = workdir / kind
    if kind == "tmpfs":
        with _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", point=point):
            yield point
        return
    image = image_of(point)
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    try:
        with _mount("-o", "loop", str(image), point=point):
            yield point
    finally:
        image.unlink()


def image_of(point: Path) -> Path:
    """The image of the file system mounted at `point`."""
    return point.with_name(f"{point.name}.img")


@contextmanager
def after_power_cut(point: Path, workdir: Path) -> Iterator[Path]:
    """The XFS at `point` as it would be found if the power had gone now: what reached its device and nothing else."""
    image = workdir / "power-cut.img"
    subprocess.run(["cp", "--sparse=always", image_of(point), image], check=True)
    try:
        with _mount("-o", "loop,nouuid", str(image), point=workdir / "power-cut"):
            yield workdir / "power-cut"
    finally:
        image.unlink()


@contextmanager
def _mount(*arguments: str, point: Path) -> Iterator[None]:
    point.mkdir()
    subprocess.run(["mount", *arguments, point], check=True)
    try:
        yield
    finally:
        # A test that failed may have left a file open: a lazy unmount frees the loop device with its last user.
        if subprocess.run(["umount", point], capture_output=True).returncode != 0:
            subprocess.run(["umount", "--lazy", point], check=True)
        point.rmdir()

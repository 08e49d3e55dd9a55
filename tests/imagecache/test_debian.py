"""A real system's disk, published in five ways, becomes one image; and it boots from an overlay on that."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from blockdev import command, qemu_img
from imagecache.cache import Cache
from imagecache.inspect import ImageLimits
from tests.imagecache.support import no_progress, store, wanted
from tests.support import debian_image
from tests.support.origin import Origin

LIMITS = ImageLimits(1 << 30, 1 << 30)


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as origin:
        yield origin


def fetched(cache: Cache, origin: Origin, path: Path) -> str:
    origin.put(f"/{path.name}", path.read_bytes(), piece=1 << 20)
    stored = store(cache, LIMITS).add(uuid4(), wanted(origin.url(f"/{path.name}")), None, no_progress)
    assert stored.size == debian_image.SIZE
    return stored.digest


def test_a_real_disk_is_fetched(cache: Cache, origin: Origin) -> None:
    digest = fetched(cache, origin, debian_image.COMPRESSED["zst"])
    found = command.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(debian_image.RAW), str(cache.path(digest))], timeout=120
    )
    assert "identical" in found.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_five_forms_are_one_image_and_it_boots(cache: Cache, origin: Origin, tmp_path: Path) -> None:
    forms = [debian_image.RAW, debian_image.QCOW2, *debian_image.COMPRESSED.values()]
    digests = {fetched(cache, origin, form) for form in forms}
    assert len(digests) == 1
    image, overlay = cache.path(digests.pop()), tmp_path / "overlay.qcow2"
    qemu_img.create_overlay(lambda argv: command.run(argv, timeout=30), overlay, image, "qcow2")
    assert login_prompt_of(overlay)
    assert overlay.stat().st_size > 1 << 20
    assert cache.verify(image.stem)


def login_prompt_of(disk: Path) -> bool:
    """Start a machine from the disk, without hardware's help, until its console asks who is there; or until it ends."""
    argv = [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-m", "512M", "-smp", "1", "-nodefaults", "-display",
        "none", "-no-user-config", "-no-reboot", "-serial", "stdio", "-drive", f"file={disk},format=qcow2,if=virtio",
    ]  # fmt: skip
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine:
        assert machine.stdout is not None
        said = b""
        try:
            while piece := machine.stdout.read1(1 << 16):
                said += piece
                if f"{debian_image.HOSTNAME} login:".encode() in said:
                    return True
            raise AssertionError(said.decode(errors="replace"))
        finally:
            machine.kill()

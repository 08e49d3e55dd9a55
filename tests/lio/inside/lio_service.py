"""Whole services on LIO, with what tgt's end-to-end tests want: `from tests.end_to_end.test_… import test_…` runs those
as they are, on what is here.

A module that does so imports the fixtures of tests/end_to_end/conftest.py too, but for those that are here: the write
that tgtd is held in is one that the kernel makes, so what is held is the device below the pool.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from tests.lio.inside.conftest import wipe_lio
from tests.support.service import EVERYWHERE
from tests.support.shim import Brake

MIB = 1 << 20
#: The lease is a long one, for a kernel with one busy CPU: a worker that was not heard for so long is killed.
SETTINGS = {"STRATUS_ISCSI__TARGET": "lio", "STRATUS_WORKER__LEASE": "10", "STRATUS_SERVER__PROCESSES": "1"}


@pytest.fixture(scope="module", autouse=True)
def on_lio(test_kernel: None) -> Iterator[None]:
    """All services of the module are on LIO, which is empty before and after."""
    wipe_lio()
    EVERYWHERE.update(SETTINGS)
    yield
    EVERYWHERE.clear()
    wipe_lio()


@dataclass
class HeldDevice:
    """A file system without reflinks at `point`, on a device-mapper `name` whose I/O can be held."""

    point: Path
    name: str

    def users(self) -> list[Path]:
        """The counts of what waits (reads, writes) of each loop device over one of its files."""
        found = []
        for file in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):  # detached just now
                if file.read_text().startswith(f"{self.point}/"):
                    found.append(file.parents[1] / "inflight")
        return found

    def hold(self) -> None:
        _dmsetup("suspend", "--nolockfs", "--noflush", self.name)

    def release(self) -> None:
        _dmsetup("resume", self.name)


@pytest.fixture(scope="module")
def held_device(on_lio: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldDevice]:
    with _held_device(tmp_path_factory.mktemp("held")) as device:
        yield device


@contextlib.contextmanager
def _held_device(workdir: Path) -> Iterator[HeldDevice]:
    image, name, size = workdir / "image", f"held-{uuid4().hex[:8]}", 768 * MIB
    with image.open("wb") as file:
        file.truncate(size)
    done = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    loop = done.stdout.strip()
    _dmsetup("create", name, "--table", f"0 {size // 512} linear {loop} 0")
    device = HeldDevice(workdir / "pool", name)
    device.point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", f"/dev/mapper/{name}"], check=True)
    subprocess.run(["mount", f"/dev/mapper/{name}", device.point], check=True)
    try:
        yield device
    finally:
        device.release()
        subprocess.run(["umount", "--lazy", device.point], check=True)
        _dmsetup("remove", "--retry", "--deferred", name)
        subprocess.run(["losetup", "--detach", loop], check=True)
        image.unlink()


def _dmsetup(*arguments: str) -> None:
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}  # nobody else here makes the nodes in /dev
    subprocess.run(["dmsetup", *arguments], check=True, capture_output=True, env=environment)


@pytest.fixture(scope="module")
def plain_directory(held_device: HeldDevice) -> Path:
    directory = held_device.point / "pool"
    directory.mkdir()
    return directory


@dataclass
class WriteBrake(Brake):
    """Holds what is written to volumes, wherever it is on its way."""

    device: HeldDevice | None = None
    since: float = 0.0

    def on(self) -> None:
        assert self.device
        self.device.hold()
        self.since = time.monotonic()

    def off(self) -> None:
        assert self.device
        self.device.release()

    def holds(self) -> bool:
        """Whether a loop device that LIO exports from waits for a write.

        qemu-io flushes after each of its writes. If a flush was caught, which is not counted, that is let go.
        """
        assert self.device
        if any(int(path.read_text().split()[1]) for path in self.device.users()):
            return True
        if time.monotonic() > self.since + 1.5:
            self.off()
            self.on()
        return False


@pytest.fixture
def brake(brakes: Path, held_device: HeldDevice) -> Iterator[Callable[[str], Brake]]:
    made: list[Brake] = []

    def put_on(what: str) -> Brake:
        made.append(WriteBrake(brakes, what, held_device) if what == "write" else Brake(brakes, what))
        made[-1].on()
        return made[-1]

    yield put_on
    for one in made:
        one.off()

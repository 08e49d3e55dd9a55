"""What the tests in the test kernel may use. They change the kernel they run in: elsewhere they refuse to run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pools.lvm import LvmPool
from tests.lio.inside.lio_house import house as house
from tests.lio.inside.lio_house import suspendable as suspendable
from tests.lio.kernel import INSIDE, JOB
from tests.support.filesystems import mounted
from tests.support.kernel_initiator import running_iscsid
from tests.support.thinpools import ThinPool, thin_pool

MODULES = (
    "configfs", "target_core_mod", "target_core_iblock", "target_core_file", "iscsi_target_mod", "loop", "dm_mod",
    "dm_thin_pool", "dm_snapshot", "scsi_mod", "sd_mod", "iscsi_tcp",
)  # fmt: skip
CONFIGFS = Path("/sys/kernel/config")


@pytest.fixture(scope="session", autouse=True)
def test_kernel() -> None:
    """A kernel of our own, with every module the tests need, configfs, and the directories rtslib wants."""
    if os.environ.get(INSIDE) != "1" or not Path(JOB, "command.sh").exists():
        pytest.exit("these tests need a kernel of their own: run them by `python -m tests.lio`", returncode=1)
    for module in MODULES:
        subprocess.run(["modprobe", module], check=True)
    if not (CONFIGFS / "target").is_dir():
        subprocess.run(["mount", "-t", "configfs", "configfs", CONFIGFS], check=True)
    for directory in (Path("/etc/target"), Path("/etc/rtslib-fb-target")):
        directory.mkdir(exist_ok=True)


@pytest.fixture
def lio(test_kernel: None) -> Iterator[Path]:
    """configfs, with no target and no backstore in it, and none left afterwards."""
    wipe_lio()
    yield CONFIGFS / "target"
    wipe_lio()


@pytest.fixture(scope="session")
def iscsid(test_kernel: None) -> Iterator[None]:
    """The daemon that tests.support.kernel_initiator needs."""
    with running_iscsid():
        yield


@pytest.fixture(scope="session")
def xfs(test_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An XFS of 2 GiB, shared by all tests: files on it take direct I/O and reflinks, those in tmp_path do not."""
    with mounted("xfs", 2 << 30, tmp_path_factory.mktemp("xfs")) as point:
        yield point


@pytest.fixture(scope="session")
def pool_group(test_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    """A thin pool of 512 MiB, shared by all tests; tests.support.thinpools makes others."""
    with thin_pool(tmp_path_factory.mktemp("lvm"), "stratus-test", 512 << 20) as pool:
        yield pool


@pytest.fixture(scope="module")
def active(pool_group: ThinPool) -> LvmPool:
    """The pool in `pool_group`."""
    pool = LvmPool("default", pool_group.path)
    pool.activate()
    return pool


def wipe_lio() -> None:
    """What a reboot does to LIO: no target, no session, no backstore is left in configfs, whoever made them."""
    from rtslib_fb import RTSRoot  # here, since importing it looks for configfs

    RTSRoot().clear_existing(confirm=True)

"""The test kernel is one, and has what the other tests in here build on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rtslib_fb import LUN, TPG, BlockStorageObject, FabricModule, MappedLUN, NetworkPortal, NodeACL, Target

from tests.support.kernel_initiator import IscsiadmFailed, KernelInitiator
from tests.support.thinpools import ThinPool, lvm

PORTAL = "127.0.0.1:3260"
IQN = "iqn.2004-10.org.example:smoke"
INITIATOR = "iqn.2004-10.org.example:host-a"


def test_the_root_is_the_hosts_and_what_is_written_stays_here() -> None:
    assert os.uname().nodename == "test-kernel"
    assert Path("/proc/mounts").read_text().startswith("overlay / overlay")
    assert Path(__file__).is_file()


def test_files_come_back() -> None:
    Path(os.environ["STRATUS_RESULTS"], "smoke").write_text("from inside\n")


@pytest.fixture
def volume(pool_group: ThinPool) -> Iterator[str]:
    lvm("lvcreate", "--thin", "--virtualsize", "32m", "--name", "smoke", str(pool_group.path))
    yield f"/dev/{pool_group.group}/smoke"
    lvm("lvremove", "--yes", f"{pool_group.group}/smoke")


@pytest.fixture
def exported(volume: str, lio: Path, iscsid: None) -> KernelInitiator:
    """A thin volume behind a target with CHAP, built by hand."""
    backstore = BlockStorageObject("smoke", dev=volume)
    group = TPG(Target(FabricModule("iscsi"), IQN), 1)
    lun = LUN(group, 1, backstore)
    NetworkPortal(group, *PORTAL.split(":"))
    group.set_attribute("authentication", "1")
    acl = NodeACL(group, INITIATOR)
    acl.chap_userid, acl.chap_password = "smoke", "correct horse"
    MappedLUN(acl, 1, lun)
    group.enable = True
    return KernelInitiator(PORTAL, IQN, INITIATOR, "smoke", "correct horse")


def test_the_kernels_initiator_writes_to_a_thin_volume_behind_lio(exported: KernelInitiator) -> None:
    with exported as initiator:
        assert initiator.size == 32 << 20
        assert initiator.state == "LOGGED_IN"
        assert initiator.wwid.startswith("naa.6001405")
        assert initiator.by_id == "3" + initiator.wwid.removeprefix("naa.")
        assert initiator.serial
        subprocess.run(["mkfs.ext4", "-q", initiator.device], check=True)
        subprocess.run(["fsck.ext4", "-n", "-f", initiator.device], check=True, capture_output=True)
    assert exported.sessions() == []


def test_a_wrong_secret_is_told(exported: KernelInitiator) -> None:
    exported.password = "wrong horse at all"
    with pytest.raises(IscsiadmFailed) as refused:
        exported.login()
    assert refused.value.code == IscsiadmFailed.AUTHENTICATION
    assert exported.sessions() == []
    exported.logout()


def test_an_xfs_takes_direct_io(xfs: Path) -> None:
    file = xfs / "direct"
    file.touch()
    os.close(os.open(file, os.O_RDWR | os.O_DIRECT))
    file.unlink()

"""One suite for every target on every pool: the whole service in the test kernel, with the kernel's own initiator."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rtslib_fb import TPG, FabricModule, Target

from tests.lio.inside.conftest import CONFIGFS, wipe_lio
from tests.lio.inside.sites import KINDS, MIB, ONE, TWO, Site, kernel, open_site, tgtd
from tests.support.initiator import Initiator, InitiatorError
from tests.support.kernel_initiator import IscsiadmFailed, KernelInitiator
from tests.support.service import initiator_of, wait_until
from tests.support.thinpools import lvm

#: What libiscsi is told (RFC 7143 §11.13.5: class and detail) when the secret is wrong, and when the name is.
REFUSALS = {"tgt": ("(513)", "(515)"), "lio": ("(513)", "(514)")}


@pytest.fixture(scope="module", params=KINDS)
def site(
    request: pytest.FixtureRequest, xfs: Path, iscsid: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    with open_site(request.param, xfs, tmp_path_factory.mktemp("site")) as site:
        yield site


def shell(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"


@contextmanager
def opened(device: Path) -> Iterator[int]:
    descriptor = os.open(device, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_data_written_at_one_node_is_found_at_another(site: Site, tmp_path: Path) -> None:
    volume = site.volume(64 * MIB)
    attachment = site.attach(volume, ONE)
    with kernel(attachment) as one:
        identity = (one.by_id, one.wwid, one.serial)
        shell("mkfs.ext4", "-q", one.device)
        shell("mount", one.device, tmp_path)
        (tmp_path / "year-of-data").write_bytes(b"precious" * 4096)
        shell("umount", tmp_path)
    site.detach(attachment)
    attachment = site.attach(volume, TWO)
    with kernel(attachment) as two:
        assert (two.by_id, two.wwid, two.serial) == identity
        shell("fsck.ext4", "-f", "-n", two.device)
        shell("mount", two.device, tmp_path)
        assert (tmp_path / "year-of-data").read_bytes() == b"precious" * 4096
        shell("umount", tmp_path)
    site.detach(attachment)


def test_who_may_log_in(site: Site) -> None:
    attachment = site.attach(site.volume(), ONE)
    right = initiator_of(attachment)
    wrong_secret, wrong_name = REFUSALS[site.target]
    assert right.login_error() is None
    assert wrong_secret in (Initiator(right.portal, right.iqn, ONE, right.username, "x" * 16).login_error() or "")
    assert wrong_name in (Initiator(right.portal, right.iqn, TWO, right.username, right.password).login_error() or "")
    assert Initiator(right.portal, right.iqn, ONE).login_error() is not None
    with kernel(attachment) as initiator:
        assert initiator.size == 32 * MIB
    for username, password in ((right.username, "y" * 16), ("", "")):
        refused = KernelInitiator(right.portal, right.iqn, ONE, username, password)
        with pytest.raises(IscsiadmFailed):
            refused.login()
        refused.logout()
    site.detach(attachment)
    assert right.login_error() is not None


def test_mutual_chap_is_demanded_and_given(site: Site) -> None:
    attachment = site.attach(site.volume(), ONE, mutual_chap=True)
    with kernel(attachment) as initiator:
        assert initiator.state == "LOGGED_IN"
    liar = kernel(attachment)
    assert liar.mutual is not None
    liar.mutual = (liar.mutual[0], "not what it has")
    with pytest.raises(IscsiadmFailed):
        liar.login()
    liar.logout()
    site.detach(attachment)


def test_every_reader_has_mutual_chap_of_its_own(site: Site) -> None:
    volume = site.volume()
    readers = [site.attach(volume, ONE, mode="ro", mutual_chap=True)]
    body = {"instance_id": "test", "node": "test", "initiator": TWO, "mode": "ro", "mutual_chap": True}
    second = site.service.admin.post(f"/v1/volumes/{volume}/attachments", json=body)
    if site.target == "tgt":  # has one outgoing account for each target
        assert (second.status_code, second.json()["code"]) == (409, "mutual-chap-taken")
    else:
        readers.append(second.json())
        assert "0 differences" in site.service.storage("reconcile", "--dry-run").output
    for reader in readers:
        with kernel(reader) as initiator:
            assert initiator.state == "LOGGED_IN"
        site.detach(reader)


def test_one_writes_or_many_read(site: Site) -> None:
    volume = site.volume()
    attachment = site.attach(volume, ONE)
    initiator_of(attachment).write(0, 0x5A, MIB)
    body = {"instance_id": "test", "node": "test", "initiator": TWO, "mode": "rw"}
    second = site.service.admin.post(f"/v1/volumes/{volume}/attachments", json=body)
    assert (second.status_code, second.json()["code"]) == (409, "volume-in-use")
    site.detach(attachment)
    readers = [site.attach(volume, initiator, mode="ro") for initiator in (ONE, TWO)]
    for reader in readers:
        initiator_of(reader).read(0, MIB, 0x5A)
        with kernel(reader) as device:
            assert device.read_only
        with pytest.raises(InitiatorError):
            initiator_of(reader).write(0, 0x11, MIB)
    for reader in readers:
        site.detach(reader)


def test_a_fenced_session_cannot_write(site: Site) -> None:
    volume = site.volume()
    attachment = site.attach(volume, ONE)
    one = kernel(attachment)
    one.login()
    with opened(one.device) as device:
        os.pwrite(device, b"\x5a" * MIB, 0)
        os.fsync(device)
        site.detach(attachment)
        assert [s for s in site.service.admin.events("attachment.detached") if s["resource"]["id"] == attachment["id"]]
        other = site.attach(volume, TWO)
        initiator_of(other).read(0, MIB, 0x5A)
        os.pwrite(device, b"\x11" * MIB, 0)
        with pytest.raises(OSError, match="Input/output error"):  # when the kernel gives up: replacement_timeout
            os.fsync(device)
    initiator_of(other).read(0, MIB, 0x5A)
    one.logout()
    site.detach(other)


def size_after_rescan(initiator: KernelInitiator) -> int:
    initiator.rescan()  # does nothing while it reconnects, which a volume that tgt grows makes it do
    return initiator.size


def test_a_volume_grows_while_it_is_attached(site: Site) -> None:
    volume = site.volume(32 * MIB)
    attachment = site.attach(volume)
    with kernel(attachment) as initiator:
        answer = site.service.admin.patch(f"/v1/volumes/{volume}", json={"size": 64 * MIB})
        assert answer.status_code == 200, answer.text
        wait_until(lambda: size_after_rescan(initiator) == 64 * MIB, what="the new size")
        assert initiator.state == "LOGGED_IN"
        with opened(initiator.device) as device:
            os.pwrite(device, b"\x77" * MIB, 63 * MIB)
            os.fsync(device)
    initiator_of(attachment).read(63 * MIB, MIB, 0x77)
    site.detach(attachment)


def test_snapshots_clones_and_reverts(site: Site) -> None:
    volume = site.volume()
    attachment = site.attach(volume)
    initiator_of(attachment).write(0, 0x5A, MIB)
    made = site.service.admin.post(f"/v1/volumes/{volume}/snapshots", json={"name": "before"})
    assert made.status_code == 201, made.text  # of an attached volume: both pools can
    initiator_of(attachment).write(0, 0x11, 2 * MIB)
    site.detach(attachment)
    clone = site.attach(site.volume(64 * MIB, snapshot=made.json()["id"]))
    initiator_of(clone).read(0, MIB, 0x5A)
    initiator_of(clone).read(MIB, 63 * MIB, 0)
    site.detach(clone)
    reverted = site.service.admin.post(f"/v1/volumes/{volume}/revert", json={"snapshot": made.json()["id"]})
    assert reverted.status_code in (200, 204), reverted.text
    attachment = site.attach(volume)
    initiator_of(attachment).read(0, MIB, 0x5A)
    initiator_of(attachment).read(MIB, MIB, 0)
    site.detach(attachment)
    assert site.service.admin.delete(f"/v1/snapshots/{made.json()['id']}").status_code == 204


def test_what_is_discarded_reads_as_zeros(site: Site) -> None:
    attachment = site.attach(site.volume())
    initiator = initiator_of(attachment)
    initiator.write(0, 0x5A, 8 * MIB)
    initiator.discard(0, 4 * MIB)
    with initiator.bare() as bare:
        capacity = bare.command(b"\x9e\x10" + bytes(8) + b"\0\0\0\x20\0\0", 32)  # READ CAPACITY (16): LBPME
    offered = bool(capacity[14] & 0x80)
    assert offered == ((site.target, site.group is None) != ("tgt", False))  # tgtd cannot punch holes in a device
    initiator.read(0, 4 * MIB, 0 if offered else 0x5A)
    initiator.read(4 * MIB, 4 * MIB, 0x5A)
    site.detach(attachment)


def test_a_reboot_changes_nothing(site: Site) -> None:
    """Every process killed and LIO empty, as after a power cut: the next start serves the same under the same names."""
    attachment = site.attach(site.volume())
    with kernel(attachment) as initiator:
        identity = (initiator.by_id, initiator.serial, initiator.vpd(0x83))
        with opened(initiator.device) as device:
            os.pwrite(device, b"\x5a" * MIB, 0)
            os.fsync(device)
    site.service.kill_everything()
    wipe_lio()
    if site.group:
        lvm("vgchange", "--activate", "n", site.group)
    site.service.start()
    with kernel(attachment) as initiator:
        assert (initiator.by_id, initiator.serial, initiator.vpd(0x83)) == identity
    initiator_of(attachment).read(0, MIB, 0x5A)
    site.detach(attachment)


def test_one_command_rebuilds_every_export(site: Site) -> None:
    """What somebody wiped while the service runs; what is not ours is told and left alone."""
    attachments = [site.attach(site.volume(), initiator) for initiator in (ONE, TWO)]
    wipe(site)
    with foreign_target(site) as foreign:
        drift = site.service.storage("reconcile", "--dry-run").stdout
        assert drift.count("attached, but there is no target -> make the export") == 2
        assert foreign in drift
        assert initiator_of(attachments[0]).login_error() is not None
        site.service.storage("reconcile")
        for attachment in attachments:
            assert initiator_of(attachment).login_error() is None
            site.detach(attachment)
        assert foreign in site.service.storage("reconcile", "--dry-run").stdout


def wipe(site: Site) -> None:
    if site.target == "lio":
        wipe_lio()
        return
    target = tgtd(site).target
    for state in target.inventory():
        wait_until(lambda volume_id=state.volume_id: target.drain(volume_id) == [])  # type: ignore[misc]
        target.remove(state.volume_id)


@contextmanager
def foreign_target(site: Site) -> Iterator[str]:
    name = "iqn.2004-10.org.example:somebody-elses"
    if site.target == "lio":
        TPG(Target(FabricModule("iscsi"), name), 1)
        yield name
        wipe_lio()
    else:
        tgtd(site).daemon.ipc.create_target(4000, name)
        yield name
        tgtd(site).daemon.ipc.delete_target(4000)


def test_every_layer_that_was_altered_is_named_and_put_right(site: Site) -> None:
    attachment = site.attach(site.volume(), ONE)
    volume, initiator = attachment["volume_id"], initiator_of(attachment)
    for layer, alter in alterations(site, initiator).items():
        alter()
        named = f"{volume} differs from the database in: {layer} -> converge these layers"
        assert named in site.service.storage("reconcile", "--dry-run").stdout
        assert named in site.service.storage("reconcile").stdout
        assert "0 differences" in site.service.storage("reconcile", "--dry-run").stderr
        initiator.write(0, 0x5A, MIB)
    site.detach(attachment)


def alterations(site: Site, initiator: Initiator) -> dict[str, Callable[[], object]]:
    """What somebody may do by hand, and how it is told."""
    if site.target == "tgt":
        ipc = tgtd(site).daemon.ipc
        tid = next(state.tid for state in tgtd(site).target.inventory() if state.iqn == initiator.iqn)
        return {"initiators": lambda: ipc.bind_initiator(tid, TWO)}
    group = CONFIGFS / "target/iscsi" / initiator.iqn / "tpgt_1"
    acl = group / "acls" / ONE
    backstore = next(CONFIGFS.glob(f"target/core/iblock_*/{initiator.iqn}"))
    return {
        f"CHAP of {ONE}": lambda: (acl / "auth/password").write_text("guessed-by-somebody"),
        f"write protection of {ONE}": lambda: (acl / "lun_1/write_protect").write_text("1"),
        "attributes of the backstore": lambda: (backstore / "attrib/emulate_3pc").write_text("1"),
        "a layer that is not whole": lambda: (group / "param/MaxConnections").write_text("4"),
    }


def test_what_is_not_ours_in_the_pool_is_left_alone(site: Site) -> None:
    if site.group is None:
        stranger = site.path / "volumes" / "somebody-elses.raw"
        stranger.write_text("precious")
    else:
        lvm("lvcreate", "--thin", "--virtualsize", "16m", "--name", "stratus-v-somebody", f"{site.group}/pool")
    told = site.service.storage("reconcile", "--dry-run")
    assert ("somebody" in told.stdout, told.stderr) == (
        True, "0 differences, 1 things that are not ours (nothing was changed)\n"
    )  # fmt: skip
    site.service.storage("reconcile")
    if site.group is None:
        assert stranger.read_text() == "precious"
        stranger.unlink()
    else:
        assert "stratus-v-somebody" in lvm("lvs", "--noheadings", "-o", "lv_name", site.group)
        lvm("lvremove", "--yes", f"{site.group}/stratus-v-somebody")


def test_the_doctor_finds_what_it_needs(site: Site) -> None:
    told = site.service.storage("doctor", "--format", "json").output
    verdicts = {check["name"]: check["verdict"] for check in json.loads(told)}
    assert verdicts["target"] == "ok", told
    assert verdicts["pool default"] == "ok", told


def test_an_orderly_end_leaves_nothing(site: Site) -> None:
    attachment = site.attach(site.volume())
    assert site.service.stop() == 0
    assert initiator_of(attachment).login_error() is not None
    targets = Path("/sys/kernel/config/target/iscsi")
    assert list(targets.glob("iqn.*")) == []

"""Exports by LIO as initiators meet them."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from iscsi import lio_configfs, names
from iscsi.target import Connection, Credentials, Export, TargetBusy, TargetRefused, TargetUnavailable
from tests.lio.inside.conftest import CONFIGFS, wipe_lio
from tests.lio.inside.lio_house import MIB, PREFIX, House, Suspendable, connection
from tests.support.initiator import Initiator, InitiatorError, Writer, lost
from tests.support.kernel_initiator import IscsiadmFailed, KernelInitiator

AUTHENTICATION, AUTHORIZATION = "(513)", "(514)"


def test_only_the_right_secret_opens(house: House) -> None:
    export = house.exported()
    right = house.initiator(export)
    assert right.login_error() is None
    wrong = Initiator(right.portal, right.iqn, right.initiator, right.username, "not-the-secret")
    assert AUTHENTICATION in (wrong.login_error() or "")
    without = Initiator(right.portal, right.iqn, right.initiator)
    assert AUTHENTICATION in (without.login_error() or "")
    stranger = Initiator(right.portal, right.iqn, "iqn.2026-11.org.example:other", right.username, right.password)
    assert AUTHORIZATION in (stranger.login_error() or "")
    assert right.iqn not in stranger.ls()
    assert right.iqn in right.ls()


def test_the_kernels_initiator_is_held_to_the_same(house: House, iscsid: None) -> None:
    export = house.exported()
    right = house.kernel(export)
    with right:
        assert right.size == export.size
        assert not right.read_only
    wrong = house.kernel(export)
    wrong.password = "not-the-secret"
    stranger = house.kernel(export)
    stranger.initiator = "iqn.2026-11.org.example:other"
    without = KernelInitiator(right.portal, right.iqn, right.initiator)
    for refused in (wrong, without, stranger):
        with pytest.raises(IscsiadmFailed) as caught:
            refused.login()
        assert caught.value.code == IscsiadmFailed.AUTHENTICATION
        refused.logout()
    assert house.target.sessions() == []


def test_each_connection_has_its_own_mutual_secret(house: House, iscsid: None) -> None:
    first = connection("node1", mutual=Credentials("proof1", "proof-of-target1"))
    second = connection("node2", mutual=Credentials("proof2", "proof-of-target2"))
    third = connection("node3")
    export = house.exported(first, second, third)
    for who in (first, second, third):
        assert house.initiator(export, who).login_error() is None
    with house.kernel(export, first):
        pass
    doubting = house.initiator(export, first)
    doubting.mutual = ("proof2", "proof-of-target2")
    assert doubting.login_error() is not None
    rotated = dataclasses.replace(first, mutual=Credentials("proof4", "proof-of-target4"))
    plain = dataclasses.replace(second, mutual=None)
    house.target.ensure_export(dataclasses.replace(export, connections=(rotated, plain)))
    for who in (rotated, plain):
        assert house.initiator(export, who).login_error() is None
    assert house.target.inventory()[0].mutuals == {"proof4"}


def test_long_secrets_and_new_ones(house: House) -> None:
    long = Connection("iqn.2026-11.org.example:node1", Credentials("u" * 128, "s" * 128))
    export = house.exported(long)
    with house.initiator(export).bare():
        pass
    almost = dataclasses.replace(long, credentials=Credentials("u" * 128, "s" * 127 + "t"))
    with pytest.raises(InitiatorError), house.initiator(export, almost).bare():
        pass
    house.target.ensure_export(dataclasses.replace(export, connections=(almost,)))
    with house.initiator(export, almost).bare():
        pass
    with pytest.raises(InitiatorError), house.initiator(export, long).bare():
        pass


def test_a_read_only_export_refuses_writes(house: House, iscsid: None) -> None:
    export = house.exported(read_only=True)
    export.path.chmod(0o444)
    initiator = house.initiator(export)
    initiator.read(0, 4096, 0)
    with pytest.raises(InitiatorError, match="write protected"):
        initiator.write(0, 7, 4096)
    with initiator.bare() as bare, pytest.raises(InitiatorError, match="status 2"):
        bare.command(b"\x93\x08" + bytes(11) + b"\x08\0\0", 0)  # WRITE SAME with UNMAP, as a hostile initiator might
    with house.kernel(export) as kernel:
        assert kernel.read_only
    assert not any(export.path.read_bytes())


def test_the_lun_asks_for_flushes_and_does_not_claim_fua(house: House) -> None:
    """A loop device has a cache to flush and knows no FUA, which LIO would drop without a word."""
    with house.initiator(house.exported()).bare() as bare:
        answer = bare.command(b"\x1a\0\x08\0\xff\0", 255)  # MODE SENSE (6), caching page
        descriptors = answer[3]
        assert not answer[2] & 0x10, "DPOFUA"
        page = answer[4 + descriptors :]
        assert page[0] & 0x3F == 8
        assert page[2] & 0x04, "WCE"
        with pytest.raises(InitiatorError, match="status 2"):
            bare.command(b"\x28\x08\0\0\0\0\0\0\x08\0", 4096)  # READ (10) with FUA


def test_data_and_discards_reach_the_file(house: House) -> None:
    export = house.exported()
    initiator = house.initiator(export)
    initiator.write(MIB, 7, 8 * MIB)
    with export.path.open("rb") as file:
        assert os.pread(file.fileno(), 8 * MIB, MIB) == b"\7" * 8 * MIB
    full = export.path.stat().st_blocks
    initiator.discard(MIB, 8 * MIB)
    assert export.path.stat().st_blocks < full // 4
    initiator.read(MIB, 8 * MIB, 0)


def test_a_file_is_served_with_direct_io(house: House) -> None:
    export = house.exported()
    listed = subprocess.run(
        ["losetup", "--noheadings", "--list", "--output", "DIO,AUTOCLEAR", "--associated", export.path],
        check=True,
        capture_output=True,
        text=True,
    )
    assert listed.stdout.split() == ["1", "1"]
    house.target.remove(export.volume_id)
    assert not subprocess.run(["losetup", "--associated", export.path], capture_output=True, check=True).stdout


def test_an_export_that_is_right_is_not_touched(house: House) -> None:
    export = house.exported()
    steps: list[str] = []
    target = house.another(trace=steps.append)
    target.open_portals()
    with Writer(house.initiator(export)) as writer:
        sessions, state = house.target.sessions(), house.target.inventory()
        for _ in range(20):
            target.ensure_export(export)
        writer.wait_rounds(1)
        assert (house.target.sessions(), house.target.inventory()) == (sessions, state)
        assert writer.stop() == []
    assert steps == []
    assert lost(export.path, writer.expected) == []


def test_inventory_tells_what_is_there(house: House) -> None:
    export = house.exported(connection("node1"), connection("node2"), size=37 * MIB, read_only=True)
    (state,) = house.target.inventory()
    assert (state.volume_id, state.tid, state.path) == (export.volume_id, export.tid, export.path)
    assert (state.size, state.read_only, state.online, state.complete) == (37 * MIB, True, True, True)
    assert state.initiators == {who.initiator for who in export.connections}
    assert state.usernames == {who.credentials.username for who in export.connections}
    assert (state.iqn, state.mutuals, state.networks) == (
        names.target_name(PREFIX, export.volume_id),
        frozenset(),
        frozenset(),
    )


def test_sessions_tell_who_and_how_many(house: House, iscsid: None) -> None:
    export, other = house.exported(), house.exported(connection("node9"))
    with house.initiator(export).bare(source="127.0.0.5"), house.kernel(other):
        house.wait_sessions(2)
        found = {(session.volume_id, session.initiator, session.address) for session in house.target.sessions()}
        assert found == {
            (export.volume_id, export.connections[0].initiator, "127.0.0.5"),
            (other.volume_id, other.connections[0].initiator, "127.0.0.1"),
        }
        with house.initiator(export).bare(source="127.0.0.6"):
            house.wait_sessions(3)
            mine = [session for session in house.target.sessions() if session.volume_id == export.volume_id]
            assert [session.initiator for session in mine] == [export.connections[0].initiator] * 2
    house.wait_sessions(0)


def test_an_alias_cannot_lie_about_the_address(house: House) -> None:
    export = house.exported()
    alias = "x\nLIO Session ID: 99 \n[iSCSI Connections]\nCID: 7\n   Address 10.9.8.7 TCP\n"
    with house.initiator(export).bare(alias=alias):
        house.wait_sessions(1)
        (session,) = house.target.sessions()
        assert session.address == "127.0.0.1"
        assert session.session_id != 99


def test_peers_come_and_go(house: House) -> None:
    staying, leaving = connection("staying"), connection("leaving")
    export = house.exported(leaving, staying, read_only=True)
    with house.initiator(export, staying).bare() as reader:
        house.wait_sessions(1)
        (session,) = house.target.sessions()
        for round_number in range(3):
            comer = connection(f"comer{round_number}")
            house.target.ensure_export(dataclasses.replace(export, connections=(staying, comer)))
            assert house.initiator(export, comer).login_error() is None
            assert AUTHENTICATION in (house.initiator(export, leaving).login_error() or "")
            leaving = comer
        assert house.target.sessions() == [session]
        assert reader.command(b"\x28\0\0\0\0\0\0\0\x08\0", 4096) == bytes(4096)
    assert house.target.inventory()[0].initiators == {staying.initiator, leaving.initiator}


def test_another_backing_or_mode_needs_an_idle_export(house: House) -> None:
    export, other = house.exported(), house.export()
    for changed in (dataclasses.replace(export, path=other.path), dataclasses.replace(export, read_only=True)):
        with Writer(house.initiator(export)) as writer:
            with pytest.raises(TargetBusy) as caught:
                house.target.ensure_export(changed)
            assert {s.initiator for s in caught.value.sessions} == {export.connections[0].initiator}
            writer.wait_rounds(1)
            assert writer.stop() == []
        house.wait_sessions(0)
        house.target.ensure_export(changed)
        state = house.target.inventory()[0]
        assert (state.path, state.read_only, state.complete) == (changed.path, changed.read_only, True)
        assert house.initiator(changed).login_error() is None
        house.target.ensure_export(export)


def test_a_file_put_in_the_place_of_the_backing_is_noticed(house: House) -> None:
    export = house.exported()
    fresh = export.path.with_suffix(".new")
    fresh.touch()
    os.truncate(fresh, export.size)
    os.replace(fresh, export.path)
    assert house.target.inventory()[0].path is None
    house.target.ensure_export(export)
    house.initiator(export).write(0, 9, MIB)
    assert export.path.read_bytes()[:MIB] == b"\x09" * MIB
    assert house.target.inventory()[0].path == export.path


def test_remove_is_repeatable(house: House, lio: Path) -> None:
    export = house.exported()
    for volume_id in (export.volume_id, export.volume_id, uuid4()):
        house.target.remove(volume_id)
        assert house.target.drain(volume_id) == []
    assert house.target.inventory() == []
    assert sorted(path.name for path in (lio / "core").iterdir()) == ["alua"]
    assert house.initiator(export).login_error() is not None


def test_identity_is_the_same_after_a_reboot(house: House, iscsid: None) -> None:
    export, other = house.exported(), house.exported()
    before = _identity(house, export)
    wipe_lio()
    assert house.target.inventory() == []
    for volume in (other, export):
        house.target.ensure_export(volume)
    assert _identity(house, export) == before
    naa, serial = names.naa(export.volume_id), names.serial(export.volume_id)
    assert before[:2] == (f"naa.{naa}", f"3{naa}")
    assert before[2] == b"\0\x80\0\x21" + serial.encode() + b"\0"
    assert "STRATUS" in house.initiator(export).inquiry()


def _identity(house: House, export: Export) -> tuple[object, ...]:
    with house.kernel(export) as kernel:
        return kernel.wwid, kernel.by_id, kernel.vpd(0x80), kernel.vpd(0x83)


def test_portals_open_only_when_everything_is_there(house: House) -> None:
    """A service that starts builds first; what its predecessor left goes on meanwhile."""
    standing = house.exported()
    successor = house.another()
    fresh = house.export()
    with Writer(house.initiator(standing)) as writer:
        for export in (standing, fresh):
            successor.ensure_export(export)
        assert house.initiator(fresh).login_error() is not None
        assert all(state.complete for state in successor.inventory())
        successor.open_portals()
        assert house.initiator(fresh).login_error() is None
        writer.wait_rounds(1)
        assert writer.stop() == []


def test_other_portals_replace_those_there_are(house: House) -> None:
    export = house.exported()
    right = house.initiator(export)
    moved = house.another(portals=[("127.0.0.1", 3262), ("::1", 3262)])
    moved.open_portals()
    assert not house.target.inventory()[0].complete
    assert moved.inventory()[0].complete
    assert right.login_error() is not None
    for portal in ("127.0.0.1:3262", "[::1]:3262"):
        right.portal = portal
        assert right.login_error() is None
        with right.bare():
            house.wait_sessions(1)
            assert moved.sessions()[0].address in ("127.0.0.1", "::1")
        house.wait_sessions(0)


def test_a_portal_that_cannot_be_had_is_refused(house: House) -> None:
    house.exported()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        elsewhere = house.another(portals=[taken.getsockname()])
        with pytest.raises(TargetRefused, match="NetworkPortal"):
            elsewhere.open_portals()


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("attrib/authentication", "0"),
        ("attrib/generate_node_acls", "1"),
        ("param/AuthMethod", "CHAP,None"),
        ("enable", "0"),
        ("acls/INITIATOR/attrib/authentication", "0"),
        ("acls/INITIATOR/lun_1/write_protect", "1"),
        ("acls/INITIATOR/auth/password", "another-secret"),
    ],
)
def test_what_was_altered_is_put_right(house: House, lio: Path, attribute: str, value: str) -> None:
    export = house.exported()
    right = house.initiator(export)
    group = lio / "iscsi" / right.iqn / "tpgt_1"
    (group / attribute.replace("INITIATOR", right.initiator)).write_text(value)
    assert house.target.inventory()[0].complete == attribute.endswith(("write_protect", "password"))
    house.target.ensure_export(export)
    assert house.target.inventory()[0].complete
    right.write(0, 1, 4096)
    assert Initiator(right.portal, right.iqn, right.initiator).login_error() is not None


def test_volumes_of_one_slot_do_not_meet(house: House) -> None:
    """Backstores lie in slots that follow from the CRC of the id, which is the same for ids that differ by this."""
    first = house.export()
    second = dataclasses.replace(house.export(), volume_id=UUID(int=first.volume_id.int ^ 0x196300777))
    assert lio_configfs.slots(first.volume_id) == lio_configfs.slots(second.volume_id)
    for export in (first, second):
        house.target.ensure_export(export)
    house.target.remove(first.volume_id)
    assert {state.volume_id for state in house.target.inventory()} == {second.volume_id}
    house.target.ensure_export(first)
    for export in (first, second):
        assert house.initiator(export).login_error() is None


def test_no_call_for_one_volume_lists_them_all(house: House, lio: Path) -> None:
    """What keeps the cost of an export flat: rtslib's ways of finding things look through all targets."""
    house.exported()
    listed: list[str] = []
    scanning = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if scanning and event in ("os.listdir", "os.scandir"):
            listed.append(str(arguments[0]))

    sys.addaudithook(hook)
    export = house.export()
    house.target.ensure_export(export)
    house.target.ensure_export(export)
    house.target.drain(export.volume_id)
    house.target.remove(export.volume_id)
    scanning = False
    assert listed, "the hook sees nothing"
    assert not {str(lio), str(lio / "core"), str(lio / "iscsi"), "/sys/block"} & set(listed)


def test_unmounted_configfs_is_not_taken_for_an_empty_one(house: House) -> None:
    """Whether LIO is a module or part of the kernel."""
    export = house.exported()
    subprocess.run(["umount", "--lazy", CONFIGFS], check=True)
    with house.initiator(export).bare():
        assert [state.complete for state in house.target.inventory()] == [True]
        house.wait_sessions(1)
        for call in (house.target.remove, house.another().remove):
            subprocess.run(["umount", "--lazy", CONFIGFS], check=True)
            with pytest.raises(TargetBusy):
                call(export.volume_id)


def test_what_is_not_configfs_is_not_taken_for_an_empty_one(house: House) -> None:
    export, target = house.exported(), house.target
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", CONFIGFS], check=True)
    try:
        for call in (target.sessions, target.inventory, lambda: target.drain(export.volume_id)):
            with pytest.raises(TargetUnavailable, match="LIO cannot be"):
                call()
        with pytest.raises(TargetUnavailable, match="LIO cannot be"):
            target.remove(export.volume_id)
        with pytest.raises(TargetUnavailable, match="LIO cannot be"):
            target.ensure_export(export)
    finally:
        subprocess.run(["umount", CONFIGFS], check=True)
    assert target.inventory()[0].complete


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: dataclasses.replace(e, size=e.size + MIB), "bytes, not"),
        (lambda e: dataclasses.replace(e, path=e.path.with_name("absent")), "No such file"),
        (lambda e: dataclasses.replace(e, path=Path("relative")), "path"),
        (lambda e: dataclasses.replace(e, path=e.path.with_name("a,b")), "path"),
        (lambda e: dataclasses.replace(e, path=Path("/" + "x" * 500)), "path"),
        (lambda e: _with(e, networks=("127.0.0.0/8",)), "networks"),
        (lambda e: _with(e, initiator="iqn.2026-11.org.example:UPPER"), "normal form"),
        (lambda e: _with(e, initiator="naa.6" + "0" * 31), "16 digits"),
        (lambda e: _with(e, credentials=Credentials("u", "NULLsecretsecret")), "NULL"),
        (lambda e: _with(e, credentials=Credentials("NULLu", "secretsecret1")), "NULL"),
        (lambda e: _with(e, mutual=Credentials("m", e.connections[0].credentials.password)), "both directions"),
        (lambda e: dataclasses.replace(e, connections=(connection("a"), connection("a"))), "2 times"),
    ],
)
def test_what_lio_cannot_do_is_refused_before_anything_changes(
    house: House, spoil: Callable[[Export], Export], message: str
) -> None:
    with pytest.raises(TargetRefused, match=message):
        house.target.ensure_export(spoil(house.export()))
    assert house.target.inventory() == []


def _with(export: Export, **changes: object) -> Export:
    (only,) = export.connections
    return dataclasses.replace(export, connections=(dataclasses.replace(only, **changes),))  # type: ignore[arg-type]


def test_a_device_that_is_in_use_is_refused(house: House, suspendable: Suspendable) -> None:
    first = house.exported(path=suspendable.path)
    with pytest.raises(TargetRefused, match="in use"):
        house.exported(path=suspendable.path)
    assert house.initiator(first).login_error() is None


def test_a_file_system_moves_from_node_to_node(house: House, iscsid: None, tmp_path: Path) -> None:
    export = house.exported(connection("node1"), size=320 * MIB)
    with house.kernel(export) as first:
        subprocess.run(["mkfs.ext4", "-q", first.device], check=True)
        subprocess.run(["mount", first.device, tmp_path], check=True)
        (tmp_path / "file").write_bytes(b"data" * MIB)
        subprocess.run(["umount", tmp_path], check=True)
    house.wait_sessions(0)
    assert house.target.drain(export.volume_id) == []
    house.target.remove(export.volume_id)
    moved = dataclasses.replace(export, connections=(connection("node2"),))
    house.target.ensure_export(moved)
    with house.kernel(moved) as second:
        subprocess.run(["fsck.ext4", "-fn", second.device], check=True)
        subprocess.run(["mount", "-o", "ro", second.device, tmp_path], check=True)
        assert (tmp_path / "file").read_bytes() == b"data" * MIB
        subprocess.run(["umount", tmp_path], check=True)

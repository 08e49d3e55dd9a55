"""Exports as initiators meet them."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from iscsi import names
from iscsi.target import Connection, Credentials, Export, TargetBusy, TargetError, TargetRefused, TargetUnavailable
from iscsi.tgt import TgtTarget
from iscsi.tgt_daemon import TgtDaemon
from iscsi.tgt_ipc import Mode, Op, TgtIpc
from tests.iscsi.conftest import MIB, PREFIX, Brake, House, connection
from tests.support.initiator import Bare, Initiator, InitiatorError, Writer, lost, wait_until

REFUSED_CHAP, REFUSED_NAME = "(513)", "(515)"


def test_only_the_right_secret_opens(house: House) -> None:
    export = house.exported()
    right = house.initiator(export)
    assert right.login_error() is None
    wrong = Initiator(house.portal, right.iqn, right.initiator, right.username, "not-the-secret")
    assert REFUSED_CHAP in (wrong.login_error() or "")
    without = Initiator(house.portal, right.iqn, right.initiator)
    assert REFUSED_CHAP in (without.login_error() or "")


def test_the_secret_alone_does_not_open(house: House) -> None:
    right = house.initiator(house.exported())
    other = Initiator(house.portal, right.iqn, "iqn.2026-11.org.example:other", right.username, right.password)
    assert REFUSED_NAME in (other.login_error() or "")
    assert right.iqn not in other.ls()
    assert right.iqn in right.ls()


def test_mutual_chap(house: House) -> None:
    export = house.exported(connection("node1", mutual=Credentials("proof", "proof-of-target")))
    assert house.initiator(export).login_error() is None
    assert house.target.inventory()[0].mutuals == {"proof"}
    doubting = house.initiator(export)
    doubting.mutual = ("proof", "another-secret-1")
    assert doubting.login_error() is not None


def test_mutual_chap_can_be_changed_and_dropped(house: House) -> None:
    export = house.exported(connection("node1", mutual=Credentials("proof", "proof-of-target")))
    (old,) = export.connections
    rotated = dataclasses.replace(old, mutual=Credentials("proof2", "proof-of-target2"))
    house.target.ensure_export(dataclasses.replace(export, connections=(rotated,)))
    assert house.initiator_of(export.volume_id, rotated).login_error() is None
    plain = dataclasses.replace(old, mutual=None)
    house.target.ensure_export(dataclasses.replace(export, connections=(plain,)))
    assert house.target.inventory()[0].mutuals == frozenset()
    assert house.initiator_of(export.volume_id, plain).login_error() is None


def test_the_target_refuses_writes_to_a_read_only_export(house: House) -> None:
    export = house.exported(read_only=True)
    initiator = house.initiator(export)
    initiator.read(0, 4096, 0)
    with pytest.raises(InitiatorError, match="write protected"):
        initiator.write(0, 7, 4096)
    with initiator.bare() as bare, pytest.raises(InitiatorError, match="status 2"):
        bare.command(b"\x93\x08" + bytes(11) + b"\x08\0\0", 0)  # WRITE SAME with UNMAP, as a hostile initiator might
    assert not any(export.path.read_bytes())


def test_data_written_is_in_the_backing_after_a_flush(slow_house: House, brake: Brake) -> None:
    export = slow_house.exported()
    initiator = slow_house.initiator(export)
    before = brake.syncs()
    initiator.io("write -P 7 1M 64k", "flush")
    assert brake.syncs() > before
    with export.path.open("rb") as file:
        assert os.pread(file.fileno(), 65536, MIB) == b"\7" * 65536
    before = brake.syncs()
    initiator.io("write -f -P 8 0 4k")
    assert brake.syncs() > before


def test_the_lun_reports_a_write_back_cache(house: House) -> None:
    with house.initiator(house.exported()).bare() as bare:
        page = bare.command(b"\x1a\x08\x08\0\xff\0", 255)[4:]  # MODE SENSE (6), caching page
    assert page[0] & 0x3F == 8
    assert page[2] & 0x04


def test_discard_punches_holes(house: House) -> None:
    export = house.exported()
    initiator = house.initiator(export)
    initiator.write(0, 7, 8 * MIB)
    full = export.path.stat().st_blocks
    initiator.discard(0, 8 * MIB)
    assert export.path.stat().st_blocks < full // 4
    initiator.read(0, 8 * MIB, 0)


def test_an_export_that_is_right_is_not_touched(house: House) -> None:
    export = house.exported()
    with Writer(house.initiator(export)) as writer:
        sessions = house.target.sessions()
        state = house.target.inventory()
        for _ in range(20):
            house.target.ensure_export(export)
        writer.wait_rounds(1)
        assert house.target.sessions() == sessions
        assert house.target.inventory() == state
        assert writer.stop() == []


def test_inventory_tells_what_is_there(house: House) -> None:
    export = house.exported(size=37 * MIB)
    (state,) = house.target.inventory()
    assert (state.volume_id, state.tid, state.path) == (export.volume_id, export.tid, export.path)
    assert (state.online, state.read_only, state.complete, state.size) == (True, False, True, 37 * MIB)
    assert state.iqn == names.target_name(PREFIX, export.volume_id)
    assert state.initiators == {export.connections[0].initiator}
    assert state.usernames == {export.connections[0].credentials.username}
    assert not state.networks


def test_read_only_peers_come_and_go_without_disturbing_another(house: House) -> None:
    """Accounts are rotated at every slot while one peer reads; it keeps its session, and the revoked are refused."""
    staying, leaving = connection("staying"), connection("leaving")
    export = house.exported(leaving, staying, read_only=True)
    with house.initiator_of(export.volume_id, staying).bare() as reader:
        (session,) = house.target.sessions()
        for round_number in range(6):
            comer = connection(f"comer{round_number}")
            house.target.ensure_export(dataclasses.replace(export, connections=(staying, comer)))
            assert house.initiator_of(export.volume_id, comer).login_error() is None
            assert REFUSED_NAME in (house.initiator_of(export.volume_id, leaving).login_error() or "")
            assert house.initiator_of(export.volume_id, staying).login_error() is None
            leaving = comer
        assert session in house.target.sessions()
        assert reader.command(b"\x28\0\0\0\0\0\0\0\x08\0", 4096) == bytes(4096)
    assert house.target.inventory()[0].usernames == {staying.credentials.username, leaving.credentials.username}


def test_a_revoked_peer_cannot_borrow_the_name_of_one_that_stays(house: House) -> None:
    staying, leaving = connection("staying"), connection("leaving")
    export = house.exported(leaving, staying, read_only=True)
    house.target.ensure_export(dataclasses.replace(export, connections=(staying,)))
    borrowed = dataclasses.replace(staying, credentials=leaving.credentials)
    assert REFUSED_CHAP in (house.initiator_of(export.volume_id, borrowed).login_error() or "")


def test_many_peers(house: House) -> None:
    """More than the 16 slots tgtd begins with."""
    peers = tuple(connection(f"peer{number}") for number in range(20))
    export = house.exported(*peers, read_only=True)
    house.target.ensure_export(dataclasses.replace(export, connections=peers[::2]))
    assert house.initiator_of(export.volume_id, peers[18]).login_error() is None
    assert REFUSED_NAME in (house.initiator_of(export.volume_id, peers[19]).login_error() or "")
    assert len(house.target.inventory()[0].usernames) == 10


def test_another_backing_or_mode_needs_an_idle_export(house: House) -> None:
    export, other = house.exported(), house.export()
    for changed in (dataclasses.replace(export, path=other.path), dataclasses.replace(export, read_only=True)):
        with Writer(house.initiator(export)) as writer:
            with pytest.raises(TargetBusy) as caught:
                house.target.ensure_export(changed)
            assert [s.initiator for s in caught.value.sessions] == [export.connections[0].initiator]
            writer.wait_rounds(1)
            assert writer.stop() == []
        house.target.ensure_export(changed)
        state = house.target.inventory()[0]
        assert (state.path, state.read_only, state.complete) == (changed.path, changed.read_only, True)
        assert house.initiator(changed).login_error() is None
        house.target.ensure_export(export)


class Interrupted(Exception):
    pass


def _interrupt_at(number: int, seen: list[str]) -> Callable[[str], None]:
    def trace(step: str) -> None:
        seen.append(step)
        if len(seen) == number:
            raise Interrupted(step)

    return trace


def test_a_half_made_export_is_closed_and_can_be_completed(house: House) -> None:
    """Stop after each step: nobody gets in without CHAP, nobody without a LUN, and a repeat ends well."""
    steps: list[str] = []
    for number in range(1, 100):
        mutual = Credentials(f"proof{number}", "proof-of-target")
        export = house.export(connection("node1", mutual=mutual), connection("node2"), read_only=True)
        seen: list[str] = []
        target = TgtTarget(house.daemon.ipc, PREFIX, trace=_interrupt_at(number, seen))
        try:
            target.ensure_export(export)
        except Interrupted:
            complete = False
        else:
            complete = True
        right = house.initiator(export)
        intruder = Initiator(house.portal, right.iqn, right.initiator)
        assert intruder.login_error() is not None, seen
        if right.login_error() is None:
            assert right.size() == export.size, seen
        house.target.ensure_export(export)
        assert house.target.inventory()[-1].complete, seen
        assert right.login_error() is None, seen
        assert names.serial(export.volume_id).encode() in right.vpd(0x80), seen
        assert house.initiator(export, 1).login_error() is None, seen
        house.target.remove(export.volume_id)
        if complete:
            steps = seen
            break
    assert steps[:4] == ["target", "guard", "lun", "parameters"]
    assert steps[-2:] == ["acl", "acl"]
    assert steps.index("account bound") < steps.index("acl")


KILLED = """
import os, pickle, signal, sys
from iscsi.tgt import TgtTarget
from iscsi.tgt_ipc import Mode, Op, TgtIpc
directory, name, prefix, step, export = pickle.loads(sys.stdin.buffer.read())
def trace(done):
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)
TgtTarget(TgtIpc(directory, name), prefix, trace=trace).ensure_export(export)
"""


@pytest.mark.parametrize("step", ["lun", "account", "hole", "account dismissed"])
def test_a_killed_hand_leaves_what_the_next_one_finishes(house: House, step: str) -> None:
    """ "hole": killed between two requests where tgtd would crash if it were asked to list its targets."""
    first, second, third = connection("node1"), connection("node2"), connection("node3")
    export = house.export(first, second, read_only=True)
    if step != "lun":
        house.target.ensure_export(export)
    wanted = dataclasses.replace(export, connections=(second, third))
    pid = house.daemon.pid
    errand = (house.daemon.ipc.directory, house.daemon.ipc.name, PREFIX, step, wanted)
    killed = subprocess.run([sys.executable, "-c", KILLED], input=pickle.dumps(errand), check=False, timeout=30)
    assert killed.returncode == -9
    house.target.ensure_export(wanted)
    assert house.daemon.pid == pid
    (state,) = house.target.inventory()
    assert state.complete
    assert state.usernames == {second.credentials.username, third.credentials.username}
    for who in (second, third):
        assert house.initiator_of(export.volume_id, who).login_error() is None
    assert house.initiator_of(export.volume_id, first).login_error() is not None


def test_remove_is_repeatable(house: House) -> None:
    export = house.exported()
    house.target.remove(export.volume_id)
    assert house.target.inventory() == []
    house.target.remove(export.volume_id)
    house.target.remove(uuid4())
    assert house.target.drain(uuid4()) == []
    assert house.initiator(export).login_error() is not None


def test_targets_of_others_are_left_alone(house: House) -> None:
    house.daemon.ipc.create_target(900, "iqn.2026-11.org.example.other:disk")
    export = house.exported()
    assert house.target.foreign() == ["iqn.2026-11.org.example.other:disk"]
    assert [state.volume_id for state in house.target.inventory()] == [export.volume_id]
    with pytest.raises(TargetRefused, match=r"belongs to iqn\.2026-11\.org\.example\.other:disk"):
        house.target.ensure_export(dataclasses.replace(house.export(), tid=900))
    house.target.remove(export.volume_id)
    assert house.target.foreign() == ["iqn.2026-11.org.example.other:disk"]


def test_an_address_in_the_acl_is_taken_out(house: House) -> None:
    """tgtd is content with the name or with the address: that is why a connection's networks are refused."""
    export = house.exported()
    right = house.initiator(export)
    house.daemon.ipc._call(Op.BIND, Mode.TARGET, tid=export.tid, payload="initiator-address=127.0.0.1")
    with Bare(right, source="127.0.0.2") as elsewhere:
        elsewhere.authenticate()
        elsewhere.enter_full_feature()
        assert {session.address for session in house.target.sessions()} == {"127.0.0.2"}
    stranger = dataclasses.replace(export.connections[0], initiator="iqn.2026-11.org.example:stranger")
    assert house.initiator_of(export.volume_id, stranger).login_error() is None
    assert house.target.inventory()[0].networks == {"127.0.0.1"}
    house.target.ensure_export(export)
    assert not house.target.inventory()[0].networks
    assert house.initiator_of(export.volume_id, stranger).login_error() is not None
    assert right.login_error() is None


def test_a_target_under_another_number_is_made_anew(house: House) -> None:
    export = house.exported()
    moved = dataclasses.replace(export, tid=77)
    house.target.ensure_export(moved)
    assert [state.tid for state in house.target.inventory()] == [77]
    assert house.initiator(moved).login_error() is None


def test_identity_is_the_same_on_any_tgtd_and_after_a_restart(
    house: House, daemons: Callable[..., TgtDaemon], tmp_path: Path
) -> None:
    export = house.exported()
    pages = [house.initiator(export).vpd(page) for page in (0x80, 0x83)]
    assert bytes.fromhex(names.naa(export.volume_id)) in pages[1]
    house.daemon.stop()
    house.start()
    house.target.ensure_export(export)
    assert [house.initiator(export).vpd(page) for page in (0x80, 0x83)] == pages
    other = House(tmp_path, daemons("other"))
    other.start()
    other.exported()
    other.target.ensure_export(dataclasses.replace(export, tid=export.tid + 1))
    assert other.initiator(export).vpd(0x80) == pages[0]
    assert other.initiator(export).vpd(0x83) != pages[1]  # why the number is kept for each volume
    other.target.remove(export.volume_id)
    other.target.remove(other.target.inventory()[0].volume_id)
    other.target.ensure_export(export)
    assert [other.initiator(export).vpd(page) for page in (0x80, 0x83)] == pages
    assert "STRATUS" in other.initiator(export).inquiry()


def test_a_writer_survives_the_death_of_tgtd(house: House) -> None:
    export = house.exported()
    with Writer(house.initiator(export)) as writer:
        house.daemon.kill()
        house.daemon.start()
        house.target.ensure_export(export)
        house.open()
        writer.wait_rounds(3)
        assert writer.stop() == []
    assert lost(export.path, writer.expected) == []


def _lie(victim: Export) -> str:
    """An alias, printed unescaped by tgtd, that ends the liar's own lines and begins those of another target."""
    lines = "\n    LUN information:\n    Account information:\n    ACL information:\n        ALL\n"
    header = f"Target {victim.tid}: {names.target_name(PREFIX, victim.volume_id)}\n"
    return f"none{lines}{header}{lines}"


def test_an_initiator_cannot_talk_its_way_into_the_listing(house: House) -> None:
    exports = [house.exported() for _ in range(3)]
    truth = {state.volume_id: state for state in house.target.inventory()}
    for liar in exports:
        for victim in exports:
            with Bare(house.initiator(liar), alias=_lie(victim)) as session:
                session.authenticate()
                session.enter_full_feature()
                assert "        ALL\n" in house.daemon.ipc.show_targets()
                for state in house.target.inventory():
                    assert state == truth[state.volume_id]
                seen = {state.volume_id for state in house.target.inventory()}
                assert seen >= truth.keys() - {liar.volume_id}
                for export in exports:
                    house.target.ensure_export(export)
            wait_until(lambda: not house.target.sessions())
    assert {state.volume_id: state for state in house.target.inventory()} == truth


def test_a_liar_is_fenced_all_the_same(house: House) -> None:
    export, other = house.exported(), house.exported()
    with Bare(house.initiator(export), alias=_lie(other)) as liar:
        liar.authenticate()
        liar.enter_full_feature()
        wait_until(lambda: house.target.drain(export.volume_id) == [])
        assert house.initiator(export).login_error() is not None
        house.target.remove(export.volume_id)
    assert house.initiator(other).login_error() is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: dataclasses.replace(e, size=e.size + MIB), "bytes, not"),
        (lambda e: dataclasses.replace(e, path=e.path.with_name("absent")), "No such file"),
        (lambda e: dataclasses.replace(e, path=Path("relative")), "path"),
        (lambda e: dataclasses.replace(e, path=e.path.with_name("a,b")), "path"),
        (lambda e: dataclasses.replace(e, path=Path("/" + "x" * 1000)), "path"),
        (lambda e: _with(e, networks=("127.0.0.0/8",)), "networks"),
        (lambda e: _with(e, initiator="iqn.2026-11.org.example:UPPER"), "normal form"),
        (lambda e: _with(e, credentials=Credentials("stratus.slot-1", "secretsecret1")), "name of our own"),
        (lambda e: _with(e, mutual=Credentials("m", e.connections[0].credentials.password)), "both directions"),
        (lambda e: dataclasses.replace(e, connections=(*e.connections, _twin(e))), "two secrets"),
        (
            lambda e: dataclasses.replace(
                e,
                connections=(
                    connection("a", mutual=Credentials("m1", "proof-of-target")),
                    connection("b", mutual=Credentials("m2", "proof-of-target")),
                ),
            ),
            "one mutual account",
        ),
    ],
)
def test_what_tgtd_cannot_do_is_refused_before_anything_changes(
    house: House, spoil: Callable[[Export], Export], message: str
) -> None:
    with pytest.raises(TargetRefused, match=message):
        house.target.ensure_export(spoil(house.export()))
    assert house.target.inventory() == []


def _with(export: Export, **changes: object) -> Export:
    (only,) = export.connections
    return dataclasses.replace(export, connections=(dataclasses.replace(only, **changes),))  # type: ignore[arg-type]


def _twin(export: Export) -> Connection:
    username = export.connections[0].credentials.username
    return Connection("iqn.2026-11.org.example:twin", Credentials(username, "another-secret"))


@pytest.mark.parametrize(
    ("username", "password"),
    [("", "secretsecret1"), ("a,b", "secretsecret1"), ("a b", "secretsecret1"), ("u", "short"), ("u", "x" * 129)],
)
def test_bad_credentials_are_refused(username: str, password: str) -> None:
    with pytest.raises(ValueError, match="CHAP"):
        Credentials(username, password)


def test_a_secret_is_not_shown() -> None:
    assert "secretsecret1" not in repr(Connection("iqn.2026-11.org.example:x", Credentials("u", "secretsecret1")))


def test_without_tgtd_every_call_says_so(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        target = TgtTarget(TgtIpc(directory, "tgtd.sock.7"), PREFIX)
        for call in (target.sessions, target.inventory, target.foreign, lambda t=target: t.remove(uuid4())):
            with pytest.raises(TargetUnavailable):
                call()


def test_requests_that_tgtd_refuses_carry_its_code(house: House) -> None:
    with pytest.raises(TargetRefused) as caught:
        house.daemon.ipc.create_lun(99, house.directory / "x")
    assert caught.value.code == 4
    assert "no target" in str(caught.value)
    assert isinstance(caught.value, TargetError)
    with pytest.raises(TargetRefused, match="too long"):
        house.daemon.ipc.update_lun(99, "x" * 9000)

"""Detach is a fence: until the last write landed nobody else gets the volume, after it the old initiator is nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.support.initiator import InitiatorError, Writer, lost
from tests.support.service import Api, RunningService, initiator_of, wait_until
from tests.support.shim import Brake

ONE, TWO = "iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"
MIB = 1 << 20
AT_ONCE = {"Prefer": "wait=0"}


def refusal(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def ask_to_attach(api: Api, volume: str, initiator: str, mode: str = "rw", node: str = "test") -> requests.Response:
    wish = {"instance_id": "test", "node": node, "initiator": initiator, "mode": mode}
    return api.post(f"/v1/volumes/{volume}/attachments", json=wish)


def test_a_write_in_flight_keeps_the_volume(
    braked: RunningService, brake: Callable[[str], Brake], plain_directory: Path
) -> None:
    attachment, one = braked.attached(ONE)
    volume, path = attachment["volume_id"], f"/v1/attachments/{attachment['id']}"
    backing = plain_directory / "volumes" / f"{volume}.raw"
    with Writer(one) as writer:
        writer.wait_rounds(2)
        held = brake("write")
        wait_until(held.holds, 60, "a write in flight")

        fence = braked.admin.delete(path, headers=AT_ONCE)
        assert fence.status_code == 202
        again = braked.admin.delete(path, headers=AT_ONCE)
        assert again.status_code == 202
        wait_until(lambda: braked.admin.show(f"/v1/operations/{fence.json()['id']}")["message"], 60, "its word")
        for mode in ("rw", "ro"):
            assert refusal(ask_to_attach(braked.admin, volume, TWO, mode)) == (409, "volume-in-use")
        assert braked.admin.show(path)["state"] == "detaching"
        assert refusal(braked.admin.get(f"{path}/connection")) == (409, "attachment-ended")
        assert refusal(braked.admin.delete(f"/v1/volumes/{volume}")) == (409, "volume-in-use")
        assert braked.admin.events("attachment.detached", attachment["id"]) == []
        message = braked.admin.show(f"/v1/operations/{fence.json()['id']}")["message"]
        assert ONE in message
        assert "127.0.0.1" in message

        held.off()
        for asked in (fence, again):
            assert braked.admin.wait_operation(asked.json()["id"])["state"] == "succeeded"
        after = backing.read_bytes()
        assert writer.process.poll() is None  # it tries to come back, and may not

    assert braked.admin.show(path)["state"] == "detached"
    (receipt,) = braked.admin.events("attachment.detached", attachment["id"])
    assert receipt["detail"]["sessions_left"] == 0
    assert receipt["detail"]["target_removed"] is True
    assert lost(backing, {at: byte for at, byte in writer.expected.items() if at not in in_flight(writer)}) == []

    two = initiator_of(braked.admin.attach(volume, TWO))
    assert one.login_error() is not None
    with pytest.raises(InitiatorError):
        one.write(0, 1, 4096)
    two.io(*(f"read -P {after[at]} {at} 4096" for at in range(0, MIB, MIB // 8)))
    assert backing.read_bytes() == after


def in_flight(writer: Writer) -> set[int]:
    """Offsets of the round that was never acknowledged."""
    return {(writer.rounds * Writer.DEPTH + i) % 512 * Writer.BLOCK for i in range(Writer.DEPTH)}


def test_an_old_secret_is_never_valid_again(service: RunningService) -> None:
    attachment, before = service.attached(ONE)
    service.admin.detach(attachment["id"])
    now = initiator_of(service.admin.attach(attachment["volume_id"], ONE))  # the same volume, initiator and target
    assert (now.iqn, now.initiator) == (before.iqn, before.initiator)
    assert before.login_error() is not None
    before.username = now.username
    assert "(513)" in (before.login_error() or "")
    assert now.login_error() is None


def test_an_initiator_that_is_not_named_is_refused(service: RunningService) -> None:
    _, one = service.attached(ONE)
    one.initiator = TWO
    assert (one.login_error() or "")[-5:] in ("(515)", "(514)")  # tgt's answer, LIO's


def test_a_reader_cannot_write(service: RunningService) -> None:
    attachment, one = service.attached(ONE)
    one.write(0, 0x21, MIB)
    service.admin.detach(attachment["id"])
    reader = initiator_of(service.admin.attach(attachment["volume_id"], ONE, "ro"))
    reader.read(0, MIB, 0x21)
    with pytest.raises(InitiatorError):
        reader.write(0, 0x22, 4096)
    for command in (b"\x42" + bytes(6) + b"\0\x18", b"\x41\x08\0\0\0\0\0\x08\0\0"):  # UNMAP; WRITE SAME with UNMAP
        with reader.bare() as session, contextlib.suppress(InitiatorError):  # LIO may say that it has done it
            session.command(command, 0)
    reader.read(0, MIB, 0x21)


def test_one_reader_goes_and_the_others_stay(service: RunningService) -> None:
    volume = service.admin.make_volume(64 * MIB)["id"]
    first, second = (service.admin.attach(volume, name, "ro") for name in (ONE, TWO))
    with initiator_of(second).bare() as session:
        service.admin.detach(first["id"])
        assert session.command(b"\x00", 0) == b""
    assert initiator_of(first).login_error() is not None
    initiator_of(second).read(0, MIB, 0)
    (receipt,) = service.admin.events("attachment.detached", first["id"])
    assert receipt["detail"]["target_removed"] is False


# ---------------------------------------------------------------- who may


def test_what_a_node_attached_only_it_detaches_or_an_admin_with_force(service: RunningService) -> None:
    name = "iqn.2026-11.org.example:hypervisor1"
    owner, node, other = service.user("owner"), service.node("hv1", name), service.node("hv2", name + "b")
    volume = owner.make_volume(64 * MIB)["id"]
    attachment = node.attach(volume, name, node="hv1")
    path = f"/v1/attachments/{attachment['id']}"

    assert refusal(owner.delete(path)) == (409, "attached-by-another")
    assert refusal(owner.delete(path, params={"force": "true"})) == (403, "admin-only")
    assert other.delete(path).status_code == 404
    assert refusal(service.admin.delete(path)) == (409, "force-required")
    for reader in (owner, service.admin):
        assert refusal(reader.get(f"{path}/connection")) == (403, "not-your-connection")
    assert node.show(f"{path}/connection") == attachment["connection"]
    initiator_of(attachment).write(0, 0x31, 4096)

    service.admin.detach(attachment["id"], force="true")
    assert initiator_of(attachment).login_error() is not None
    again = node.attach(volume, name, node="hv1")
    initiator_of(again).read(0, 4096, 0x31)
    node.detach(again["id"])
    (asked, forced) = [service.admin.events("attachment.detach", a["id"])[0] for a in (again, attachment)]
    assert (asked["actor"], asked["detail"]["reason"]) == ("hv1", "asked")
    assert (forced["actor"], forced["detail"]["reason"]) == ("admin", "force")


def test_force_does_not_skip_the_drain(braked: RunningService, brake: Callable[[str], Brake]) -> None:
    name = "iqn.2026-11.org.example:hypervisor2"
    node = braked.node("hv3", name)
    attachment = node.attach(braked.admin.make_volume(64 * MIB)["id"], name, node="hv3")
    with Writer(initiator_of(attachment)) as writer:
        writer.wait_rounds(1)
        held = brake("write")
        wait_until(held.holds, 60, "a write in flight")
        path = f"/v1/attachments/{attachment['id']}"
        fence = braked.admin.delete(path, params={"force": "true"}, headers={"Prefer": "wait=2"})
        assert fence.status_code == 202
        assert braked.admin.show(path)["state"] == "detaching"
        held.off()
        assert braked.admin.wait_operation(fence.json()["id"])["state"] == "succeeded"


def test_a_node_attaches_to_itself_only_and_its_initiator_is_nobody_elses(service: RunningService) -> None:
    name = "iqn.2026-11.org.example:hypervisor3"
    node, owner = service.node("hv4", name), service.user("owner2")
    volume = owner.make_volume(64 * MIB)["id"]
    assert refusal(ask_to_attach(node, volume, name, node="hv1")) == (403, "not-this-node")
    assert refusal(ask_to_attach(node, volume, ONE, node="hv4")) == (403, "not-this-node")
    for person in (owner, service.admin):
        assert refusal(ask_to_attach(person, volume, name)) == (403, "initiator-of-a-node")
    assert service.admin.show(f"/v1/volumes/{volume}")["state"] == "available"

"""The life of a volume: what was written before is read after, whatever happens to the service between."""

from __future__ import annotations

import pytest

from tests.end_to_end.conftest import Serve
from tests.support.initiator import InitiatorError, Writer, lost
from tests.support.service import RunningService, initiator_of

ONE, TWO = "iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"
MIB = 1 << 20
IDENTITY = (0x80, 0x83)  # VPD pages: unit serial number, device identification


# ---------------------------------------------------------------- attach, detach, grow, revert


def test_data_is_found_where_the_volume_is_attached_next(service: RunningService) -> None:
    attachment, one = service.attached(ONE)
    one.write(3 * MIB, 0x51, MIB)
    identity = [one.vpd(page) for page in IDENTITY]
    service.admin.detach(attachment["id"])
    assert one.login_error() is not None
    two = initiator_of(service.admin.attach(attachment["volume_id"], TWO))
    two.read(3 * MIB, MIB, 0x51)
    two.read(0, 3 * MIB, 0)
    assert [two.vpd(page) for page in IDENTITY] == identity


def test_a_detached_volume_grows(service: RunningService) -> None:
    attachment, one = service.attached(ONE)
    one.write(63 * MIB, 0x52, MIB)
    service.admin.detach(attachment["id"])
    answer = service.admin.patch(f"/v1/volumes/{attachment['volume_id']}", json={"size": 96 * MIB})
    assert answer.status_code == 200, answer.text
    again = initiator_of(service.admin.attach(attachment["volume_id"], ONE))
    assert again.size() == answer.json()["size"] == 96 * MIB
    again.read(63 * MIB, MIB, 0x52)
    again.read(64 * MIB, 32 * MIB, 0)


def grow_under_a_writer(service: RunningService, times: int) -> None:
    attachment, one = service.attached(ONE)
    volume = attachment["volume_id"]
    with Writer(one) as writer:
        for number in range(1, times + 1):
            answer = service.admin.patch(f"/v1/volumes/{volume}", json={"size": (64 + number) * MIB})
            assert answer.status_code == 200, answer.text
            writer.wait_rounds(1)
        assert writer.stop() == []
    assert one.size() == (64 + times) * MIB
    assert lost(service.backing(volume), writer.expected) == []
    one.read(64 * MIB, times * MIB, 0)


def test_an_attached_volume_grows_and_its_writer_sees_no_error(service: RunningService) -> None:
    grow_under_a_writer(service, 4)


@pytest.mark.slow
def test_an_attached_volume_grows_fifty_times(service: RunningService) -> None:
    grow_under_a_writer(service, 50)


def test_a_revert_gives_the_bytes_of_the_snapshot_again(service: RunningService) -> None:
    attachment, one = service.attached(ONE)
    volume = f"/v1/volumes/{attachment['volume_id']}"
    one.write(0, 0x61, MIB)
    service.admin.detach(attachment["id"])
    snapshot = service.admin.post(f"{volume}/snapshots", json={})
    assert snapshot.status_code == 201, snapshot.text
    attachment = service.admin.attach(attachment["volume_id"], ONE)
    initiator_of(attachment).write(0, 0x62, 2 * MIB)
    wish = {"snapshot": snapshot.json()["id"]}
    refused = service.admin.post(f"{volume}/revert", json=wish)
    assert (refused.status_code, refused.json()["code"]) == (409, "volume-in-use")
    service.admin.detach(attachment["id"])
    assert service.admin.post(f"{volume}/revert", json=wish).status_code == 200
    again = initiator_of(service.admin.attach(attachment["volume_id"], ONE))
    again.read(0, MIB, 0x61)
    again.read(MIB, MIB, 0)


# ---------------------------------------------------------------- the service stops and starts


def test_a_restart_brings_volumes_attachments_and_targets_back(serve: Serve) -> None:
    service = serve()
    attachment, one = service.attached(ONE, mutual_chap=True)
    reader, _ = service.attached(ONE, mode="ro")
    one.write(0, 0x71, MIB)
    identity = [one.vpd(page) for page in IDENTITY]
    volume = service.admin.show(f"/v1/volumes/{attachment['volume_id']}")

    assert service.stop() == 0
    assert service.pids() == []
    service.start()

    assert service.admin.show(f"/v1/volumes/{attachment['volume_id']}") == volume
    assert service.admin.show(f"/v1/attachments/{attachment['id']}/connection") == attachment["connection"]
    one.read(0, MIB, 0x71)
    assert [one.vpd(page) for page in IDENTITY] == identity
    assert initiator_of(reader).login_error() is None
    service.admin.detach(attachment["id"])


def test_keep_target_restarts_the_service_without_an_outage(serve: Serve) -> None:
    service = serve(arguments=("--keep-target",), STRATUS_ATTACHMENTS__MAX_SESSIONS="2")
    attachment, one = service.attached(ONE)
    serving = service.serving()
    with Writer(one) as writer, one.bare() as bare, bare.attended() as session:
        assert service.stop() == 0
        assert service.pids() == serving
        writer.wait_rounds(20)  # while nothing but the target runs
        service.start()
        assert service.serving() == serving
        assert session.command(b"\x00", 0) == b""  # the very session: it was never asked to reconnect
        assert writer.stop() == []
    assert lost(service.backing(attachment["volume_id"]), writer.expected) == []
    service.admin.detach(attachment["id"])
    assert one.login_error() is not None


def test_who_was_served_under_an_earlier_prefix_is_served_no_more(serve: Serve) -> None:
    """A target that was kept, and is then nobody's: no fence would reach the sessions it has."""
    service = serve(arguments=("--keep-target",))
    attachment, one = service.attached(ONE)
    served = service.serving()
    with one.bare() as session:
        assert service.stop() == 0
        service.environment["STRATUS_ISCSI__IQN_PREFIX"] = "iqn.2026-11.org.example.renamed"
        service.start()
        assert not set(served) & set(service.serving())
        with pytest.raises((OSError, InitiatorError)):
            session.command(b"\x00", 0)
    renamed = initiator_of(
        service.admin.show(f"/v1/attachments/{attachment['id']}")
        | {"connection": service.admin.show(f"/v1/attachments/{attachment['id']}/connection")}
    )
    assert renamed.iqn.startswith("iqn.2026-11.org.example.renamed:")
    assert (one.login_error() is None, renamed.login_error() is None) == (False, True)
    service.admin.detach(attachment["id"])

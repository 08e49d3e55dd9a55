"""The worker dies in the middle of what it does to the target: its successor ends it, once, and no byte is lost."""

from __future__ import annotations

from pathlib import Path

from tests.support.initiator import Initiator, Writer, lost
from tests.support.interruptions import (
    MIB,
    OF_ANYTHING,
    OF_THE_WORKER,
    ONE,
    SIZE,
    TWO,
    Death,
    PutOn,
    done_once,
    interrupted,
    standing,
    used,
)
from tests.support.service import RunningService, initiator_of, wait_until


def is_refused(initiator: Initiator) -> bool:
    """Whether the target does not let it in for its name, as in the middle of a drain.

    tgt says 515; LIO 514, and 513 as long as the name is known and has no secret any more.
    """
    return (initiator.login_error() or "")[-5:] in ("(513)", "(514)", "(515)")


def drains(service: RunningService, operation: str, initiator: Initiator) -> bool:
    """Whether the operation has shut the initiator out and waits for its last write: the first try, not a pause."""
    return is_refused(initiator) and standing(service, operation) == ("running", 1)


@OF_THE_WORKER
def test_an_attach_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, death: Death) -> None:
    """tgtd is in the middle of making the LUN: whether it did what it was asked, nobody knows."""
    attachment, one = braked.attached(ONE, SIZE)
    one.write(0, 0x5A, MIB)
    braked.admin.detach(attachment["id"])
    volume, before = attachment["volume_id"], used(braked)
    with interrupted(braked, brake("open"), death):
        wish = {"instance_id": "test", "node": "test", "initiator": TWO}
        operation = braked.admin.start_operation(f"/v1/volumes/{volume}/attachments", **wish)
    again = done_once(braked, operation, "attachment.attached", plain_directory)
    assert used(braked) == before
    connection = braked.admin.show(f"/v1/attachments/{again}/connection")
    two = initiator_of({"initiator": TWO, "connection": connection})
    two.read(0, MIB, 0x5A)
    two.write(0, 0x5B, MIB)
    assert one.login_error() is not None


@OF_ANYTHING
def test_a_grow_under_a_writer_ends_once(
    braked: RunningService, brake: PutOn, plain_directory: Path, death: Death
) -> None:
    """A write in flight holds the drain: the backing has grown, and the initiator is shut out."""
    attachment, one = braked.attached(ONE, SIZE)
    volume, (size, count) = attachment["volume_id"], used(braked)
    backing = plain_directory / "volumes" / f"{volume}.raw"
    with Writer(one) as writer:
        held = brake("write")
        wait_until(held.holds, 60, "a write in flight")
        with interrupted(braked, held, death, lambda: drains(braked, operation, one)):
            operation = braked.admin.start_operation(f"/v1/volumes/{volume}", "PATCH", size=SIZE + 32 * MIB)
        done_once(braked, operation, "volume.grown", plain_directory)
        writer.wait_rounds(2)
        assert writer.stop() == []
    assert used(braked) == (size + 32 * MIB, count)
    assert lost(backing, writer.expected) == []
    assert one.size() == braked.admin.show(f"/v1/volumes/{volume}")["size"] == SIZE + 32 * MIB
    one.read(SIZE, 32 * MIB, 0)


@OF_ANYTHING
def test_a_fence_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, death: Death) -> None:
    """A write in flight holds the drain: the initiator is shut out, and the volume is nobody else's yet."""
    attachment, one = braked.attached(ONE, SIZE)
    volume, before = attachment["volume_id"], used(braked)
    backing = plain_directory / "volumes" / f"{volume}.raw"
    with Writer(one, depth=1) as writer:
        held = brake("write")
        wait_until(held.holds, 60, "a write in flight")
        with interrupted(braked, held, death, lambda: drains(braked, operation, one)):
            operation = braked.admin.start_operation(f"/v1/attachments/{attachment['id']}", "DELETE")
        done_once(braked, operation, "attachment.detached", plain_directory)
        after = backing.read_bytes()
    assert used(braked) == before
    in_flight = writer.rounds % 512 * Writer.BLOCK  # never acknowledged: it may be there or not
    assert lost(backing, {at: byte for at, byte in writer.expected.items() if at != in_flight}) == []
    two = initiator_of(braked.admin.attach(volume, TWO))
    assert is_refused(one)
    two.io(f"read -P {after[0]} 0 {Writer.BLOCK}")
    assert backing.read_bytes() == after

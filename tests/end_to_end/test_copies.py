"""Snapshots and clones: one instant of a live volume where the pool can reflink, refused or watched elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ONE_PROCESS
from tests.support.filesystems import SMALLEST, mounted
from tests.support.initiator import Writer
from tests.support.service import RunningService, initiator_of, running, wait_until
from tests.support.shim import Brake

ONE, TWO = "iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"
MIB = 1 << 20
BLOCKS, DEPTH = 512, Writer.DEPTH
SLOTS = BLOCKS // DEPTH  # a round writes one slot of blocks; SLOTS rounds later it is written again
PutOn = Callable[[str], Brake]


@pytest.fixture(scope="module")
def reflinks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pool's directory on XFS."""
    with mounted("xfs", SMALLEST["xfs"], tmp_path_factory.mktemp("reflinks")) as point:
        (point / "pool").mkdir()
        yield point / "pool"


@pytest.fixture(scope="module")
def copying(
    tmp_path_factory: pytest.TempPathFactory, shim: Path, brakes: Path, plain_directory: Path, reflinks: Path
) -> Iterator[RunningService]:
    """A service with two pools: `default` cannot reflink, `fast` can."""
    environment = ONE_PROCESS | {
        "LD_PRELOAD": str(shim),
        "SHIM_DIR": str(brakes),
        "STRATUS_POOLS__DEFAULT__PATH": str(plain_directory),
        "STRATUS_POOLS__FAST__PATH": str(reflinks),
        "STRATUS_POOLS__FAST__OVERCOMMIT_RATIO": "100",
    }
    with running(tmp_path_factory.mktemp("copying") / "home", environment) as service:
        yield service
        Brake(brakes, "copy").off()


# ---------------------------------------------------------------- pools that reflink


def rounds_seen(image: Path, before: int, after: int) -> list[int | None]:
    """For each block the round, of those that may be there, whose byte all of it holds; None if it is no such block."""
    content = image.read_bytes()
    blocks = [content[at : at + Writer.BLOCK] for at in range(0, BLOCKS * Writer.BLOCK, Writer.BLOCK)]
    seen: list[int | None] = []
    for number, block in enumerate(blocks):
        candidates = [r for r in range(before - SLOTS, after + 1) if r % SLOTS == number // DEPTH]
        seen.append(next((r for r in candidates if block == bytes([r % 250 + 1]) * Writer.BLOCK), None))
    return seen


def is_prefix(seen: list[int | None], end: int) -> bool:
    """Whether it is what a disk holds when all rounds before `end` were written, and some of round `end`."""
    for number, found in enumerate(seen):
        slot = number // DEPTH
        last = end - 1 - (end - 1 - slot) % SLOTS
        if found != last and not (found == end and slot == end % SLOTS):
            return False
    return True


@pytest.mark.parametrize("what", ["snapshot", "clone"])
def test_a_copy_of_an_attached_volume_is_one_moment_of_it(copying: RunningService, reflinks: Path, what: str) -> None:
    volume = copying.admin.make_volume(64 * MIB, pool="fast")["id"]
    one = initiator_of(copying.admin.attach(volume, ONE))
    with Writer(one) as writer:
        writer.wait_rounds(2 * SLOTS)
        for _ in range(4):
            before = writer.rounds
            if what == "snapshot":
                made = copying.admin.post(f"/v1/volumes/{volume}/snapshots", json={})
            else:
                made = copying.admin.post("/v1/volumes", json={"volume": volume})
            after = writer.rounds
            assert made.status_code == 201, made.text
            image = reflinks / ("snapshots" if what == "snapshot" else "volumes") / f"{made.json()['id']}.raw"
            seen = rounds_seen(image, before, after + 1)
            assert any(is_prefix(seen, end) for end in range(before, after + 2)), (before, after, seen)
            writer.wait_rounds(3)
        assert writer.stop() == []


def test_a_clone_and_its_source_go_their_own_ways(copying: RunningService) -> None:
    volume = copying.admin.make_volume(16 * MIB, pool="fast")["id"]
    one = initiator_of(copying.admin.attach(volume, ONE))
    one.write(0, 0x11, MIB)
    snapshot = copying.admin.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    one.write(0, 0x12, MIB)
    clone = copying.admin.make_volume(32 * MIB, snapshot=snapshot)
    assert clone["origin"] == {"kind": "snapshot", "id": snapshot}
    two = initiator_of(copying.admin.attach(clone["id"], TWO))
    two.read(0, MIB, 0x11)
    two.read(MIB, 31 * MIB, 0)
    two.write(0, 0x13, MIB)
    one.read(0, MIB, 0x12)
    assert two.vpd(0x83) != one.vpd(0x83)


def test_a_snapshot_outlives_its_volume(copying: RunningService) -> None:
    attachment = copying.admin.attach(copying.admin.make_volume(16 * MIB, pool="fast")["id"], ONE)
    volume = attachment["volume_id"]
    initiator_of(attachment).write(0, 0x14, MIB)
    snapshot = copying.admin.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    copying.admin.detach(attachment["id"])
    assert copying.admin.delete(f"/v1/volumes/{volume}").status_code == 204
    again = copying.admin.make_volume(16 * MIB, snapshot=snapshot)["id"]
    assert copying.admin.delete(f"/v1/snapshots/{snapshot}").status_code == 204
    initiator_of(copying.admin.attach(again, ONE)).read(0, MIB, 0x14)


# ---------------------------------------------------------------- pools that do not


def written(service: RunningService, size: int) -> str:
    """A detached volume of the default pool, full of 0x5a."""
    attachment, one = service.attached(ONE, size)
    one.write(0, 0x5A, size)
    service.admin.detach(attachment["id"])
    return str(attachment["volume_id"])


def refusal(service: RunningService, method: str, path: str, **body: object) -> tuple[int, str]:
    answer = service.admin.request(method, path, json=body or None)
    return answer.status_code, answer.json()["code"]


def test_a_written_volume_is_not_copied_while_attached(copying: RunningService) -> None:
    pools = {pool["name"]: pool["live_clone"] for pool in copying.admin.show("/v1/pools")["items"]}
    assert pools == {"default": False, "fast": True}
    attachment, one = copying.attached(ONE, 16 * MIB)
    volume = attachment["volume_id"]
    used = copying.admin.show("/v1/quotas/admin")
    snapshots = f"/v1/volumes/{volume}/snapshots"
    assert refusal(copying, "POST", snapshots, name="x") == (409, "snapshot-needs-detach")
    assert refusal(copying, "POST", "/v1/volumes", volume=volume) == (409, "clone-needs-detach")
    assert copying.admin.show("/v1/quotas/admin") == used
    one.write(0, 0x5A, MIB)
    copying.admin.detach(attachment["id"])
    reader = copying.admin.attach(volume, ONE, "ro")  # nobody writes: it is copied
    assert copying.admin.post(snapshots, json={}).status_code == 201
    clone = copying.admin.make_volume(16 * MIB, volume=volume)["id"]
    copying.admin.detach(reader["id"])
    initiator_of(copying.admin.attach(clone, TWO)).read(0, MIB, 0x5A)


def cancel(service: RunningService, operation: str, held: Brake) -> None:
    """While a chunk is held; it goes on when the worker is due to look for a cancel, at the end of that chunk."""
    wait_until(held.holds, 60, "a chunk")
    assert service.admin.post(f"/v1/operations/{operation}/cancel", json={}).status_code in (200, 202)
    time.sleep(0.6)
    held.off()


def test_a_copy_under_way_is_watched_and_cancelled(
    copying: RunningService, brake: PutOn, plain_directory: Path
) -> None:
    source = written(copying, 192 * MIB)
    used, files = copying.admin.show("/v1/quotas/admin"), sorted((plain_directory / "volumes").iterdir())
    held = brake("copy")
    operation = copying.admin.start_operation("/v1/volumes", volume=source)
    look = f"/v1/operations/{operation}"
    clone = f"/v1/volumes/{copying.admin.show(look)['resource']['id']}"
    wait_until(held.holds, 60, "the copy")
    assert copying.admin.show(clone)["state"] == "creating"
    assert copying.admin.show("/v1/quotas/admin")["used_size"] == used["used_size"] + 192 * MIB

    wish = {"instance_id": "test", "node": "test", "initiator": TWO}
    assert refusal(copying, "POST", f"/v1/volumes/{source}/attachments", **wish) == (409, "volume-busy")
    assert refusal(copying, "DELETE", f"/v1/volumes/{source}") == (409, "volume-busy")
    assert refusal(copying, "PATCH", f"/v1/volumes/{source}", size=256 * MIB) == (409, "volume-busy")
    assert refusal(copying, "POST", f"{clone}/attachments", **wish) == (409, "volume-not-available")
    copying.admin.detach(copying.admin.attach(source, ONE, "ro")["id"])

    def progress() -> int:
        """Lets some chunks through, then looks."""
        held.off()
        held.on()
        time.sleep(0.1)
        return int(copying.admin.show(look)["progress"])

    seen = wait_until(progress, 60, "progress")
    assert 0 < seen < 100
    cancel(copying, operation, held)
    ended = copying.admin.wait_operation(operation)
    assert (ended["state"], ended["error"]["code"]) == ("cancelled", "cancelled")

    assert copying.admin.get(clone).status_code == 404
    assert copying.admin.show("/v1/quotas/admin") == used
    assert sorted((plain_directory / "volumes").iterdir()) == files
    assert list((plain_directory / "staging").iterdir()) == []
    attachment = copying.admin.attach(source, TWO)
    initiator_of(attachment).read(0, 192 * MIB, 0x5A)
    copying.admin.detach(attachment["id"])
    assert copying.admin.delete(f"/v1/volumes/{source}").status_code == 204


def test_a_cancelled_revert_leaves_the_volume_as_it_was(copying: RunningService, brake: PutOn) -> None:
    volume = written(copying, 32 * MIB)
    snapshot = copying.admin.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    attachment = copying.admin.attach(volume, ONE)
    initiator_of(attachment).write(0, 0x5B, 32 * MIB)
    copying.admin.detach(attachment["id"])
    held = brake("copy")
    operation = copying.admin.start_operation(f"/v1/volumes/{volume}/revert", snapshot=snapshot)
    wait_until(held.holds, 60, "the copy")
    assert copying.admin.show(f"/v1/volumes/{volume}")["state"] == "reverting"
    assert refusal(copying, "DELETE", f"/v1/snapshots/{snapshot}") == (409, "snapshot-busy")
    cancel(copying, operation, held)
    assert copying.admin.wait_operation(operation)["state"] == "cancelled"
    initiator_of(copying.admin.attach(volume, ONE)).read(0, 32 * MIB, 0x5B)
    assert copying.admin.delete(f"/v1/snapshots/{snapshot}").status_code == 204

"""What the worker does for images, with a real origin, a real cache and a real pool."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import update

from app import capacity, image_care, images, pins, reconcile, volumes
from app.db import Database
from app.models import Image, Operation, Pool, User, Volume
from app.schemas import JudgementCreate
from app.states import now
from app.steps import golden
from app.steps import images as steps
from app.steps.job import pace
from app.worker import Worker
from imagecache.identifiers import identifier_of
from tests.support import rows
from tests.support.endorsements import entry
from tests.support.filesystems import mounted
from tests.support.imagehouse import MIB, ImageHouse, content, image_house, sha256
from tests.support.marketplace import marketplace
from tests.support.service import wait_until


@pytest.fixture
def database(sqlite_database: Database) -> Database:
    """What two kinds of databases make different is tried in test_images."""
    return sqlite_database


@pytest.fixture
def there(database: Database, tmp_path: Path) -> Iterator[ImageHouse]:
    with image_house(tmp_path / "home", database) as house:
        yield house


# ---------------------------------------------------------------- fetch


def test_an_image_is_fetched_verified_and_told_of(there: ImageHouse) -> None:
    data = content(1)
    image = there.fetched(**there.publish("/a.raw", data), name="a")
    assert (image.state, image.visibility, image.size, image.source_format) == ("available", "private", 4 * MIB, "raw")
    assert sha256(there.file(image.digest).read_bytes()) == image.digest
    assert image.verified_by == f"sha256:{sha256(data)}"
    assert (image.source_digests or {})["sha256"] == sha256(data)
    assert [event.detail["digest"] for event in there.events("image.fetched")] == [image.digest]
    there.at_rest()


def test_a_wrong_digest_leaves_nothing_and_the_next_request_tries_again(there: ImageHouse) -> None:
    good, bad = content(1), content(2)
    asked = there.publish("/a.raw", good)
    there.publish("/a.raw", bad)
    assert there.failed(**asked) == "wrong-digest"
    assert there.rows(Image) == []
    there.at_rest()
    there.publish("/a.raw", good)
    assert there.fetched(**asked).state == "available"


def test_two_references_to_the_same_bytes_are_one_download(there: ImageHouse) -> None:
    data = content(1)
    first = there.publish("/a.raw", data, pause=0.05)
    second = there.publish("/b.raw", data, pause=0.05)
    asked = [there.ask(**first), there.ask(**second)]
    assert [there.house.ended(operation).state for operation in asked] == ["succeeded", "succeeded"]
    assert there.downloads("/a.raw") + there.downloads("/b.raw") == 1
    one, other = there.rows(Image)
    assert one.digest == other.digest
    assert there.delete(one.id).state == "succeeded"
    assert there.file(one.digest).exists()  # the other names it
    assert there.delete(other.id).state == "succeeded"
    assert there.files() == []


def test_what_was_found_by_sha1_alone_is_not_what_was_verified(there: ImageHouse) -> None:
    there.set_policy(allow_sha1=True)
    data = content(1)
    there.fetched(**there.publish("/a.raw", data))
    there.publish("/b.raw", data)
    image = there.fetched(reference=there.origin.url("/b.raw"), checksum=hashlib.sha1(data).hexdigest())
    assert there.downloads("/b.raw") == 1
    assert image.verified_by == f"sha1:{hashlib.sha1(data).hexdigest()}"


def test_a_deny_list_beats_what_is_in_the_cache(there: ImageHouse) -> None:
    asked = there.publish("/a.raw", content(1))
    image = there.fetched(**asked)
    there.set_policy(deny_hosts=frozenset({"127.0.0.1"}))
    bob = there.house.caller("bob")
    assert there.failed(bob, **asked) == "policy-refused"
    made = there.volume(bob, **{"image": asked["reference"], "checksum": asked["checksum"]})
    assert (made.state, made.error_code) == ("failed", "policy-refused")
    with there.house.database.read() as session:
        assert not images.shown(session, bob, [image])[image.id].close
    there.set_policy(deny_hosts=frozenset())
    there.fetched(bob, **asked)
    with there.house.database.read() as session:
        assert images.shown(session, bob, [image])[image.id].close
    assert there.downloads("/a.raw") == 1


def test_nothing_is_downloaded_for_what_the_policy_refuses(there: ImageHouse) -> None:
    there.set_policy(deny_hosts=frozenset({"127.0.0.1"}))
    there.publish("/a.raw", content(1))
    assert there.failed(reference=there.origin.url("/a.raw")) == "policy-refused"
    assert there.failed(**there.publish("/b.raw", content(2))) == "policy-refused"
    assert (there.downloads("/a.raw"), there.downloads("/b.raw")) == (0, 0)


def test_what_a_marketplace_tells_of_is_public(database: Database, tmp_path: Path) -> None:
    data = content(1)
    with marketplace() as market:
        configured = {"marketplaces": [market.url]}
        with image_house(tmp_path / "home", database, images=configured) as there:
            there.publish("/a.raw", data)
            told = entry(data, locations=[there.origin.url("/a.raw")], format="raw", valid=now() + dt.timedelta(30))
            market.add(told)
            identifier = identifier_of(hashlib.sha1(data).hexdigest())
            image = there.fetched(reference=identifier)
            assert (image.visibility, image.identifier) == ("public", identifier)
            assert there.fetched(there.house.caller("bob"), reference=identifier).id == image.id
            private = there.house.caller("carol")
            there.delete(image.id)
            assert there.fetched(private, reference=identifier, visibility="private").visibility == "private"


def test_a_cancelled_fetch_leaves_nothing(there: ImageHouse) -> None:
    operation = there.ask(**there.publish("/a.raw", content(1), pause=0.2))
    wait_until(lambda: there.origin.served("/a.raw"), what="a first byte")
    ended = there.cancel(operation)
    assert (ended.state, ended.error_code) == ("cancelled", "cancelled")
    assert there.rows(Image) == []
    there.at_rest()


def test_of_two_workers_the_one_that_lost_its_lease_hands_nothing_out(there: ImageHouse) -> None:
    """It is still writing when another claims the fetch: that one waits for it to notice, and begins anew."""
    database, asked = there.house.database, there.publish("/a.raw", content(1), pause=0.05)
    operation = there.ask(**asked)
    wait_until(lambda: there.downloads("/a.raw"), what="the first download")
    other = Worker(there.house.outside, there.house.bus)
    with database.write() as session:
        until = now() + dt.timedelta(seconds=600)
        claimed = {"worker": other.name, "lease_until": until, "fence": Operation.fence + 1}
        session.execute(update(Operation).where(Operation.id == operation.id).values(**claimed))
        taken = session.get_one(Operation, operation.id, populate_existing=True)
    other.work(taken)
    ended = there.house.ended(operation)
    assert (ended.state, ended.fence) == ("succeeded", taken.fence)
    assert there.downloads("/a.raw") == 2
    assert len(there.events("image.fetched")) == 1
    there.at_rest()


def test_progress_tells_how_fast_it_goes(there: ImageHouse) -> None:
    operation = there.ask(**there.publish("/a.raw", content(1, 16 * MIB), pause=0.02))

    def look() -> str | None:
        found = next(o for o in there.rows(Operation) if o.id == operation.id)
        return found.message if found.message and "MiB/s" in found.message else None

    assert wait_until(look, what="a message").startswith("fetched: ")
    assert there.house.ended(operation).state == "succeeded"


def test_pace_is_told_for_people() -> None:
    assert pace("fetched", 0, 0, 0.0).startswith("fetched: 0 MiB, 0 MiB/s")
    assert " of 2048 MiB, " in pace("fetched", 512 * MIB, 2048 * MIB, 0.0)
    assert pace("fetched", 512 * MIB, 2048 * MIB, 0.0).endswith(" s left")


# ---------------------------------------------------------------- judgements


def test_a_judgement_downloads_nothing(there: ImageHouse) -> None:
    asked = there.publish("/a.raw", content(1))
    body = JudgementCreate.model_validate(asked)
    judged = there.house.ended(there.house.do(images.judge, there.house.settings, there.alice, body))
    assert judged.result is not None
    assert judged.result["passed"]["checksums"] == {"sha256": asked["checksum"]}
    there.set_policy(deny_checksums=frozenset({asked["checksum"]}))
    judged = there.house.ended(there.house.do(images.judge, there.house.settings, there.alice, body))
    assert judged.result is not None
    assert judged.result["passed"] is None
    assert [refusal["rule"] for refusal in judged.result["refused"]] == ["checksum-denied"]
    assert (there.downloads("/a.raw"), there.rows(Image)) == (0, [])
    body = JudgementCreate(reference="nonsense")
    assert (
        there.house.ended(there.house.do(images.judge, there.house.settings, there.alice, body)).error_code
        == "bad-reference"
    )


# ---------------------------------------------------------------- volumes


def test_volumes_are_cloned_from_one_golden_copy(there: ImageHouse) -> None:
    data = content(1)
    image = there.fetched(**there.publish("/a.raw", data))
    first, second = there.volume(image=str(image.id)), there.volume(image=str(image.id), size=6 * MIB)
    assert there.backing(first.resource_id).read_bytes() == data
    assert there.backing(second.resource_id).read_bytes() == data + bytes(2 * MIB)
    (copy,) = there.golden()
    assert (copy.state, copy.digest, copy.size) == ("available", image.digest, 4 * MIB)
    made = {volume.id: volume for volume in there.rows(Volume)}[first.resource_id]
    assert (made.origin_kind, made.origin_id, made.size) == ("image", image.id, 4 * MIB)
    there.at_rest()


def test_a_volume_waits_for_its_image(there: ImageHouse) -> None:
    data = content(1)
    asked = there.publish("/a.raw", data, pause=0.01)
    made = there.volume(image=asked["reference"], checksum=asked["checksum"])
    assert (made.state, made.error_detail) == ("succeeded", None)
    assert there.backing(made.resource_id).read_bytes() == data
    assert next(v for v in there.rows(Volume) if v.id == made.resource_id).size == 4 * MIB
    there.at_rest()


def test_a_volume_whose_image_does_not_come_says_why(there: ImageHouse) -> None:
    there.publish("/a.raw", content(1))
    made = there.volume(image=there.origin.url("/a.raw"), checksum="0" * 64)
    assert (made.state, made.error_code) == ("failed", "wrong-digest")
    (volume,) = there.rows(Volume)
    assert volume.state == "error"
    there.at_rest()


def test_a_volume_that_proves_too_large_for_the_quota_is_refused(there: ImageHouse) -> None:
    poor = there.house.caller("poor", quota_size=MIB)
    asked = there.publish("/a.raw", content(1))
    made = there.volume(poor, image=asked["reference"], checksum=asked["checksum"])
    assert (made.state, made.error_code) == ("failed", "quota-exceeded")
    assert next(user for user in there.rows(User) if user.name == "poor").used_size == 0
    there.at_rest()


def test_a_golden_copy_goes_with_the_image_and_not_before_its_volumes(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    made = there.volume(image=str(image.id))
    (copy,) = there.golden()
    assert not golden.remove(there.house.outside, copy.id)
    there.house.ended(there.house.do(volumes.request_delete, there.alice, made.resource_id, None))
    assert there.delete(image.id).state == "succeeded"
    assert (there.golden(), there.files()) == ([], [])
    assert there.house.outside.pools["default"].inventory() == []
    there.at_rest()


def test_a_golden_copy_that_no_volume_needs_gives_way_in_a_scarce_pool(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    made = there.volume(image=str(image.id))
    there.house.chores.relieve_pools()
    with there.house.database.write() as session:
        session.execute(update(Pool).values(alarm="only little free"))
    there.house.chores.relieve_pools()
    assert len(there.golden()) == 1  # its volume's changes are found against it
    there.house.ended(there.house.do(volumes.request_delete, there.alice, made.resource_id, None))
    assert len(there.golden()) == 1
    there.house.chores.relieve_pools()
    assert there.golden() == []
    assert there.house.outside.pools["default"].inventory() == []
    there.at_rest()
    assert there.volume(image=str(image.id)).state == "succeeded"


def test_who_makes_a_volume_of_a_public_image_is_not_told_its_reference(there: ImageHouse) -> None:
    """Which can hold a secret; who names it knows it."""
    asked = there.publish("/a.raw", content(1))
    image = there.fetched(**asked, visibility="public")
    bob, carol = there.house.caller("bob"), there.house.caller("carol")
    assert there.volume(bob, image=str(image.id)).state == "succeeded"
    assert there.volume(carol, image=asked["reference"], checksum=asked["checksum"]).state == "succeeded"
    with there.house.database.read() as session:
        close = [images.shown(session, caller, [image])[image.id].close for caller in (there.alice, bob, carol)]
    assert close == [True, False, True]


def test_a_half_made_golden_copy_is_never_cloned(there: ImageHouse) -> None:
    data = content(1)
    image = there.fetched(**there.publish("/a.raw", data))
    half = rows.golden_copy(image.digest or "", state="creating", size=4 * MIB)
    with there.house.database.write() as session:
        session.add(half)
        capacity.promise(session, "default", 4 * MIB)
    pool = there.house.outside.pools["default"]
    pool.create(half.id, 4 * MIB)
    pool.backing(half.id).path.write_bytes(b"half" * 1000)
    made = there.volume(image=str(image.id))
    assert there.backing(made.resource_id).read_bytes() == data
    assert [(c.id, c.state) for c in there.golden()] == [(half.id, "available")]
    there.at_rest()


def test_reconcile_removes_a_half_made_golden_copy_and_remakes_a_lost_one(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    there.volume(image=str(image.id))
    (copy,) = there.golden()
    pool = there.house.outside.pools["default"]
    pool.delete_volume(copy.id)
    assert "golden-copy" in {drift.layer for drift in reconcile.converge(there.house.outside)}
    assert there.golden()[0].state == "creating"
    assert "golden-copy-leftover" in {drift.layer for drift in reconcile.converge(there.house.outside)}
    assert there.golden() == []
    assert there.volume(image=str(image.id)).state == "succeeded"
    there.at_rest()


def test_a_lost_golden_copy_is_made_again_when_it_is_needed(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    there.volume(image=str(image.id))
    there.house.outside.pools["default"].delete_volume(there.golden()[0].id)
    assert there.volume(image=str(image.id)).state == "succeeded"


# ---------------------------------------------------------------- from volumes


@pytest.mark.parametrize("kind", ["plain", "xfs"])
def test_a_volume_becomes_an_image(database: Database, tmp_path: Path, kind: str) -> None:
    with mounted("xfs" if kind == "xfs" else "tmpfs", 512 * MIB, tmp_path) as point:
        pool = {"default": {"path": str(point)}}
        with image_house(tmp_path / "home", database, pools=pool) as there:
            data = content(1)
            first = there.fetched(**there.publish("/a.raw", data))
            made = there.volume(image=str(first.id)).resource_id
            image = there.fetched(volume=made, name="mine")
            assert (image.origin_kind, image.origin_id, image.visibility) == ("volume", made, "private")
            assert image.digest == first.digest  # the same bytes, however they came
            assert image.charged == image.file_size
            again = there.volume(image=str(image.id))
            assert there.backing(again.resource_id).read_bytes() == data
            held = {item.id for item in there.house.outside.pools["default"].inventory()}
            assert held == {made, again.resource_id, *(c.id for c in there.golden())}
            there.at_rest()


# ---------------------------------------------------------------- scrub


def rot(there: ImageHouse, image: Image) -> None:
    path = there.file(image.digest)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"rot")


def scrub(there: ImageHouse) -> None:
    with there.house.database.write() as session:
        for image in session.query(Image).all():
            image.verified_at = now().replace(year=2020)
    image_care.scrub_next(there.house.outside)
    image_care.scrub_next(there.house.outside)  # one at a time
    there.house.settle()


def test_a_sound_image_is_seen_to_be_so(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    scrub(there)
    after = there.row(image.id)
    assert after is not None
    assert after.verified_at is not None
    assert after.verified_at >= image.verified_at
    assert [o.kind for o in there.rows(Operation)] == ["image.fetch", "image.scrub"]


def test_a_rotten_image_is_set_aside_and_fetched_again(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    rot(there, image)
    scrub(there)
    after = there.row(image.id)
    assert after is not None
    assert (after.state, after.digest) == ("available", image.digest)
    assert sha256(there.file(image.digest).read_bytes()) == image.digest
    assert there.downloads("/a.raw") == 2
    assert [len(there.events(kind)) for kind in ("image.lost", "image.rotten", "image.fetched")] == [1, 1, 2]
    there.at_rest()


def test_what_is_there_again_is_not_lost(there: ImageHouse) -> None:
    """Two who look at the same time find it missing; the first has it fetched, before the second acts."""
    image = there.fetched(**there.publish("/a.raw", content(1)))
    assert not steps.lost(there.house.database.write, there.cache, image.digest or "", missing=True)
    there.file(image.digest).unlink()
    assert steps.lost(there.house.database.write, there.cache, image.digest or "", missing=True)
    there.house.settle()
    assert there.file(image.digest).exists()
    assert len(there.events("image.lost")) == 1


def test_what_cannot_be_had_again_is_in_error_and_told(there: ImageHouse) -> None:
    first = there.fetched(**there.publish("/a.raw", content(1)))
    made = there.volume(image=str(first.id)).resource_id
    image = there.fetched(volume=made)
    rot(there, image)
    there.publish("/a.raw", b"", statuses=[404] * 50)
    scrub(there)
    after = there.row(image.id)
    assert after is not None
    assert after.state == "error"
    assert after.error is not None
    assert "cannot be had again" in after.error
    assert len(there.events("image.lost")) == 2


def test_reconcile_fetches_what_is_missing_and_removes_what_is_nobodys(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    path = there.file(image.digest)
    stray = path.with_name("0" * 64 + ".qcow2")
    path.rename(stray)
    layers = {drift.layer for drift in reconcile.look(there.house.outside)}
    assert {"image", "image-file"} <= layers
    reconcile.converge(there.house.outside)
    there.house.settle()
    reconcile.converge(there.house.outside)
    after = there.row(image.id)
    assert after is not None
    assert after.state == "available"
    there.at_rest()


# ---------------------------------------------------------------- room


def test_above_the_high_mark_the_least_used_go(database: Database, tmp_path: Path) -> None:
    marks = {"high_mark": 10 * MIB, "low_mark": 7 * MIB}
    with image_house(tmp_path / "home", database, images=marks) as there:
        found = [there.fetched(**there.publish(f"/{n}.raw", content(n, 6 * MIB))) for n in range(4)]
        there.house.do(pins.pin, there.house.settings, there.house.caller("n", "node"), found[0].id, "vm")
        gone = image_care.tidy(there.house.outside)
        there.house.settle()
        assert gone == [found[1].digest, found[2].digest]  # the oldest is pinned
        assert there.files() == sorted(filter(None, [found[0].digest, found[3].digest]))
        assert len(there.events("image.evict")) == 2
        assert image_care.tidy(there.house.outside) == []
        there.at_rest()
        assert there.fetched(**there.publish("/1.raw", content(1, 6 * MIB))).digest == found[1].digest


def test_a_full_cache_makes_room_before_it_refuses(database: Database, tmp_path: Path) -> None:
    with mounted("tmpfs", 24 * MIB, tmp_path) as point:
        configured = {"path": str(point), "reserve": 0, "high_mark": "100%", "low_mark": "100%"}
        with image_house(tmp_path / "home", database, images=configured) as there:
            first = there.fetched(**there.publish("/a.raw", content(1, 14 * MIB)))
            second = there.fetched(**there.publish("/b.raw", content(2, 14 * MIB)))
            assert there.row(first.id) is None or there.files() == sorted([first.digest or "", second.digest or ""])
            assert there.failed(**there.publish("/c.raw", content(3, 60 * MIB))) == "image-cache-full"
            there.at_rest()
            assert there.fetched(**there.publish("/d.raw", content(4, 8 * MIB))).state == "available"


def test_nothing_goes_for_what_would_not_fit_all_the_same(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    usage = there.cache.usage()
    assert not image_care.make_room(there.house.outside, 0, usage.size)
    assert there.row(image.id) is not None
    assert image_care.make_room(there.house.outside, 0)
    there.house.settle()
    assert there.row(image.id) is None
    there.at_rest()


def test_what_is_going_is_waited_for_before_more_goes(there: ImageHouse) -> None:
    first, second = (there.fetched(**there.publish(f"/{n}.raw", content(n))) for n in range(2))
    there.house.worker.stopping.set()
    for thread in there.house._threads:
        thread.join(60)
    for _ in range(2):
        assert image_care.make_room(there.house.outside, 1)
    states = {image.id: image.state for image in there.rows(Image)}
    assert states == {first.id: "deleting", second.id: "available"}


def test_a_cache_that_is_not_mounted_serves_nothing_and_loses_nothing(there: ImageHouse) -> None:
    image = there.fetched(**there.publish("/a.raw", content(1)))
    directory = there.house.settings.image_dir
    aside = directory.with_name("elsewhere")
    directory.rename(aside)
    directory.mkdir()
    there.house.chores.watch_images()
    assert there.house.outside.library is None
    assert reconcile.look(there.house.outside) == []
    directory.rmdir()
    aside.rename(directory)
    there.house.chores.watch_images()
    assert there.house.outside.library is not None
    assert there.row(image.id) is not None
    assert there.fetched(reference=image.reference, checksum=image.checksum).id == image.id


def test_ten_volumes_at_once_share_one_golden_copy(there: ImageHouse) -> None:
    data = content(1)
    asked = there.publish("/a.raw", data)
    made: list[Operation] = []

    def one() -> None:
        made.append(there.volume(image=asked["reference"], checksum=asked["checksum"]))

    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [operation.state for operation in made] == ["succeeded"] * 10
    assert there.downloads("/a.raw") == 1
    assert len(there.events("golden.created")) == 1
    assert {there.backing(operation.resource_id).read_bytes() == data for operation in made} == {True}
    there.at_rest()


def test_nobody_locks_what_is_not_there(there: ImageHouse) -> None:
    assert not golden.leftover(there.house.outside, uuid4())
    assert not golden.remove(there.house.outside, UUID(int=5))

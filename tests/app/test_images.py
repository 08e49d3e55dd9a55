"""Asking for images: many who ask are one request, whoever asked sees it, and what is depended on does not go."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select

from app import capacity, from_image, holds, images, operations, pins
from app.auth import Caller
from app.config import Settings
from app.db import Database
from app.errors import Problem
from app.models import Event, Image, ImageAsker, ImagePin, Operation, OperationWatcher
from app.operations import IMAGE_REFUSALS, REFUSALS, UNWELL
from app.schemas import ImageCreate, ImageFilter, ImageUpdate, JudgementCreate, VolumeCreate
from app.states import transition
from imagecache import errors
from stratus.errors import Exit, OperationFailed
from tests.support import rows
from tests.support.databases import settings_for

MIB = 1 << 20
URL = "http://user:word@images.example.org/debian.raw?token=hush"
DIGEST = "d" * 64


class There:
    """Principals, and services called in transactions of their own."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database, self.settings = database, settings
        with database.write() as session:
            session.add(rows.pool())
        self.alice, self.bob, self.eve = (self.caller(name) for name in ("alice", "bob", "eve"))
        self.node, self.admin = self.caller("node-1", "node"), self.caller("root", "admin")

    def caller(self, name: str, role: str = "user", **values: Any) -> Caller:
        user = rows.user(name, role, **values)
        with self.database.write() as session:
            session.add(user)
        return Caller(user.id, name, role, "127.0.0.1")

    def do(self, service: Callable[..., Any], *arguments: Any) -> Any:
        with self.database.write() as session:
            return service(session, *arguments)

    def ask(self, caller: Caller, reference: str = URL, **more: Any) -> Operation:
        asked = ImageCreate.model_validate({"reference": reference, **more})
        found = self.do(images.create, self.settings, caller, asked)
        assert isinstance(found, Operation)
        return found

    def image(self, owner: Caller | None = None, **values: Any) -> UUID:
        """An image that is there."""
        row = rows.image((owner or self.alice).id, digest=DIGEST, size=8 * MIB, allocated=MIB, **values)
        with self.database.write() as session:
            session.add(row)
        return row.id

    def row(self, identifier: UUID) -> Image | None:
        with self.database.read() as session:
            return session.get(Image, identifier)

    def refused(self, service: Callable[..., Any], *arguments: Any) -> str:
        with pytest.raises(Problem) as caught:
            self.do(service, *arguments)
        return caught.value.code


@pytest.fixture
def there(database: Database, tmp_path: Path) -> There:
    return There(database, settings_for(tmp_path / "home", database.engine.url.render_as_string(hide_password=False)))


@pytest.fixture
def here(sqlite_template: Path, tmp_path: Path) -> Iterator[There]:
    """With the one kind of database only, for what no other transaction has a part in."""
    path = tmp_path / "stratus.db"
    shutil.copy(sqlite_template, path)
    database = Database(f"sqlite:///{path}")
    yield There(database, settings_for(tmp_path / "home", f"sqlite:///{path}"))
    database.close()


def at_once(number: int, work: Callable[[int], Any]) -> list[Any]:
    barrier = threading.Barrier(number)

    def one(place: int) -> Any:
        barrier.wait()
        return work(place)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


# ---------------------------------------------------------------- single flight


def test_of_fifty_who_ask_at_once_all_get_the_same_operation(there: There) -> None:
    callers = [there.caller(f"user-{number}") for number in range(50)]
    found = at_once(50, lambda place: there.ask(callers[place]).id)
    assert len(set(found)) == 1
    with there.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Image)) == 1
        assert session.scalar(select(func.count()).select_from(ImageAsker)) == 50
        assert session.scalar(select(func.count()).select_from(OperationWatcher)) == 50
        assert [o.kind for o in session.scalars(select(Operation))] == ["image.fetch"]


def test_the_same_caller_twice_is_one_asker(here: There) -> None:
    assert here.ask(here.alice).id == here.ask(here.alice).id
    with here.database.read() as session:
        assert session.scalar(select(func.count()).select_from(ImageAsker)) == 1


def test_another_checksum_is_another_request(here: There) -> None:
    first, second = here.ask(here.alice), here.ask(here.alice, checksum="sha256:" + "A" * 64)
    assert first.id != second.id
    assert second.id == here.ask(here.bob, checksum="a" * 64).id  # said otherwise, and the same


def test_what_is_there_is_judged_and_not_fetched(here: There) -> None:
    key = images.request_key(URL, None)
    identifier = here.image(reference=URL, request_key=key)
    operation = here.ask(here.bob)
    assert (operation.kind, operation.resource_id) == ("image.join", identifier)
    assert here.refused(images.find, here.bob, identifier) == "image-not-found"  # not before it was judged


def test_what_was_lost_is_fetched_anew_under_its_id(there: There) -> None:
    identifier = there.image(reference=URL, request_key=images.request_key(URL, None), state="error", error="rot")
    found = at_once(10, lambda place: there.ask(there.bob))
    assert {(o.kind, o.resource_id) for o in found} == {("image.fetch", identifier)}
    assert len({o.id for o in found}) == 1
    row = there.row(identifier)
    assert row is not None
    assert (row.state, row.error) == ("fetching", None)


def test_an_image_that_goes_is_not_joined(here: There) -> None:
    key = images.request_key(URL, None)
    going = here.image(reference=URL, request_key=key, state="deleting")
    assert here.ask(here.bob).resource_id != going


# ---------------------------------------------------------------- who sees what


def test_who_asked_sees_it_and_nobody_else(here: There) -> None:
    identifier = here.ask(here.alice).resource_id
    here.ask(here.bob)
    for caller in (here.alice, here.bob, here.node, here.admin):
        assert here.do(images.find, caller, identifier).id == identifier
        assert [i.id for i in here.do(images.list_page, caller, ImageFilter()).items] == [identifier]
    assert here.refused(images.find, here.eve, identifier) == "image-not-found"
    assert here.do(images.list_page, here.eve, ImageFilter()).items == []


@pytest.mark.parametrize(("who", "close"), [("alice", True), ("bob", True), ("admin", True), ("node", False)])
def test_a_reference_is_told_to_who_asked_and_to_admins(here: There, who: str, close: bool) -> None:
    identifier = here.ask(here.alice).resource_id
    here.ask(here.bob)
    with here.database.read() as session:
        image = session.get_one(Image, identifier)
        assert images.shown(session, getattr(here, who), [image])[identifier].close is close


def test_events_hold_no_secret_of_a_reference(here: There) -> None:
    here.ask(here.alice)
    with here.database.read() as session:
        told = [str(event.detail) for event in session.scalars(select(Event))]
    assert told
    assert not [text for text in told if "hush" in text or "word" in text]
    assert any("images.example.org/debian.raw" in text for text in told)


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("BEE8-MMAw-Lk_IgsEExAy3d9R8h", "BEE8-MMAw-Lk_IgsEExAy3d9R8h"),
        (URL, "http://images.example.org/debian.raw"),
        ("https://h/a#b", "https://h/a"),
        ("name?secret", "name"),
        ("http://[half?x", "http://[half"),
        ("http://a@b@c/d@e?f@g", "http://c/d@e"),
    ],
)
def test_what_may_be_secret_is_taken_off(reference: str, shown: str) -> None:
    assert images.safe(reference) == shown


# ---------------------------------------------------------------- cancel


def test_of_two_who_wait_each_ends_only_their_own_part(here: There) -> None:
    operation = here.ask(here.alice)
    here.ask(here.bob)
    assert here.do(operations.cancel, here.alice, operation.id).cancel_requested is False
    assert here.do(operations.find, here.alice, operation.id).id == operation.id
    assert here.refused(operations.cancel, here.eve, operation.id) == "operation-not-found"
    assert here.do(operations.cancel, here.bob, operation.id).cancel_requested is True


def test_an_admin_ends_it_for_all(here: There) -> None:
    operation = here.ask(here.alice)
    here.ask(here.bob)
    assert here.do(operations.cancel, here.admin, operation.id).cancel_requested is True


def test_the_last_two_who_leave_at_once_end_it(there: There) -> None:
    operation = there.ask(there.alice)
    there.ask(there.bob)
    leaving = [there.alice, there.bob]
    at_once(2, lambda place: there.do(operations.cancel, leaving[place], operation.id))
    assert there.do(operations.find, there.admin, operation.id).cancel_requested is True


def test_who_joins_what_was_to_end_keeps_it(here: There) -> None:
    operation = here.ask(here.alice)
    here.do(operations.cancel, here.alice, operation.id)
    here.ask(here.bob)
    assert here.do(operations.find, here.bob, operation.id).cancel_requested is False


# ---------------------------------------------------------------- fair claims


def test_nobody_has_all_threads_of_the_lane(there: There) -> None:
    for number in range(5):
        there.ask(there.alice, f"http://images.example.org/{number}")
    mine = [operations.claim(there.database, "host:1:1", "image", 30, share=3) for _ in range(4)]
    assert [o is not None for o in mine] == [True, True, True, False]
    assert operations.claimable(there.database, "image", 3) == 0
    there.ask(there.bob, "http://images.example.org/bob")
    theirs = operations.claim(there.database, "host:1:1", "image", 30, share=3)
    assert theirs is not None
    assert theirs.actor == "bob"


def test_who_has_fewest_comes_first(there: There) -> None:
    for number in range(3):
        there.ask(there.alice, f"http://images.example.org/{number}")
    there.ask(there.bob, "http://images.example.org/bob")
    found = [operations.claim(there.database, "host:1:1", "image", 30, share=9) for _ in range(4)]
    assert [o.actor for o in found if o] == ["alice", "bob", "alice", "alice"]


def test_nobody_queues_more_than_the_site_lets_them(here: There, tmp_path: Path) -> None:
    url = here.database.engine.url.render_as_string(hide_password=False)
    here.settings = settings_for(tmp_path / "few", url, images={"asks": 2})
    body = ImageCreate(reference="http://images.example.org/more")
    here.ask(here.bob, "http://images.example.org/bob")
    for number in range(2):
        here.ask(here.alice, f"http://images.example.org/{number}")
    assert here.refused(images.create, here.settings, here.alice, body) == "too-many-asks"
    volume = VolumeCreate(image="http://images.example.org/more")
    assert here.refused(from_image.create, here.settings, here.alice, volume) == "too-many-asks"
    told = JudgementCreate(reference="http://images.example.org/more")
    assert here.refused(images.judge, here.settings, here.alice, told) == "too-many-asks"
    here.ask(here.alice, "http://images.example.org/bob")  # joins what is bob's
    for number in range(3):
        here.ask(here.admin, f"http://images.example.org/admin-{number}")
    ended = operations.claim(here.database, "host:1:1", "image", 30, share=9)
    assert ended is not None
    with here.database.write() as session:
        operations.finish(session, ended, "succeeded")
    other = operations.claim(here.database, "host:1:1", "image", 30, share=9)
    assert other is not None
    assert {ended.actor, other.actor} == {"alice", "bob"}
    with here.database.write() as session:
        operations.finish(session, other, "succeeded")
    assert here.do(images.create, here.settings, here.alice, body).state == "queued"


# ---------------------------------------------------------------- what is depended on


def pin(there: There, identifier: UUID, caller: Caller | None = None, name: str = "vm-1") -> Any:
    return there.do(pins.pin, there.settings, caller or there.node, identifier, name)


def test_a_pin_tells_where_the_file_is_and_keeps_it(here: There) -> None:
    identifier = here.image()
    told = pin(here, identifier)
    assert (told.kind, told.digest, told.path) == ("overlay", DIGEST, str(here.settings.image_path(DIGEST)))
    assert pin(here, identifier) == told  # again is fine
    assert pin(here, identifier, here.admin).kind == "admin"
    assert here.refused(images.request_delete, here.alice, identifier, None) == "image-pinned"
    here.do(pins.unpin, here.node, identifier, "vm-1")
    assert here.refused(images.request_delete, here.alice, identifier, None) == "image-pinned"
    here.do(pins.unpin, here.admin, identifier, "vm-1")
    assert here.do(images.request_delete, here.alice, identifier, None).kind == "image.delete"


def test_each_node_has_pins_of_its_own(here: There) -> None:
    identifier, other = here.image(), here.caller("node-2", "node")
    pin(here, identifier)
    pin(here, identifier, other)
    here.do(pins.unpin, here.node, identifier, "vm-1")
    with here.database.read() as session:
        assert [p.principal_id for p in session.scalars(select(ImagePin))] == [other.id]
    assert here.refused(pins.unpin, here.node, identifier, "vm-1") == "pin-not-found"


@pytest.mark.parametrize("state", ["receiving", "fetching", "deleting", "error"])
def test_only_what_is_there_is_pinned(here: There, state: str) -> None:
    identifier = here.image(state=state, visibility="public")
    assert here.refused(pins.pin, here.settings, here.node, identifier, "vm-1") == "image-not-available"


def test_users_pin_nothing(here: There) -> None:
    assert here.refused(pins.pin, here.settings, here.alice, here.image(), "vm-1") == "nodes-only"
    assert here.refused(pins.list_of, here.alice, here.image()) == "nodes-only"


def test_a_volume_keeps_the_image_it_was_made_from(here: There) -> None:
    identifier = here.image(visibility="public")
    operation = here.do(from_image.create, here.settings, here.bob, VolumeCreate(image=str(identifier)))
    with pytest.raises(Problem, match="1 of others"):
        here.do(images.request_delete, here.alice, identifier, None)
    with pytest.raises(Problem, match=str(operation.resource_id)):
        here.do(images.request_delete, here.admin, identifier, None)


def test_of_a_pin_and_an_eviction_at_once_one_wins(there: There) -> None:
    for _ in range(10):
        identifier = there.image()

        def attempt(place: int, identifier: UUID = identifier) -> bool:
            if place:
                return bool(there.do(holds.take_away, identifier))
            try:
                return bool(pin(there, identifier))
            except Problem:
                return False

        assert sum(at_once(2, attempt)) == 1


def test_of_a_volume_and_an_eviction_at_once_one_wins(there: There) -> None:
    body = VolumeCreate
    for _ in range(10):
        identifier = there.image()

        def attempt(place: int, identifier: UUID = identifier) -> bool:
            if place:
                return bool(there.do(holds.take_away, identifier))
            try:
                return bool(there.do(from_image.create, there.settings, there.alice, body(image=str(identifier))))
            except Problem:
                return False

        assert sum(at_once(2, attempt)) == 1


# ---------------------------------------------------------------- records


def test_a_change_counts_the_version_and_minds_if_match(here: There) -> None:
    identifier = here.image()
    changed = here.do(images.update_record, here.alice, identifier, ImageUpdate(name="new"), 1)
    assert (changed.name, changed.visibility, changed.version) == ("new", "private", 2)
    again = ImageUpdate(visibility="public")
    assert here.refused(images.update_record, here.alice, identifier, again, 1) == "precondition-failed"
    here.do(images.update_record, here.alice, identifier, again, 2)
    assert here.refused(images.update_record, here.bob, identifier, again, None) == "not-owner"
    assert here.refused(images.request_delete, here.alice, identifier, 1) == "precondition-failed"


def test_uploads_count_in_the_quota(here: There) -> None:
    poor = here.caller("poor", quota_size=10 * MIB)
    told = {"size": 8 * MIB, "checksum": "0" * 64, "format": "raw"}
    body = ImageCreate.model_validate({"upload": told})
    image = here.do(images.create, here.settings, poor, body)
    assert (image.state, image.charged, image.upload["checksum"]) == ("receiving", 8 * MIB, "sha256:" + "0" * 64)
    assert here.refused(images.create, here.settings, poor, body) == "quota-exceeded"
    here.do(capacity.release_kept, poor.id, 8 * MIB)
    here.do(images.create, here.settings, poor, body)


def test_a_volume_smaller_than_its_image_is_refused(here: There) -> None:
    body = VolumeCreate(image=str(here.image()), size=4 * MIB)
    assert here.refused(from_image.create, here.settings, here.alice, body) == "size-too-small"


def test_a_volume_of_what_is_still_to_come_has_no_size_yet(here: There) -> None:
    operation = here.do(from_image.create, here.settings, here.alice, VolumeCreate(image=URL))
    assert operation.kind == "volume.from-image"
    with here.database.read() as session:
        kinds = sorted(o.kind for o in session.scalars(select(Operation)))
    assert kinds == ["image.fetch", "volume.from-image"]


def test_states_of_a_deleted_image_are_final(here: There) -> None:
    identifier = here.image(state="deleting")
    with here.database.write() as session:
        assert not transition(session, Image, identifier, "available")
        assert not transition(session, Image, identifier, "fetching")
    assert here.refused(images.update_record, here.alice, identifier, ImageUpdate(name="x"), None) == (
        "image-not-available"
    )


def test_every_refusal_of_images_has_a_status() -> None:
    def below(kind: type[errors.ImageError]) -> set[str]:
        return {kind.code}.union(*(below(each) for each in kind.__subclasses__()))

    told = {"target-full"}  # told as pool-full
    assert below(errors.ImageError) - told == (IMAGE_REFUSALS - {"image-not-available"}) | UNWELL
    assert not IMAGE_REFUSALS & UNWELL


def test_what_is_refused_at_once_and_later_ends_a_command_alike() -> None:
    for codes, expected in ((IMAGE_REFUSALS | REFUSALS - {"cancelled"}, Exit.CONFLICT), (UNWELL, Exit.UNAVAILABLE)):
        failed = {
            code: OperationFailed({"id": "1", "kind": "k", "state": "failed", "error": {"code": code}})
            for code in codes
        }
        assert {code for code, error in failed.items() if error.exit_code != expected} == set()

"""kill -9 at every stage of a fetch, of a golden copy and of an eviction: what comes after it finishes, and nothing
unverified is ever there to be handed out."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app import from_image, image_care, images, operations
from app.db import Database
from app.models import Image, Operation
from app.outside import Outside
from app.schemas import VolumeCreate
from app.worker import Worker
from tests.support.databases import settings_for
from tests.support.house import House, open_house
from tests.support.imagehouse import LOOPBACK, ImageHouse, content, sha256
from tests.support.killing import killed_by_itself
from tests.support.origin import Origin

#: In the order in which an image comes by them (imagecache.store, imagecache.cache).
OF_A_FETCH = ("staged", "fetched", "inspected", "flattened", "hashed", "linked", "committed")


@pytest.fixture
def url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "stratus.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def there(url: str, tmp_path: Path) -> Iterator[ImageHouse]:
    """Its own worker does not run yet: the first try is a fork's."""
    database = Database(url, connections=60)
    with Origin() as origin, open_house(tmp_path / "home", database, images={"allow_networks": LOOPBACK}) as house:
        yield ImageHouse(house, origin)
    database.close()


def dying(house: House, url: str, lane: str, step: str) -> Callable[[], None]:
    """Work for a fork: a worker of its own takes the next operation of the lane, and is killed at that step."""

    def work() -> None:
        def trace(reached: str) -> None:
            if reached == step:
                os.kill(os.getpid(), signal.SIGKILL)

        database = Database(url, connections=5)
        settings = settings_for(house.settings.home, url, images={"allow_networks": LOOPBACK})
        outside = Outside(settings, database, house.keys, house.target, dict(house.outside.pools))
        image_care.watch(outside)
        assert outside.library is not None
        outside.library.cache.trace = trace
        worker = Worker(outside, house.bus)
        operation = operations.claim(database, worker.name, lane, lease=0.1)
        assert operation is not None
        worker.work(operation)

    return work


@pytest.mark.parametrize("step", OF_A_FETCH)
def test_a_fetch_that_dies_is_done_by_the_next_worker(there: ImageHouse, url: str, step: str) -> None:
    data = content(1)
    operation = there.ask(**there.publish("/a.raw", data))
    assert killed_by_itself(dying(there.house, url, "image", step))
    (image,) = there.rows(Image)
    assert (image.state, image.digest) == ("fetching", None)  # nothing is offered
    assert all(sha256(there.file(digest).read_bytes()) == digest for digest in there.files())
    there.house.start()
    ended = there.house.ended(operation)
    assert (ended.state, ended.attempt) == ("succeeded", 2)
    there.at_rest()


def test_a_golden_copy_that_dies_is_made_anew(there: ImageHouse, url: str) -> None:
    data = content(1)
    there.ask(**there.publish("/a.raw", data))
    fetching = operations.claim(there.house.database, there.house.worker.name, "image", 30)
    assert fetching is not None
    there.house.worker.work(fetching)
    (image,) = there.rows(Image)
    body = VolumeCreate(image=str(image.id))
    operation = there.house.do(from_image.create, there.house.settings, there.alice, body)
    assert killed_by_itself(dying(there.house, url, "data", "written"))
    assert [copy.state for copy in there.golden()] == ["creating"]
    there.house.start()
    ended = there.house.ended(operation)
    assert ended.state == "succeeded", ended.error_detail
    assert there.backing(operation.resource_id).read_bytes() == data
    there.at_rest()


def test_an_eviction_that_dies_is_ended(there: ImageHouse, url: str) -> None:
    there.ask(**there.publish("/a.raw", content(1)))
    fetching = operations.claim(there.house.database, there.house.worker.name, "image", 30)
    assert fetching is not None
    there.house.worker.work(fetching)
    (image,) = there.rows(Image)
    operation = there.house.do(images.request_delete, there.alice, image.id, None)
    assert killed_by_itself(dying(there.house, url, "data", "evicted"))
    assert [row.state for row in there.rows(Image)] == ["deleting"]
    there.house.start()
    assert there.house.ended(operation).state == "succeeded"
    assert (there.rows(Image), there.files()) == ([], [])
    assert [o.state for o in there.rows(Operation)] == ["succeeded", "succeeded"]
    there.at_rest()

"""A house with images: a worker in the test's own process, an origin on loopback, and what is asked of both."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import select

from app import from_image, images, operations
from app.auth import Caller
from app.db import Database
from app.models import Event, GoldenCopy, Image, Operation
from app.schemas import ImageCreate, VolumeCreate
from tests.support import invariants
from tests.support.house import House, open_house
from tests.support.origin import Origin

MIB = 1 << 20
LOOPBACK = ["127.0.0.0/8"]


def content(seed: int, size: int = 4 * MIB) -> bytes:
    """Half of it noise, half of it zeros; another for each seed."""
    return random.Random(seed).randbytes(size // 2) + bytes(size - size // 2)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class ImageHouse:
    def __init__(self, house: House, origin: Origin) -> None:
        self.house, self.origin = house, origin
        self.alice = house.caller("alice")

    @property
    def cache(self) -> Any:
        assert self.house.outside.library is not None
        return self.house.outside.library.cache

    def publish(self, path: str, data: bytes, **faults: Any) -> dict[str, str]:
        """Put it at the origin; how it is asked for."""
        self.origin.put(path, data, **faults)
        return {"reference": self.origin.url(path), "checksum": sha256(data)}

    def ask(self, caller: Caller | None = None, **body: Any) -> Operation:
        wanted = ImageCreate.model_validate(body)
        found: Any = self.house.do(images.create, self.house.settings, caller or self.alice, wanted)
        assert isinstance(found, Operation)
        return found

    def fetched(self, caller: Caller | None = None, **body: Any) -> Image:
        """The image, once its operation has succeeded."""
        ended = self.house.ended(self.ask(caller, **body))
        assert ended.state == "succeeded", (ended.error_code, ended.error_detail)
        image = self.row(ended.resource_id)
        assert image is not None
        return image

    def failed(self, caller: Caller | None = None, **body: Any) -> str:
        ended = self.house.ended(self.ask(caller, **body))
        assert ended.state == "failed"
        return str(ended.error_code)

    def volume(self, caller: Caller | None = None, **body: Any) -> Operation:
        """The operation of a volume from an image, once it has ended."""
        wanted = VolumeCreate.model_validate(body)
        return self.house.ended(self.house.do(from_image.create, self.house.settings, caller or self.alice, wanted))

    def delete(self, image: UUID) -> Operation:
        return self.house.ended(self.house.do(images.request_delete, self.alice, image, None))

    def cancel(self, operation: Operation) -> Operation:
        return self.house.ended(self.house.do(operations.cancel, self.alice, operation.id))

    def row(self, identifier: UUID) -> Image | None:
        with self.house.database.read() as session:
            return session.get(Image, identifier)

    def rows(self, model: Any) -> list[Any]:
        with self.house.database.read() as session:
            return list(session.scalars(select(model).order_by(model.id)))

    def golden(self) -> list[GoldenCopy]:
        return self.rows(GoldenCopy)

    def events(self, kind: str) -> list[Event]:
        with self.house.database.read() as session:
            return list(session.scalars(select(Event).where(Event.kind == kind).order_by(Event.id)))

    def file(self, digest: str | None) -> Path:
        assert digest is not None
        return self.house.settings.image_path(digest)

    def files(self) -> list[str]:
        return sorted(path.stem for path in (self.house.settings.image_dir / "images").iterdir())

    def backing(self, volume: UUID) -> Path:
        return self.house.outside.pools["default"].backing(volume).path

    def set_policy(self, **values: Any) -> None:
        """As if the site had been started with another policy."""
        library = self.house.outside.library
        assert library is not None
        changed = dataclasses.replace(library.policy, **values)
        self.house.outside.library = dataclasses.replace(library, policy=changed)

    def downloads(self, path: str) -> int:
        """Of all or the rest of it; a look at its beginning is none."""
        return len([headers for headers in self.origin.asked(path) if headers.get("Range") != "bytes=0-511"])

    def at_rest(self) -> None:
        """Nothing is half-way: no operation, no row, no file of any."""
        self.house.settle()
        invariants.check(self.house.database, idle=True)
        assert list((self.house.settings.image_dir / "staging").iterdir()) == []
        assert self.files() == sorted({image.digest for image in self.rows(Image) if image.digest})


@contextmanager
def image_house(home: Path, database: Database, **sections: Any) -> Iterator[ImageHouse]:
    """One whose worker runs."""
    configured = {"allow_networks": LOOPBACK} | sections.pop("images", {})
    with Origin() as origin, open_house(home, database, images=configured, **sections) as house:
        house.start()
        yield ImageHouse(house, origin)

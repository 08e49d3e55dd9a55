"""What an asker demands of bytes, and a policy of them, also holds where the bytes are there already."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from app.db import Database
from app.states import now
from app.steps.judging import facts_of, resolution_of
from imagecache.entries import Entry
from imagecache.identifiers import identifier_of
from imagecache.resolve import Resolution
from tests.support.endorsements import entry
from tests.support.imagehouse import ImageHouse, content, image_house, sha256
from tests.support.marketplace import marketplace


def house(sqlite_database: Database, tmp_path: Path, **settings: Any) -> AbstractContextManager[ImageHouse]:
    return image_house(tmp_path / "home", sqlite_database, images=settings)


def test_a_second_checksum_of_the_asker_is_compared_too(sqlite_database: Database, tmp_path: Path) -> None:
    data = content(1)
    with house(sqlite_database, tmp_path) as there:
        there.fetched(**there.publish("/a.raw", data))
        there.publish("/b.raw", data)
        url = f"{there.origin.url('/b.raw')}?sha256={sha256(data)}"
        assert there.failed(reference=url, checksum="sha1:" + "0" * 40) == "wrong-digest"
        right = hashlib.sha1(data).hexdigest()
        assert there.fetched(reference=url, checksum=f"sha1:{right}").state == "available"


def test_a_checksum_demanded_of_an_identifier_is_compared_too(sqlite_database: Database, tmp_path: Path) -> None:
    data = content(1)
    with marketplace() as market, house(sqlite_database, tmp_path, marketplaces=[market.url]) as there:
        there.publish("/a.raw", data)
        location = there.origin.url("/a.raw")
        until = now() + dt.timedelta(30)
        market.add(entry(data, algorithms=["sha1", "sha256"], locations=[location], format="raw", valid=until))
        identifier = identifier_of(hashlib.sha1(data).hexdigest())
        there.fetched(reference=identifier)
        assert there.failed(reference=identifier, checksum="sha512:" + "0" * 128) == "wrong-digest"
        assert there.fetched(reference=identifier, checksum=hashlib.sha512(data).hexdigest()).state == "available"


def test_what_is_demanded_is_kept_for_the_next_try() -> None:
    url = "http://images.example.org/a.raw"
    told = Entry(source="the asker", checksums={"sha256": "5" * 64}, locations=(url,), valid_until=now())
    found = Resolution(url, "image", (told,), url, {"sha256": "5" * 64, "sha1": "0" * 40})
    assert resolution_of(url, json.loads(json.dumps(facts_of(found, told)))) == found


def test_bytes_that_were_denied_meanwhile_are_denied_under_another_reference(
    sqlite_database: Database, tmp_path: Path
) -> None:
    data = content(1)
    with house(sqlite_database, tmp_path) as there:
        image = there.fetched(**there.publish("/a.raw", data))
        there.set_policy(deny_checksums=frozenset((image.source_digests or {}).values()))
        assert there.failed(**there.publish("/b.raw", data)) == "policy-refused"

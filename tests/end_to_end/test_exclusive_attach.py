"""One writer or many readers, however many ask at once."""

from __future__ import annotations

import sqlite3
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier

import requests

from tests.support.service import Api, RunningService, initiator_of

MANY = 100


def name(number: int) -> str:
    return f"iqn.2026-11.org.example:n{number}"


def attach_at_once(service: RunningService, volume: str, modes: list[str]) -> list[requests.Response]:
    """One request for each mode, each by an initiator of its own, all sent in the same moment."""
    start = Barrier(len(modes))
    token = service.admin_token

    def ask(number: int) -> requests.Response:
        body = {"instance_id": "test", "node": "test", "initiator": name(number), "mode": modes[number]}
        with Api(service.base, token) as api:
            start.wait()
            return api.post(f"/v1/volumes/{volume}/attachments", json=body, headers={"Prefer": "wait=30"}, timeout=240)

    with ThreadPoolExecutor(len(modes)) as pool:
        return list(pool.map(ask, range(len(modes))))


def outcomes(answers: list[requests.Response]) -> Counter[tuple[int, str | None]]:
    return Counter((answer.status_code, answer.json().get("code")) for answer in answers)


def holders(service: RunningService, volume: str) -> Counter[str]:
    """How often each mode holds the volume, by the database's own rows."""
    with closing(sqlite3.connect(f"file:{service.home}/stratus.db?mode=ro", uri=True)) as database:
        query = "SELECT held_mode FROM attachments WHERE volume_id = ? AND held_mode IS NOT NULL"
        return Counter(mode for (mode,) in database.execute(query, [uuid.UUID(volume).hex]))


def test_of_a_hundred_writers_one_gets_the_volume(service: RunningService) -> None:
    volume = service.admin.make_volume()["id"]
    answers = attach_at_once(service, volume, ["rw"] * MANY)
    assert outcomes(answers) == {(201, None): 1, (409, "volume-in-use"): MANY - 1}
    assert holders(service, volume) == {"rw": 1}
    (won,) = (answer.json() for answer in answers if answer.status_code == 201)
    initiator_of(won).write(0, 0x41, 4096)
    attached = service.admin.show(f"/v1/volumes/{volume}")["attachments"]
    assert [attachment["id"] for attachment in attached] == [won["id"]]
    assert len(service.admin.events("attachment.attach")) == 1


def test_all_of_many_readers_get_it(service: RunningService) -> None:
    volume, count = service.admin.make_volume()["id"], 16
    answers = attach_at_once(service, volume, ["ro"] * count)
    assert outcomes(answers) == {(201, None): count}
    assert holders(service, volume) == {"ro": count}
    assert [initiator_of(answer.json()).login_error() for answer in answers] == [None] * count
    assert len({answer.json()["connection"]["auth"]["password"] for answer in answers}) == count


def test_writers_and_readers_never_hold_it_together(service: RunningService) -> None:
    for _ in range(3):
        volume = service.admin.make_volume()["id"]
        answers = attach_at_once(service, volume, ["rw", "ro"] * 6)
        won = Counter(answer.json()["mode"] for answer in answers if answer.status_code == 201)
        assert won in ({"rw": 1}, {"ro": 6})
        assert holders(service, volume) == won
        assert outcomes(answers) == {(201, None): won.total(), (409, "volume-in-use"): 12 - won.total()}


def test_one_initiator_does_not_attach_a_volume_twice(service: RunningService) -> None:
    volume = service.admin.make_volume()["id"]
    service.admin.attach(volume, name(1), "ro")
    body = {"instance_id": "other", "node": "test", "initiator": name(1).upper(), "mode": "ro"}
    answer = service.admin.post(f"/v1/volumes/{volume}/attachments", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "initiator-attached")

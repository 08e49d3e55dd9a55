"""Quotas: what is promised never passes them, and what is not kept is given back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests

from tests.api.support import MIB, problem, unchanged
from tests.support.service import Api, RunningService, running

TOGETHER = 30


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One whose pool promises more than its file system can do: operations fail that were allowed."""
    home = tmp_path_factory.mktemp("quotas") / "home"
    environment = {
        "STRATUS_POOLS__DEFAULT__PATH": str(home / "pool"),
        "STRATUS_POOLS__DEFAULT__OVERCOMMIT_RATIO": "1e9",
    }
    with running(home, environment) as started:
        yield started


def user(service: RunningService, name: str, size: int | None = None, count: int | None = None) -> Api:
    api = service.user(name)
    assert service.admin.put(f"/v1/quotas/{name}", json={"size": size, "count": count}).status_code == 200
    return api


def used(api: Api) -> tuple[int, int]:
    """Bytes and records charged."""
    quota = api.get("/v1/quotas/" + api.get("/v1/whoami").json()["name"]).json()
    return quota["used_size"], quota["used_count"]


def tally(answers: list[requests.Response]) -> int:
    """How many were made; all others were refused for the quota."""
    for answer in answers:
        assert answer.status_code == 201 or problem(answer, 409, "quota-exceeded")
    return [answer.status_code for answer in answers].count(201)


@pytest.mark.parametrize(
    ("name", "size", "count", "fit"),
    [("by-count", None, 10, 10), ("by-size", 7 * MIB, None, 3), ("by-both", 9 * MIB, 4, 4), ("nothing", None, 0, 0)],
)
def test_exactly_as_many_as_fit(
    service: RunningService, name: str, size: int | None, count: int | None, fit: int
) -> None:
    api = user(service, name, size, count)
    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(lambda _: api.post("/v1/volumes", json={"size": 2 * MIB}), range(TOGETHER)))
    assert tally(answers) == fit
    assert used(api) == (2 * MIB * fit, fit)
    assert len(api.get("/v1/volumes?limit=100").json()["items"]) == fit


def test_copies_count_like_volumes(service: RunningService) -> None:
    """Snapshots and clones too, and all of them at once."""
    api = user(service, "copies", count=9)
    source = api.make_volume(2 * MIB)["id"]

    def make(number: int) -> requests.Response:
        if number % 3 == 0:
            return api.post(f"/v1/volumes/{source}/snapshots", json={})
        body = {"volume": source} if number % 3 == 1 else {"size": 2 * MIB}
        return api.post("/v1/volumes", json=body)

    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(make, range(TOGETHER)))
    assert tally(answers) == 8
    assert used(api) == (18 * MIB, 9)
    snapshots = api.get("/v1/snapshots").json()["items"]
    volumes = api.get("/v1/volumes").json()["items"]
    assert len(snapshots) + len(volumes) == 9


def test_growing_counts(service: RunningService) -> None:
    api = user(service, "grower", size=5 * MIB)
    path = f"/v1/volumes/{api.make_volume(2 * MIB)['id']}"
    with unchanged(service):
        problem(api.patch(path, json={"size": 6 * MIB}), 409, "quota-exceeded")
    assert api.patch(path, json={"size": 5 * MIB}).json()["size"] == 5 * MIB
    assert used(api) == (5 * MIB, 1)


def test_what_is_deleted_is_given_back(service: RunningService) -> None:
    api = user(service, "deleter", size=4 * MIB, count=2)
    promised = _promised(api)
    volume = api.make_volume(2 * MIB)["id"]
    snapshot = api.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    assert used(api) == (4 * MIB, 2)
    problem(api.post("/v1/volumes", json={"size": MIB}), 409, "quota-exceeded")
    assert api.delete(f"/v1/volumes/{volume}").status_code == 204
    assert used(api) == (2 * MIB, 1)
    assert api.delete(f"/v1/snapshots/{snapshot}").status_code == 204
    assert used(api) == (0, 0)
    assert _promised(api) == promised


def _promised(api: Api) -> int:
    return int(api.get("/v1/pools").json()["items"][0]["promised"])


def test_what_failed_is_given_back_with_its_record(service: RunningService) -> None:
    """No file of 60 TiB on this file system: the operation fails, and the charge ends with the record at the latest."""
    api = user(service, "failer", size=64 << 40)
    answer = api.post("/v1/volumes", json={"size": 60 << 40})
    problem(answer, 409, "size-too-large")
    for volume in api.get("/v1/volumes").json()["items"]:
        assert volume["state"] == "error"
        assert api.delete(f"/v1/volumes/{volume['id']}").status_code == 204
    assert used(api) == (0, 0)


def test_growth_that_failed_is_given_back(service: RunningService) -> None:
    api = user(service, "failing-grower", size=64 << 40)
    path = f"/v1/volumes/{api.make_volume(2 * MIB)['id']}"
    problem(api.patch(path, json={"size": 60 << 40}), 409, "size-too-large")
    assert used(api) == (2 * MIB, 1)
    shown = api.get(path).json()
    assert (shown["size"], shown["state"]) == (2 * MIB, "available")


def test_what_was_cancelled_is_given_back(service: RunningService) -> None:
    api = user(service, "canceller")
    source = api.make_volume(2 * MIB)["id"]
    worker = service.worker_pid()
    service.kill(worker, signal.SIGSTOP)
    try:
        copy = api.post("/v1/volumes", json={"volume": source}, headers={"Prefer": "wait=0"})
        assert copy.status_code == 202
        assert used(api) == (4 * MIB, 2)
        assert api.post(copy.headers["Location"] + "/cancel", json={}).status_code == 200
    finally:
        with suppress(ProcessLookupError):  # the supervisor may have replaced it by now
            service.kill(worker, signal.SIGCONT)
    ended = api.get(copy.headers["Location"] + "?wait=30").json()
    assert ended["state"] == "cancelled"
    assert used(api) == (2 * MIB, 1)
    problem(api.get(f"/v1/volumes/{ended['resource']['id']}"), 404, "volume-not-found")


def test_copies_are_charged_to_who_has_them(service: RunningService) -> None:
    """A clone of a public volume to who clones; a snapshot an admin takes to the volume's owner."""
    owner, other = user(service, "has"), user(service, "clones")
    volume = owner.make_volume(2 * MIB, visibility="public")["id"]
    other.post("/v1/volumes", json={"volume": volume})
    service.admin.post(f"/v1/volumes/{volume}/snapshots", json={})
    assert (used(owner), used(other)) == ((4 * MIB, 2), (2 * MIB, 1))


def test_null_is_the_default_of_the_site(service: RunningService) -> None:
    user(service, "defaulted", size=MIB, count=1)
    answer = service.admin.put("/v1/quotas/defaulted", json={"size": None, "count": None})
    assert (answer.json()["size"], answer.json()["count"]) == (10 << 40, 1000)

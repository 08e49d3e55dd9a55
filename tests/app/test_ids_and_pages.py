"""Identifiers in the order of time, and pages over them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.db import Database
from app.errors import Problem
from app.ids import new_id
from app.models import Group
from app.paging import decode_cursor, encode_cursor, page
from app.states import now


@given(st.integers(min_value=1, max_value=300))
def test_ids_are_unique_ordered_and_of_their_time(count: int) -> None:
    before = time.time_ns() // 1_000_000
    made = [new_id() for _ in range(count)]
    after = time.time_ns() // 1_000_000
    assert made == sorted(made)
    assert len(set(made)) == count
    for identifier in made:
        assert (identifier.version, identifier.variant) == (7, "specified in RFC 4122")
        assert before <= identifier.int >> 80 <= after


def test_ids_of_many_threads_are_unique() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [i for ids in pool.map(lambda _: [new_id() for _ in range(2000)], range(8)) for i in ids]
    assert len(set(made)) == 16000


@given(st.uuids())
def test_a_cursor_is_read_back(identifier: UUID) -> None:
    text = encode_cursor(identifier)
    assert decode_cursor(text) == identifier
    assert text.isascii()
    assert "=" not in text


@pytest.mark.parametrize("text", ["", "x", "not a cursor", "AAAA", "A" * 23, "é" * 22, "A" * 24])
def test_a_foreign_cursor_is_refused_with_the_name_of_the_parameter(text: str) -> None:
    with pytest.raises(Problem) as refused:
        decode_cursor(text)
    assert (refused.value.status, refused.value.code) == (422, "invalid-request")
    assert [error.name for error in refused.value.errors] == ["next"]


@pytest.fixture
def groups(database: Database) -> list[UUID]:
    made = [Group(id=new_id(), name=f"g{n:02}", created_at=now()) for n in range(23)]
    with database.write() as session:
        session.add_all(made)
    return [group.id for group in made]


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("limit", [1, 5, 22, 23, 24, 1000])
def test_pages_show_everything_once_in_order(
    database: Database, groups: list[UUID], limit: int, newest_first: bool
) -> None:
    seen: list[UUID] = []
    cursor = None
    with database.read() as session:
        while True:
            found = page(session, Group, limit=limit, cursor=cursor, newest_first=newest_first)
            assert len(found.items) <= limit
            seen += [group.id for group in found.items]
            cursor = found.next
            if cursor is None:
                break
    assert seen == (groups[::-1] if newest_first else groups)


def test_branches_are_merged_without_repetition(database: Database, groups: list[UUID]) -> None:
    low, high = Group.name < "g15", Group.name >= "g10"
    seen: list[UUID] = []
    cursor = None
    with database.read() as session:
        while True:
            found = page(session, Group, limit=4, cursor=cursor, branches=[[low], [high], [Group.name == "g12"]])
            seen += [group.id for group in found.items]
            cursor = found.next
            if cursor is None:
                break
        nothing = page(session, Group, limit=4, cursor=None, branches=[[Group.name == "none"]])
    assert seen == groups
    assert (list(nothing.items), nothing.next) == ([], None)


def test_what_is_made_between_two_pages_is_on_the_next(database: Database, groups: list[UUID]) -> None:
    with database.read() as session:
        first = page(session, Group, limit=20, cursor=None)
    late = Group(id=new_id(), name="late", created_at=now())
    with database.write() as session:
        session.add(late)
        session.delete(session.get_one(Group, groups[20]))
    with database.read() as session:
        rest = page(session, Group, limit=20, cursor=first.next)
    assert [group.id for group in rest.items] == [groups[21], groups[22], late.id]

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratus.text import clean, clean_json, width
from tests.stratus.conftest import Run
from tests.stratus.standin import Reply, StandIn, attachment, problem, volume

HOSTILE = "\x1b]0;owned\x07 \x9b31m\u202egnp.exe\u2028next\r\n\x7f"
NAMES = ["plain", "Übung 数据 🧪", "=1+1", 'quote " and, comma', "[red]markup[/red]", "שלום\u200f", HOSTILE]


def listed(service: StandIn, *records: dict[str, Any]) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": list(records), "next": None}))


def harmless(text: str) -> bool:
    return not any(ord(each) < 32 or 127 <= ord(each) < 160 or each in "\u202e\u2028" for each in text)


def test_a_table_is_for_people(service: StandIn, run: Run) -> None:
    holder = attachment(node="host7", mode="ro")
    listed(service, volume(), volume(name=None, size=3 << 29, state="error", error="torn", attachments=[holder]))
    header, first, second = run("describe-volumes").stdout.splitlines()
    assert header.split() == ["ID", "NAME", "SIZE", "STATE", "OWNER", "VISIBILITY", "POOL", "ATTACHMENTS"]
    assert first.split()[1:] == ["results", "10GiB", "available", "alice", "private", "default", "-"]
    assert second.split("  ")[-1].strip() == "host7 (ro)"
    assert "error: torn" in second
    assert "1.5GiB" in second


def test_columns_stand_under_each_other_in_any_script(service: StandIn, run: Run) -> None:
    listed(service, volume(name="数据"), volume(name="e\u0301té"), volume(name="plain name"))
    lines = run("describe-volumes").stdout.splitlines()
    assert (
        len({width(line[: line.index(word)]) for line, word in zip(lines, ["SIZE"] + ["10GiB"] * 3, strict=True)}) == 1
    )


@pytest.mark.parametrize("name", NAMES)
def test_json_and_csv_give_names_and_bytes_back(service: StandIn, run: Run, name: str) -> None:
    record = volume(name=name)
    listed(service, record)
    printed = run("describe-volumes", "--format", "json").stdout
    assert json.loads(printed) == [record]
    assert harmless(printed.replace("\n", ""))
    rows = list(
        csv.DictReader(io.StringIO(run("describe-volumes", "--format", "csv").stdout_bytes.decode(), newline=""))
    )
    assert (rows[0]["name"], rows[0]["size"]) == (name, str(10 << 30))


def test_csv_is_rfc_4180(service: StandIn, run: Run) -> None:
    listed(service, volume(name='a "b", c', attachments=[attachment(), attachment()]))
    lines = run("describe-volumes", "--format", "csv").stdout_bytes.decode().split("\r\n")
    assert lines[0] == "id,name,size,state,owner,visibility,pool,attachments"
    assert ',"a ""b"", c",10737418240,' in lines[1]
    assert lines[2:] == [""]


def test_a_table_never_drives_the_terminal(service: StandIn, run: Run) -> None:
    listed(service, volume(name=HOSTILE, owner=HOSTILE))
    lines = run("describe-volumes").stdout.split("\n")
    assert len(lines) == 3
    assert all(harmless(line) for line in lines)
    assert "\\u001b]0;owned\\u0007" in lines[1]


def test_an_error_never_drives_the_terminal(service: StandIn, run: Run) -> None:
    errors = [{"pointer": HOSTILE, "code": HOSTILE, "detail": HOSTILE}]
    service.on("GET", "/v1/volumes", problem(409, HOSTILE, HOSTILE, title=HOSTILE, errors=errors))
    lines = run("describe-volumes").stderr.split("\n")
    assert len(lines) == 3
    assert all(harmless(line) for line in lines)


@given(st.text(st.characters(codec=None)))
def test_clean_text_is_one_harmless_line(text: str) -> None:
    assert harmless(clean(text))
    assert clean(clean(text)) == clean(text)
    clean(text).encode()


@given(st.recursive(st.text(st.characters(codec=None)) | st.integers(), lambda each: st.lists(each, max_size=3)))
def test_clean_json_is_the_same_value(value: Any) -> None:
    printed = clean_json(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(printed) == value
    assert harmless(printed.replace("\n", ""))

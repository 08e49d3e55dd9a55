from __future__ import annotations

import string
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsi import names

PREFIX = "iqn.2026-11.org.example.stratus"


@pytest.mark.parametrize(
    "name",
    [
        "iqn.1993-08.org.debian:01:a1b2c3d4e5f6",
        "iqn.2001-04.com.example",
        "iqn.2001-04.com.example:storage.disk2-sys1.xyz",
        "eui.02004567a425678d",
        "naa.52004567ba64678d",
        "naa.62004567ba64678d0123456789abcdef",
        "iqn.2001-04.com.example:" + "a" * 199,
    ],
)
def test_names_of_every_form_are_taken(name: str) -> None:
    assert names.validate_initiator(name) == name


def test_names_are_folded_to_lower_case() -> None:
    assert names.validate_initiator("IQN.2001-04.COM.Example:Disk") == "iqn.2001-04.com.example:disk"
    assert names.validate_initiator("eui.02004567A425678D") == "eui.02004567a425678d"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "node1",
        "iqn.",
        "iqn.2001-13.com.example:x",
        "iqn.2001-00.com.example:x",
        "iqn.01-04.com.example:x",
        "iqn.2001-04.localhost:x",
        "iqn.2001-04.com..example:x",
        "iqn.2001-04.-com.example:x",
        "iqn.2001-04.com.example:",
        "iqn.2001-04.com.example:a b",
        "iqn.2001-04.com.example:a_b",
        "iqn.2001-04.com.example:a,b",
        "iqn.2001-04.com.example:a\n",
        "iqn.2001-04.com.example:a\0",
        "iqn.2001-04.com.example:é",
        "iqn.2001-04.com.example:\uff41",
        "iqn.2001-04.com.example:" + "a" * 200,
        "eui.02004567a425678",
        "eui.02004567a425678g",
        "naa.52004567ba64678",
        "naa.52004567ba64678d0",
        " iqn.2001-04.com.example:x",
    ],
)
def test_bad_names_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(names.BadName) as caught:
        names.validate_initiator(name)
    assert caught.value.name == name
    assert caught.value.reason


@given(st.text())
def test_whatever_is_taken_is_in_its_normal_form(text: str) -> None:
    for candidate in (text, f"iqn.2001-04.com.example:{text}"):
        try:
            name = names.validate_initiator(candidate)
        except names.BadName:
            continue
        assert set(name) <= set(string.ascii_lowercase + string.digits + "-.:")
        assert len(name) <= 223
        assert names.validate_initiator(name) == name


@given(st.uuids())
def test_identities_derive_from_the_volume(volume_id: UUID) -> None:
    assert names.volume_of(PREFIX, names.target_name(PREFIX, volume_id)) == volume_id
    assert names.volume_of("iqn.2026-11.org.example", names.target_name(PREFIX, volume_id)) is None
    assert len(names.naa(volume_id)) == 32
    assert int(names.naa(volume_id), 16) >> 124 == 6
    assert names.serial(volume_id) == volume_id.hex
    assert volume_id.hex.startswith(names.naa(volume_id)[7:])


@pytest.mark.parametrize("iqn", ["", PREFIX, f"{PREFIX}:1", f"{PREFIX}:{'0' * 32}", "iqn.2001-04.com.example:x"])
def test_other_targets_are_no_volumes(iqn: str) -> None:
    assert names.volume_of(PREFIX, iqn) is None

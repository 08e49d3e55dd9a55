from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagecache.identifiers import identifier_of, is_identifier, sha1_of

SHA1 = "1104f3e30c030f8b93f220b04131032dddf51f21"
IDENTIFIER = "BEE8-MMAw-Lk_IgsEExAy3d9R8h"


def test_as_the_marketplace_writes_it() -> None:
    assert identifier_of(SHA1) == IDENTIFIER
    assert sha1_of(IDENTIFIER) == SHA1
    assert identifier_of(SHA1.upper()) == IDENTIFIER
    assert base64.urlsafe_b64encode(bytes.fromhex(SHA1)).decode()[:27] != IDENTIFIER


def test_the_ends_of_the_range() -> None:
    assert identifier_of("0" * 40) == "A" * 27
    assert identifier_of("f" * 40) == "P" + "_" * 26
    assert sha1_of("P" + "_" * 26) == "f" * 40


@given(st.binary(min_size=20, max_size=20))
def test_there_and_back(digest: bytes) -> None:
    identifier = identifier_of(digest.hex())
    assert is_identifier(identifier)
    assert sha1_of(identifier) == digest.hex()


@pytest.mark.parametrize(
    "text", ["", "A" * 26, "A" * 28, "Q" + "A" * 26, "A" * 26 + "+", "A" * 26 + "\n", "A" * 26 + "é", IDENTIFIER + " "]
)
def test_what_is_none(text: str) -> None:
    assert not is_identifier(text)
    with pytest.raises(ValueError, match="no identifier"):
        sha1_of(text)


@pytest.mark.parametrize("text", ["", SHA1[:-1], SHA1 + "0", "0x" + SHA1[2:], "g" * 40, " " + SHA1[1:]])
def test_what_is_no_sha1(text: str) -> None:
    with pytest.raises(ValueError, match="no SHA-1"):
        identifier_of(text)

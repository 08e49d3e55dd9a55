"""Secrets at rest: the key ring, passwords, tokens, and the files they lie in."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import keys
from app.keys import ChapSecrets, KeyFileError, KeyRing, Signer, read_private, write_private


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secrets.json"


def test_what_was_sealed_opens_for_its_attachment_alone(path: Path) -> None:
    ring, mine, other = KeyRing.create(path), uuid4(), uuid4()
    key_id, sealed = ring.seal(mine, ChapSecrets("open sesame", "and back"))
    assert ring.open(mine, key_id, sealed) == ChapSecrets("open sesame", "and back")
    assert b"sesame" not in sealed
    with pytest.raises(KeyFileError, match=str(other)):
        ring.open(other, key_id, sealed)


def test_no_two_sealings_are_alike(path: Path) -> None:
    ring, attachment = KeyRing.create(path), uuid4()
    assert len({ring.seal(attachment, ChapSecrets("same"))[1] for _ in range(100)}) == 100


@settings(max_examples=60)
@given(data=st.data())
def test_no_flipped_bit_opens(data: st.DataObject) -> None:
    ring, attachment = KeyRing(Path("unused"), "k", {"k": bytes(32)}), uuid4()
    key_id, sealed = ring.seal(attachment, ChapSecrets("open sesame"))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    changed = bytearray(sealed)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(KeyFileError):
        ring.open(attachment, key_id, bytes(changed))


def test_a_rotated_ring_seals_with_the_new_key_and_opens_with_the_old(path: Path) -> None:
    ring, attachment = KeyRing.create(path), uuid4()
    before, old = ring.seal(attachment, ChapSecrets("old"))
    assert ring.rotate() != before
    loaded = KeyRing.load(path)
    after, new = loaded.seal(attachment, ChapSecrets("new"))
    assert after == loaded.current != before
    assert loaded.open(attachment, before, old) == ChapSecrets("old")
    assert loaded.open(attachment, after, new) == ChapSecrets("new")
    assert ring.open(attachment, after, new) == ChapSecrets("new")


def test_a_key_that_is_gone_is_named(path: Path) -> None:
    ring = KeyRing.create(path)
    with pytest.raises(KeyFileError, match=r"0badf00d.*backup"):
        ring.open(uuid4(), "0badf00d", b"x" * 40)


def test_keys_have_256_bits_and_their_file_is_private(path: Path) -> None:
    ring = KeyRing.create(path)
    document = json.loads(path.read_text())
    assert len(base64.b64decode(document["keys"][ring.current])) == 32
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o610, 0o601])
def test_a_key_file_that_others_can_read_is_refused(path: Path, mode: int) -> None:
    KeyRing.create(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        KeyRing.load(path)
    signing = path.with_name("events.key")
    Signer.load_or_create(signing)
    signing.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        Signer.load_or_create(signing)


def test_a_missing_key_file_is_named(path: Path) -> None:
    with pytest.raises(KeyFileError, match=f"{path}: No such file"):
        KeyRing.load(path)


def test_a_private_file_is_private_whatever_the_umask_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "token"
    before = os.umask(0)
    try:
        write_private(path, "one")
        write_private(path, "two")
    finally:
        os.umask(before)
    assert read_private(path) == "two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_secrets_do_not_show_in_a_representation() -> None:
    assert "sesame" not in repr(ChapSecrets("sesame", "sesame"))
    assert "sesame" not in f"{ChapSecrets('sesame', 'sesame')}"


def test_a_signer_is_the_same_after_a_restart_and_tells_its_public_key(tmp_path: Path) -> None:
    first = Signer.load_or_create(tmp_path / "events.key")
    second = Signer.load_or_create(tmp_path / "events.key")
    assert first.public == second.public == (tmp_path / "events.pub").read_text().strip()
    assert first.sign(b"head") == second.sign(b"head")


def test_passwords_are_kept_as_argon2_and_nothing_else_matches() -> None:
    stored = keys.hash_password("correct horse battery")
    assert stored.startswith("$argon2id$")
    assert "m=19456,t=2,p=1" in stored
    assert keys.password_matches(stored, "correct horse battery")
    assert not keys.password_matches(stored, "correct horse batterx")
    assert not keys.password_matches(stored, "")
    assert not keys.password_matches(None, "anything")
    assert not keys.password_matches("not a hash", "anything")
    assert keys.hash_password("same") != keys.hash_password("same")


def test_tokens_are_256_bits_and_only_their_digest_is_needed() -> None:
    made = {keys.new_token() for _ in range(100)}
    assert len(made) == 100
    for token in made:
        assert re.fullmatch(r"stratus_[A-Za-z0-9_-]{43}", token)
        assert re.fullmatch(r"[0-9a-f]{64}", keys.token_digest(token))
    assert len({keys.token_digest(token) for token in made}) == 100


def test_chap_secrets_are_long_enough_for_the_standard_and_plain_for_initiators() -> None:
    made = {keys.new_chap_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"[0-9a-f]{32}", secret) for secret in made)

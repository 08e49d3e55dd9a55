"""What users build and sign with our commands is what the image store reads, endorser and all."""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from imagecache import identifiers
from imagecache.errors import BadSignature
from imagecache.metadata import parse
from imagecache.signatures import Trust
from stratus import metadata
from stratus.signing import Identity, sign
from tests.stratus.test_metadata import AUTHORITY, JANE, Person, person, statement

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    path = tmp_path / "ca.pem"
    path.write_bytes(AUTHORITY.certificate_pem())
    return Trust((path,))


def signed(who: Person, about: metadata.Statement, email: str | None = None) -> bytes:
    assert isinstance(who.key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    return sign(metadata.build(about), Identity(who.key, who.certificate), email, NOW)


def test_an_entry_is_read_as_it_was_built(trust: Trust) -> None:
    about = statement(
        compression="xz", locations=("https://a.example.org/1", "https://b.example.org/2"), title="Debian & more"
    )
    (entry,) = parse(signed(JANE, about), "test", trust)
    assert entry.signed
    assert (entry.endorser, entry.subject, entry.issuer) == ("jane@example.org", "CN=Jane Tester", "CN=Test CA")
    assert (entry.identifier, entry.size, entry.checksums) == (about.identifier, about.size, about.checksums)
    assert (entry.format, entry.compression, entry.locations) == ("qcow2", "xz", about.locations)
    assert (entry.created_at, entry.valid_until) == (NOW, about.valid_until)
    assert (entry.os, entry.os_version, entry.architecture, entry.version) == ("debian", "12", "x86_64", "1.0")
    assert (entry.title, entry.deprecated) == ("Debian & more", None)


def test_a_list_of_a_marketplace_holds_our_entries(trust: Trust) -> None:
    joe = person(ec.generate_private_key(ec.SECP384R1()), "joe@example.org", issuer=AUTHORITY)
    bodies = [signed(who, statement()).partition(b"?>")[2] for who in (JANE, joe)]
    entries = parse(b"<metadata>" + b"".join(bodies) + b"</metadata>", "test", trust)
    assert [entry.endorser for entry in entries] == ["jane@example.org", "joe@example.org"]
    assert all(entry.signed for entry in entries)


def test_what_was_changed_after_signing_is_refused(trust: Trust) -> None:
    with pytest.raises(BadSignature):
        parse(signed(JANE, statement()).replace(b">debian<", b">debbie<"), "test", trust)


def test_a_certificate_without_an_address_speaks_for_its_subject(trust: Trust) -> None:
    nameless = person(rsa.generate_private_key(65537, 2048), issuer=AUTHORITY)
    (entry,) = parse(signed(nameless, statement(), "jane@example.org"), "test", trust)
    assert (entry.signed, entry.endorser, entry.subject) == (True, None, "CN=Jane Tester")


def test_both_sides_agree_on_identifiers() -> None:
    numbers = random.Random(3)
    for sha1 in ["0" * 40, "f" * 40, *(numbers.randbytes(20).hex() for _ in range(200))]:
        identifier = metadata.identifier_of(sha1)
        assert identifier == identifiers.identifier_of(sha1)
        assert identifiers.sha1_of(identifier) == sha1

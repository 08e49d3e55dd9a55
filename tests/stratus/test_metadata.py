"""Entries as this machine makes them: built, signed with keys of every kind, posted to a Marketplace."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from lxml import etree
from signxml.verifier import XMLVerifier

from stratus.metadata import DCTERMS, NAMESPACES, RDF, SLREQ, BadStatement, Statement, build, identifier_of
from tests.stratus.conftest import Run, as_typed
from tests.stratus.standin import IMAGE, Reply, StandIn, image, ranges

CONTENT = b"an image" * 16
NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class Person:
    key: Key
    certificate: x509.Certificate

    def pem(self, passphrase: bytes | None = None) -> bytes:
        locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def pkcs12(self, passphrase: bytes) -> bytes:
        assert not isinstance(self.key, ed25519.Ed25519PrivateKey)
        locked = serialization.BestAvailableEncryption(passphrase)
        return pkcs12.serialize_key_and_certificates(b"me", self.key, self.certificate, [AUTHORITY.certificate], locked)


def person(key: Key, *emails: str, issuer: Person | None = None, days: tuple[int, int] = (-1, 30)) -> Person:
    """Somebody with a certificate for these addresses, valid from and to these days from now; an authority if no one
    issued it."""
    now = dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Jane Tester" if issuer else "Test CA")])
    signer = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + dt.timedelta(days[0]))
        .not_valid_after(now + dt.timedelta(days[1]))
        .add_extension(x509.BasicConstraints(issuer is None, None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
        .add_extension(_usage(authority=issuer is None), True)
    )
    if emails:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(each) for each in emails]), False)
    return Person(key, builder.sign(signer, hashes.SHA256()))


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not authority, not authority, False, False, False, authority, authority, False, False)


def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


AUTHORITY = person(ec.generate_private_key(ec.SECP256R1()))
JANE = person(rsa_key(), "jane@example.org", issuer=AUTHORITY)


def statement(**more: Any) -> Statement:
    checksums = {name: hashlib.new(name, CONTENT).hexdigest() for name in ("sha1", "sha256", "sha512")}
    given: dict[str, Any] = {
        "size": len(CONTENT),
        "checksums": checksums,
        "format": "qcow2",
        "created_at": NOW,
        "valid_until": NOW + dt.timedelta(days=180),
        "os": "debian",
        "os_version": "12",
        "os_arch": "x86_64",
        "version": "1.0",
        **more,
    }
    return Statement(**given)


def texts(document: bytes, path: str) -> list[str | None]:
    return [element.text for element in etree.fromstring(document).findall(f".//{path}", NAMESPACES)]


# ---------------------------------------------------------------- the identifier and the entry


@pytest.mark.parametrize(
    ("sha1", "identifier"),
    [
        ("1104f3e30c030f8b93f220b04131032dddf51f21", "BEE8-MMAw-Lk_IgsEExAy3d9R8h"),
        ("0" * 40, "A" * 27),
        ("0" * 39 + "1", "A" * 26 + "B"),
        ("f" * 40, "P" + "_" * 26),
    ],
)
def test_the_identifier_is_the_number_in_base_64(sha1: str, identifier: str) -> None:
    assert identifier_of(sha1) == identifier


@pytest.mark.parametrize("bad", ["", "f" * 39, "F" * 40, "g" * 40, "f" * 41])
def test_what_is_no_sha1_has_no_identifier(bad: str) -> None:
    with pytest.raises(BadStatement):
        identifier_of(bad)


def test_an_entry_says_what_a_marketplace_wants_to_know() -> None:
    about = statement(locations=("http://a.example.org/1", "http://b.example.org/2"), title="<Debian> & co")
    document = build(about)
    root = etree.fromstring(document)
    assert root.tag == f"{{{RDF}}}RDF"
    (entry,) = root
    assert entry.get(f"{{{RDF}}}about") == f"#{about.identifier}"
    assert texts(document, "dcterms:identifier") == [identifier_of(hashlib.sha1(CONTENT).hexdigest())]
    assert texts(document, "slreq:bytes") == ["128"]
    assert texts(document, "slreq:algorithm") == ["SHA-1", "SHA-256", "SHA-512"]
    assert texts(document, "slreq:value") == list(about.checksums.values())
    assert texts(document, "slterms:location") == list(about.locations)
    assert texts(document, "dcterms:title") == ["<Debian> & co"]
    assert texts(document, "dcterms:created") == ["2026-01-02T03:04:05Z"]
    assert texts(document, "dcterms:valid") == ["2026-07-01T03:04:05Z"]
    assert texts(document, "dcterms:compression") == [None]


def test_what_xml_cannot_hold_is_refused() -> None:
    with pytest.raises(BadStatement, match=r"U\+0007"):
        build(statement(description="bell\a"))


def test_building_from_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.raw.gz"
    path.write_bytes(CONTENT)
    out = tmp_path / "entry.xml"
    options = ["--os", "debian", "--location", "http://a.example.org/1", "-o", str(out), "--format", "json"]
    result = run("build-metadata", str(path), *options)
    assert result.exit_code == 0, result.stderr
    document = out.read_bytes()
    assert texts(document, "slreq:value") == list(statement().checksums.values())
    assert texts(document, "dcterms:format") == ["raw"]
    assert texts(document, "dcterms:compression") == ["gz"]
    assert json.loads(result.stdout)["identifier"] == statement().identifier


def test_building_from_an_image_reads_it_once(service: StandIn, run: Run) -> None:
    service.on("GET", f"/v1/images/{IMAGE}", Reply(document=image(CONTENT)))
    service.on("GET", f"/v1/images/{IMAGE}/content", ranges(CONTENT))
    result = run("build-metadata", IMAGE)
    assert result.exit_code == 0, result.stderr
    document = result.stdout_bytes
    assert texts(document, "slreq:value") == list(statement().checksums.values())
    assert texts(document, "slterms:os") == ["debian"]
    assert texts(document, "dcterms:title") == ["Debian 12"]
    assert "no place to download" in result.stderr
    assert len(service.asked("GET", f"/v1/images/{IMAGE}/content")) == 1


def test_an_image_that_came_out_wrong_is_not_described(service: StandIn, run: Run) -> None:
    service.on("GET", f"/v1/images/{IMAGE}", Reply(document=image(CONTENT)))
    wrong = ranges(CONTENT[::-1], validator=hashlib.sha256(CONTENT).hexdigest())
    service.on("GET", f"/v1/images/{IMAGE}/content", wrong)
    result = run("build-metadata", IMAGE)
    assert result.exit_code == 1
    assert result.stdout == ""


def test_an_image_of_the_service_is_qcow2(run: Run) -> None:
    assert run("build-metadata", IMAGE, "--image-format", "raw").exit_code == 2


# ---------------------------------------------------------------- signing


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = tmp_path / "entry.xml"
    path.write_bytes(build(statement()))
    return path


def private(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    path.chmod(0o600)
    return str(path)


def pem_options(who: Person, directory: Path, passphrase: bytes | None = None) -> list[str]:
    key = private(directory / "key.pem", who.pem(passphrase))
    certificate = private(directory / "cert.pem", who.certificate_pem())
    return ["--key", key, "--certificate", certificate]


def verified(document: bytes) -> etree._Element:
    """What the signature covers, its certificate leading to our authority."""
    authority = AUTHORITY.certificate_pem().decode()
    root = etree.fromstring(document)
    chain = root.findall(".//{http://www.w3.org/2000/09/xmldsig#}X509Certificate")
    assert chain
    certificate = x509.load_der_x509_certificate(_decoded(chain[0].text))
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
    found = XMLVerifier().verify(document, x509_cert=certificate)
    assert not isinstance(found, list)
    return found.signed_xml


def _decoded(text: str) -> bytes:
    import base64

    return base64.b64decode(text)


KEYS: dict[str, Any] = {
    "rsa-sha256": rsa_key,
    "ecdsa-sha256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-sha384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ecdsa-sha512": lambda: ec.generate_private_key(ec.SECP521R1()),
}


@pytest.mark.parametrize("method", KEYS)
def test_a_signed_entry_is_verified(run: Run, entry: Path, tmp_path: Path, method: str) -> None:
    who = person(KEYS[method](), "jane@example.org", issuer=AUTHORITY)
    signed = tmp_path / "signed.xml"
    result = run("sign-metadata", str(entry), "-o", str(signed), *pem_options(who, tmp_path))
    assert result.exit_code == 0, result.stderr
    document = signed.read_bytes()
    covered = etree.tostring(verified(document))
    assert texts(covered, "slreq:email") == ["jane@example.org"]
    assert texts(covered, "slreq:subject") == ["CN=Jane Tester"]
    assert texts(covered, "slreq:issuer") == ["CN=Test CA"]
    assert texts(covered, "slreq:bytes") == ["128"]
    assert f"#{method}".encode() in document


def test_a_change_after_signing_shows(run: Run, entry: Path, tmp_path: Path) -> None:
    result = run("sign-metadata", str(entry), *pem_options(JANE, tmp_path))
    verified(result.stdout_bytes)
    with pytest.raises(Exception, match="Digest mismatch"):
        verified(result.stdout_bytes.replace(b">128<", b">129<"))


def test_a_signature_holds_in_a_list_of_entries(run: Run, entry: Path, tmp_path: Path) -> None:
    document = run("sign-metadata", str(entry), *pem_options(JANE, tmp_path)).stdout_bytes
    body = document.partition(b"?>")[2]
    listed = etree.fromstring(b'<metadata xmlns="urn:other" xmlns:x="urn:x">' + body + b"</metadata>")
    verified(etree.tostring(listed[0], with_tail=False))


def test_another_endorsement_takes_the_place_of_the_first(run: Run, entry: Path, tmp_path: Path) -> None:
    joe = person(rsa_key(), "joe@example.org", issuer=AUTHORITY)
    once = tmp_path / "once.xml"
    run("sign-metadata", str(entry), "-o", str(once), *pem_options(JANE, tmp_path))
    twice = run("sign-metadata", str(once), *pem_options(joe, tmp_path)).stdout_bytes
    assert texts(etree.tostring(verified(twice)), "slreq:email") == ["joe@example.org"]
    assert len(etree.fromstring(twice).findall("{http://www.w3.org/2000/09/xmldsig#}Signature")) == 1


def test_a_pkcs12_file_and_its_passphrase(run: Run, entry: Path, tmp_path: Path) -> None:
    bundle = private(tmp_path / "me.p12", JANE.pkcs12(b"open sesame"))
    secret = private(tmp_path / "secret", b"open sesame\n")
    result = run("sign-metadata", str(entry), "--pkcs12", bundle, "--passphrase-file", secret)
    assert result.exit_code == 0, result.stderr
    assert texts(etree.tostring(verified(result.stdout_bytes)), "slreq:email") == ["jane@example.org"]
    wrong = private(tmp_path / "wrong", b"open pistachio\n")
    refused = run("sign-metadata", str(entry), "--pkcs12", bundle, "--passphrase-file", wrong)
    assert refused.exit_code == 1
    assert "cannot be read" in refused.stderr
    assert refused.stdout == ""


def test_an_encrypted_key_needs_its_passphrase(run: Run, entry: Path, tmp_path: Path) -> None:
    options = pem_options(JANE, tmp_path, b"open sesame")
    secret = private(tmp_path / "secret", b"open sesame\n")
    assert run("sign-metadata", str(entry), *options, "--passphrase-file", secret).exit_code == 0
    unattended = run("sign-metadata", str(entry), *options)
    assert unattended.exit_code == 2
    assert "--passphrase-file" in unattended.stderr


def test_a_passphrase_is_asked_for_on_a_terminal(environment: dict[str, str], entry: Path, tmp_path: Path) -> None:
    options = pem_options(JANE, tmp_path, b"open sesame")
    ours, theirs = pty.openpty()
    command = [*as_typed("sign-metadata"), str(entry), *options]
    with subprocess.Popen(
        command, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        os.close(theirs)
        assert process.stderr is not None
        said = process.stderr.read(len(b"Passphrase of "))  # what is typed before it is thrown away
        os.write(ours, b"open sesame\n")
        signed, more = process.communicate()
    os.close(ours)
    assert process.returncode == 0, more
    assert said == b"Passphrase of "
    assert b"sesame" not in signed + more
    verified(signed)


@pytest.mark.parametrize(
    ("who", "options", "said"),
    [
        (lambda: person(rsa_key(), issuer=AUTHORITY), [], "0 e-mail addresses"),
        (lambda: person(rsa_key(), "a@x.org", "b@x.org", issuer=AUTHORITY), [], "2 e-mail addresses"),
        (lambda: JANE, ["--email", "joe@example.org"], "not in the certificate"),
        (lambda: person(rsa_key(), "a@x.org", issuer=AUTHORITY, days=(-9, -1)), [], "not now"),
        (lambda: person(rsa_key(), "a@x.org", issuer=AUTHORITY, days=(1, 9)), [], "not now"),
        (lambda: person(rsa_key(1024), "a@x.org", issuer=AUTHORITY), [], "too weak"),
        (lambda: person(ed25519.Ed25519PrivateKey.generate(), "a@x.org", issuer=AUTHORITY), [], "RSA or ECDSA"),
        (lambda: person(ec.generate_private_key(ec.SECP256K1()), "a@x.org", issuer=AUTHORITY), [], "secp256k1"),
        (lambda: Person(rsa_key(), JANE.certificate), [], "not that of the key"),
    ],
)
def test_a_key_that_cannot_endorse(
    run: Run, entry: Path, tmp_path: Path, who: Any, options: list[str], said: str
) -> None:
    result = run("sign-metadata", str(entry), *pem_options(who(), tmp_path), *options)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stdout == ""


def test_an_address_can_be_chosen(run: Run, entry: Path, tmp_path: Path) -> None:
    two = person(rsa_key(), "a@x.org", "b@x.org", issuer=AUTHORITY)
    document = run("sign-metadata", str(entry), *pem_options(two, tmp_path), "--email", "b@x.org").stdout_bytes
    assert texts(document, "slreq:email") == ["b@x.org"]
    nameless = person(rsa_key(), issuer=AUTHORITY)
    document = run("sign-metadata", str(entry), *pem_options(nameless, tmp_path), "--email", "c@x.org").stdout_bytes
    assert texts(document, "slreq:email") == ["c@x.org"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no xml", "no XML"),
        (b"<other/>", "no entry"),
        (b'<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/hostname">]><r>&x;</r>', "DOCTYPE"),
        (b'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>', "no entry"),
    ],
)
def test_what_is_no_entry_is_not_signed(run: Run, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "entry.xml"
    path.write_bytes(content)
    result = run("sign-metadata", str(path), *pem_options(JANE, tmp_path))
    assert result.exit_code == 1
    assert said in result.stderr


def test_a_key_that_others_can_read_is_refused(run: Run, entry: Path, tmp_path: Path) -> None:
    options = pem_options(JANE, tmp_path)
    (tmp_path / "key.pem").chmod(0o644)
    result = run("sign-metadata", str(entry), *options)
    assert result.exit_code == 2
    assert "chmod 600" in result.stderr


def test_signing_needs_a_key(run: Run, entry: Path, tmp_path: Path) -> None:
    assert "with which key?" in run("sign-metadata", str(entry)).stderr
    both = [*pem_options(JANE, tmp_path), "--pkcs12", private(tmp_path / "me.p12", JANE.pkcs12(b"x"))]
    assert run("sign-metadata", str(entry), *both).exit_code == 2


def test_without_the_extra_it_says_what_to_install(environment: dict[str, str], entry: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['lxml'] = None\n"
        "from stratus.commands.sign_metadata import main; main(prog_name='stratus-sign-metadata')"
    )
    command = [sys.executable, "-c", code, str(entry), *pem_options(JANE, tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'stratus-storage[metadata]'" in done.stderr


# ---------------------------------------------------------------- a Marketplace


@pytest.fixture
def signed(run: Run, entry: Path, tmp_path: Path) -> Path:
    path = tmp_path / "signed.xml"
    run("sign-metadata", str(entry), "-o", str(path), *pem_options(JANE, tmp_path))
    return path


def test_an_entry_is_posted_without_our_token(service: StandIn, run: Run, signed: Path) -> None:
    service.on("POST", "/mp/metadata/", Reply(201, "<p>thank you</p>", {"Location": "http://mp/metadata/x"}))
    result = run("upload-metadata", str(signed), "--marketplace", f"{service.url}/mp/", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"status": 201, "location": "http://mp/metadata/x", "said": "thank you"}
    (request,) = service.requests
    assert request.body == signed.read_bytes()
    assert "Authorization" not in request.headers


def test_where_an_entry_is_follows_from_what_it_says(service: StandIn, run: Run, signed: Path) -> None:
    service.on("POST", "/metadata/", Reply(202, "an e-mail was sent"))
    result = run("upload-metadata", str(signed), "--format", "json", STRATUS_MARKETPLACE=f"{service.url}/metadata")
    assert result.exit_code == 0, result.stderr
    document = signed.read_bytes()
    created = texts(document, "slreq:endorsement/dcterms:created")[0]
    place = f"{service.url}/metadata/{statement().identifier}/jane@example.org/{created}"
    assert json.loads(result.stdout)["location"] == place


def test_a_refusal_of_the_marketplace_is_told(service: StandIn, run: Run, signed: Path) -> None:
    service.on("POST", "/metadata/", Reply(400, "<h1>invalid\x1b[31m signature</h1>"))
    result = run("upload-metadata", str(signed), "--marketplace", service.url)
    assert result.exit_code == 1
    assert r"status 400: invalid\u001b[31m signature" in result.stderr


def test_a_redirect_of_the_marketplace_is_not_followed(service: StandIn, run: Run, signed: Path) -> None:
    service.on("POST", "/metadata/", Reply(302, "", {"Location": "/elsewhere"}))
    assert run("upload-metadata", str(signed), "--marketplace", service.url).exit_code == 1
    assert len(service.requests) == 1


def test_no_marketplace(run: Run, signed: Path) -> None:
    unknown = run("upload-metadata", str(signed))
    assert unknown.exit_code == 2
    assert "to which Marketplace?" in unknown.stderr
    assert run("upload-metadata", str(signed), "--marketplace", "ftp://x").exit_code == 2
    assert run("upload-metadata", str(signed), "--marketplace", "http://127.0.0.1:1").exit_code == 7


def test_an_unsigned_entry_is_not_posted(service: StandIn, run: Run, entry: Path) -> None:
    service.on("POST", "/metadata/", Reply(201))
    result = run("upload-metadata", str(entry), "--marketplace", service.url)
    assert result.exit_code == 1
    assert "stratus-sign-metadata" in result.stderr
    assert service.requests == []


def test_endorsement_names_are_those_of_the_vocabulary() -> None:
    document = build(statement())
    place = etree.fromstring(document).find(f".//{{{SLREQ}}}endorsement")
    assert place is not None
    assert place.get(f"{{{RDF}}}parseType") == "Resource"
    assert DCTERMS in NAMESPACES.values()

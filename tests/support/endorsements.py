"""Endorsers of the tests: a CA, certificates, entries about images, and signatures under them."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from lxml import etree
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.signer import XMLSigner

from imagecache.identifiers import identifier_of

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
NAMESPACES = (
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dcterms="http://purl.org/dc/terms/" '
    'xmlns:slreq="http://mp.stratuslab.eu/slreq#" xmlns:slterms="http://mp.stratuslab.eu/slterms#"'
)


@dataclass(frozen=True)
class Endorser:
    email: str
    key: rsa.RSAPrivateKey
    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...]

    @property
    def subject(self) -> str:
        return self.certificate.subject.rfc4514_string()

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Key and certificate as PEM files."""
        key, certificate = directory / "endorser.key", directory / "endorser.pem"
        key.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        certificate.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return key, certificate


class Authority:
    """A CA: a root, or below another. Keys are made once for a process: they take long."""

    def __init__(
        self, name: str = "Test CA", above: Authority | None = None, *, is_ca: bool = True, may_sign: bool | None = None
    ) -> None:
        self.key = _key(name)
        issuer = above or self
        self.name = name
        self.certificate = _certificate(name, self.key, issuer.name, issuer.key, is_ca=is_ca, may_sign=may_sign)
        self.chain: tuple[x509.Certificate, ...] = (self.certificate, *above.chain) if above else ()

    def write(self, path: Path) -> Path:
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return path

    def issue(
        self,
        email: str = "jane.tester@example.org",
        *,
        name: str = "Jane Tester",
        in_certificate: bool = True,
        days: tuple[int, int] = (-1, 30),
        may_sign: bool | None = None,
    ) -> Endorser:
        """An endorser whose certificate is valid from and to `days` from now, and says what it may be used for."""
        key = _key(name)
        address = email if in_certificate else None
        certificate = _certificate(name, key, self.name, self.key, address, days, may_sign=may_sign)
        return Endorser(email, key, certificate, (certificate, *self.chain))


@cache
def _key(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "StratusLab"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _certificate(
    name: str,
    key: rsa.RSAPrivateKey,
    issuer: str,
    issuer_key: rsa.RSAPrivateKey,
    email: str | None = None,
    days: tuple[int, int] = (-3650, 3650),
    is_ca: bool = False,
    may_sign: bool | None = None,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + dt.timedelta(days[0]))
        .not_valid_after(NOW + dt.timedelta(days[1]))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
    )
    if email is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(email)]), critical=False)
    if may_sign is not None:
        builder = builder.add_extension(_usage(may_sign, is_ca), critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _usage(may_sign: bool, is_ca: bool) -> x509.KeyUsage:
    """For signatures (of certificates, if it is a CA), or for keys only."""
    return x509.KeyUsage(
        digital_signature=may_sign,
        key_cert_sign=may_sign and is_ca,
        key_encipherment=True,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def entry(
    image: bytes,
    *,
    endorser: str = "jane.tester@example.org",
    subject: str = "CN=Jane Tester,O=StratusLab",
    locations: Sequence[str] = (),
    algorithms: Sequence[str] = ("sha1", "sha256", "sha512"),
    format: str = "qcow2",
    compression: str = "",
    created: dt.datetime = NOW,
    valid: dt.datetime | None = None,
    deprecated: str | None = None,
    more: str = "",
) -> bytes:
    """An entry about an image with these bytes, as `stratus-build-metadata` and the Marketplace write it, unsigned."""
    identifier = identifier_of(hashlib.sha1(image).hexdigest())
    checksums = "".join(
        f'<slreq:checksum rdf:parseType="Resource"><slreq:algorithm>{name[:3].upper()}-{name[3:]}</slreq:algorithm>'
        f"<slreq:value>{hashlib.new(name, image).hexdigest()}</slreq:value></slreq:checksum>"
        for name in algorithms
    )
    return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<rdf:RDF {NAMESPACES} xml:base="http://mp.stratuslab.eu/"><rdf:Description rdf:about="#{identifier}">
  <dcterms:identifier>{identifier}</dcterms:identifier><slreq:bytes>{len(image)}</slreq:bytes>{checksums}
  <slreq:endorsement rdf:parseType="Resource"><dcterms:created>{_text(created)}</dcterms:created>
    <slreq:endorser rdf:parseType="Resource"><slreq:email>{escape(endorser)}</slreq:email>
    <slreq:subject>{escape(subject)}</slreq:subject><slreq:issuer>CN=Test CA,O=StratusLab</slreq:issuer>
    </slreq:endorser>
  </slreq:endorsement>
  <dcterms:format>{format}</dcterms:format><dcterms:compression>{compression}</dcterms:compression>
  <dcterms:created>{_text(created)}</dcterms:created>
  <dcterms:valid>{_text(valid or NOW + dt.timedelta(30))}</dcterms:valid>
  <slterms:os>Debian</slterms:os><slterms:os-version>12</slterms:os-version><slterms:os-arch>x86_64</slterms:os-arch>
  {"".join(f"<slterms:location>{escape(url)}</slterms:location>" for url in locations)}
  {"" if deprecated is None else f"<slterms:deprecated>{escape(deprecated)}</slterms:deprecated>"}{more}
</rdf:Description></rdf:RDF>""".encode()


def _text(moment: dt.datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


class _Sha1Signer(XMLSigner):
    def check_deprecated_methods(self) -> None:
        """As endorsers did it years ago."""


def sign(document: bytes, endorser: Endorser, *, sha1: bool = False) -> bytes:
    """The document with the endorser's enveloped signature."""
    signer = (
        _Sha1Signer(signature_algorithm=SignatureMethod.RSA_SHA1, digest_algorithm=DigestAlgorithm.SHA1)
        if sha1
        else XMLSigner(signature_algorithm=SignatureMethod.RSA_SHA256, digest_algorithm=DigestAlgorithm.SHA256)
    )
    signed = signer.sign(etree.fromstring(document), key=endorser.key, cert=list(endorser.chain))
    written: bytes = etree.tostring(signed, xml_declaration=True, encoding="UTF-8")
    return written

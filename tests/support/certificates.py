"""Certificates for TLS servers of the tests, under a CA made for them."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

NOW = dt.datetime.now(dt.UTC)


def server_certificate(directory: Path, host: str, address: str) -> tuple[Path, Path]:
    """Files for `host` and `address`: the CA's certificate, and the server's with its key."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Mirrors")])
    authority = _builder(ca_name, ca_name, ca_key, is_ca=True).sign(ca_key, hashes.SHA256())
    names = x509.SubjectAlternativeName([x509.DNSName(host), x509.IPAddress(ipaddress.ip_address(address))])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    server = _builder(subject, ca_name, key).add_extension(names, critical=False).sign(ca_key, hashes.SHA256())
    (directory / "ca.pem").write_bytes(authority.public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "server.pem").write_bytes(server.public_bytes(Encoding.PEM) + private)
    return directory / "ca.pem", directory / "server.pem"


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, is_ca: bool = False
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - dt.timedelta(1))
        .not_valid_after(NOW + dt.timedelta(30))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
    )

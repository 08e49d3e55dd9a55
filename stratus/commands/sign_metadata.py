"""stratus-sign-metadata"""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path

import click

from stratus.cli import Session, command
from stratus.config import read_private, read_secret
from stratus.errors import ConfigError, file_errors
from stratus.signing import Identity, from_pem, from_pkcs12, sign

EXAMPLES = """
  With the certificate of your browser, exported as PKCS#12; the passphrase is asked for:
    stratus-sign-metadata entry.xml -o signed.xml --pkcs12 me.p12
  With a key and a certificate, in a script:
    stratus-sign-metadata entry.xml -o signed.xml --key key.pem --certificate cert.pem --passphrase-file secret
"""

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@command(EXAMPLES)
@click.argument("entry", type=_FILE, metavar="FILE")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the signed entry here.")
@click.option("--pkcs12", type=_FILE, help="Your key and certificate in one file (.p12, .pfx).")
@click.option("--key", type=_FILE, help="Your private key (PEM): RSA or ECDSA.")
@click.option("--certificate", type=_FILE, help="Its certificate (PEM), intermediate ones after it.")
@click.option("--passphrase-file", type=_FILE, help="It holds the passphrase.  [default: ask]")
@click.option("--email", metavar="ADDRESS", help="The endorser, if the certificate has not one address.")
def main(
    session: Session,
    entry: Path,
    output: Path | None,
    pkcs12: Path | None,
    key: Path | None,
    certificate: Path | None,
    passphrase_file: Path | None,
    email: str | None,
) -> None:
    """Endorse an image: sign its entry with your key. An endorsement the entry has gives way to yours.

    Sites that trust your certificate's authority, and you, will let the image in. The signed entry goes to stdout, or
    to -o FILE. Needs pip install 'stratus-storage[metadata]'.
    """
    with file_errors(entry, "read"):
        document = entry.read_bytes()
    identity = _identity(pkcs12, key, certificate, passphrase_file)
    signed = sign(document, identity, email, dt.datetime.now(dt.UTC))
    if output is None:
        sys.stdout.buffer.write(signed)
        return
    with file_errors(output, "write"):
        output.write_bytes(signed)
    session.output.say(f"signed, in {output}")


def _identity(pkcs12: Path | None, key: Path | None, certificate: Path | None, passphrase: Path | None) -> Identity:
    def ask() -> bytes:
        return _passphrase(pkcs12 or key, passphrase)

    if pkcs12 and not (key or certificate):
        return from_pkcs12(read_private(pkcs12), ask)
    if key and certificate and not pkcs12:
        with file_errors(certificate, "read"):
            return from_pem(read_private(key), certificate.read_bytes(), ask)
    raise click.UsageError("with which key? Give --pkcs12 FILE, or --key FILE and --certificate FILE")


def _passphrase(of: Path | None, file: Path | None) -> bytes:
    if file:
        return read_secret(file).encode()
    if not sys.stdin.isatty():
        raise ConfigError(f"{of} is encrypted", "give --passphrase-file FILE")
    return str(click.prompt(f"Passphrase of {of}", hide_input=True, err=True, default="", show_default=False)).encode()

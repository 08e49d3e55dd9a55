"""stratus-build-metadata"""

from __future__ import annotations

import datetime as dt
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click

from stratus.arguments import UUID
from stratus.cli import Session, command
from stratus.commands.upload_image import COMPRESSIONS, FORMATS, told_format
from stratus.errors import Corrupt, Document, StratusError, file_errors
from stratus.metadata import ALGORITHMS, BadStatement, Statement, build, measure
from stratus.progress import transfer_of
from stratus.puller import Digests, digest_of, receive
from stratus.views import STATEMENT

EXAMPLES = """
  Of a file that you will publish; then sign and post it:
    stratus-build-metadata debian-12.qcow2 -o entry.xml --os debian --os-version 12 --image-version 1.0 \\
      --location https://images.example.org/debian-12.qcow2
    stratus-sign-metadata entry.xml -o signed.xml --pkcs12 me.p12
    stratus-upload-metadata signed.xml --marketplace https://marketplace.example.org
  Of an image of the service, to be downloaded and published as it is:
    stratus-build-metadata 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --os debian --os-version 12 --image-version 1.0
"""


class Subject(NamedTuple):
    """What is described: its bytes, what they are, and what is known of them already."""

    size: int
    checksums: Mapping[str, str]
    format: str
    compression: str | None
    known: Document


@command(EXAMPLES)
@click.argument("subject", metavar="FILE|IMAGE-ID")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the entry to this file.")
@click.option("--os", "system", help="The operating system: debian, ubuntu …  [default: the image's]")
@click.option("--os-version", default="", help="Its version: 12, 24.04 …")
@click.option("--os-arch", default=platform.machine(), help="What it runs on.  [default: as here]")
@click.option("--image-version", default="1.0", help="The version of the image itself.  [default: 1.0]")
@click.option("--title", help="A line for people.  [default: the image's]")
@click.option("--description", default="", help="More for people.")
@click.option("--creator", default="", help="Who made it.")
@click.option("--publisher", default="", help="On whose behalf.")
@click.option("--location", "locations", multiple=True, metavar="URL", help="Where to download it; may be repeated.")
@click.option("--valid", default=180, type=click.IntRange(1, 3650), metavar="DAYS", help="How long this holds.  [180]")
@click.option("--image-format", type=click.Choice(FORMATS), help="What FILE is.  [default: as it ends]")
@click.option("--compression", type=click.Choice([*COMPRESSIONS, "none"]), help="[default: as FILE ends]")
def main(
    session: Session,
    subject: str,
    output: Path | None,
    system: str | None,
    os_version: str,
    os_arch: str,
    image_version: str,
    title: str | None,
    description: str,
    creator: str,
    publisher: str,
    locations: tuple[str, ...],
    valid: int,
    image_format: str | None,
    compression: str | None,
) -> None:
    """Describe an image for a Marketplace: size, digests, format, what is in it, how long that holds.

    The digests are of the bytes that others download: a compressed file is described as it is. The entry goes to
    stdout, or to -o FILE. Nobody believes it until it is signed: stratus-sign-metadata.
    """
    if UUID.fullmatch(subject):
        if image_format or compression:
            raise click.UsageError("an image of the service is qcow2, not compressed")
        found = _of_image(session, subject)
    else:
        found = _of_file(session, Path(subject), image_format, compression)
    created_at = dt.datetime.now(dt.UTC)
    statement = Statement(
        size=found.size,
        checksums=found.checksums,
        format=found.format,
        compression=found.compression,
        created_at=created_at,
        valid_until=created_at + dt.timedelta(days=valid),
        os=system or found.known.get("os") or "unknown",
        os_version=os_version,
        os_arch=os_arch,
        version=image_version,
        title=title or found.known.get("title") or "",
        description=description,
        creator=creator,
        publisher=publisher,
        locations=locations,
    )
    _deliver(session, statement, output)


def _of_file(session: Session, path: Path, format: str | None, compression: str | None) -> Subject:
    told = told_format(path, format, compression)
    with file_errors(path, "read"), transfer_of(session.output, "reading") as progress:
        size, checksums = measure(path, progress)
    return Subject(size, checksums, told["format"], told.get("compression"), {})


def _of_image(session: Session, image: str) -> Subject:
    """The service knows only the SHA-256 of its file: it is read once, from there."""
    record = session.client.get(f"/v1/images/{image}")
    came = Digests(*ALGORITHMS)
    with transfer_of(session.output, "reading") as progress:
        receive(session.client, record, came, progress)
    if came.digests["sha256"] != digest_of(record):
        raise Corrupt(f"what came of image {image} is not it: its SHA-256 is {came.digests['sha256']}")
    return Subject(came.position, came.digests, "qcow2", None, record)


def _deliver(session: Session, statement: Statement, output: Path | None) -> None:
    try:
        entry = build(statement)
    except BadStatement as error:
        raise StratusError(str(error)) from error
    if not re.match(r"https?://", "".join(statement.locations[:1])):
        session.output.say("it names no place to download it from (--location URL)")
    if output is None:
        sys.stdout.buffer.write(entry)
        return
    with file_errors(output, "write"):
        output.write_bytes(entry)
    about = {"identifier": statement.identifier, "size": statement.size, **statement.checksums, "file": str(output)}
    session.output.record(STATEMENT, about)

"""stratus-upload-image"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO

import click

from stratus.arguments import IMAGE_ID, checksum_option
from stratus.cli import Session, command
from stratus.errors import Document, file_errors
from stratus.progress import transfer_of
from stratus.uploader import send
from stratus.views import IMAGE, OPERATION

FORMATS = ("raw", "qcow2")
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
_CHUNK = 1 << 20

EXAMPLES = """
  An image of your own:
    stratus-upload-image debian-12.qcow2 -t "Debian 12"
  A raw one, compressed:
    stratus-upload-image disk.img.xz --image-format raw --public
  What was cut off goes on where it was:
    stratus-upload-image debian-12.qcow2 --resume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
"""


@command(EXAMPLES, changes=True)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE")
@click.option("--image-format", type=click.Choice(FORMATS), help="What it is.  [default: as FILE ends: .raw, .qcow2]")
@click.option(
    "--compression", type=click.Choice([*COMPRESSIONS, "none"]), help="[default: as FILE ends: .gz, .bz2, .xz, .zst]"
)
@checksum_option("What FILE has; otherwise it is read and computed first.")
@click.option("-t", "--tag", help="A name for people; it need not be unique.")
@click.option("--public/--private", default=False, help="Let everyone see and use it. The default: private.")
@click.option("--resume", type=IMAGE_ID, metavar="ID", help="Go on with an upload that was cut off.")
def main(
    session: Session,
    file: Path,
    image_format: str | None,
    compression: str | None,
    checksum: str | None,
    tag: str | None,
    public: bool,
    resume: str | None,
) -> None:
    """Upload an image, raw or qcow2, compressed or not.

    The service verifies it against its checksum, inspects it, and keeps it as a qcow2 of its own: the image's digest
    is another than the file's. It must stand alone: no backing file, no internal snapshots, no encryption.
    """
    with file_errors(file, "read"), file.open("rb") as content:
        size = content.seek(0, 2)
        if not size:
            raise click.UsageError(f"{file} is empty")
        if resume is None:
            told = told_format(file, image_format, compression)
            upload = {"size": size, "checksum": checksum or _checksum(session, content, size), **told}
            image = _announce(session, upload, tag, public)
        else:
            image = resume
        if image is not None:
            _complete(session, _upload(session, image, content, size))


def told_format(file: Path, format: str | None, compression: str | None) -> Document:
    """`format` and `compression`, by the end of the file's name when not given; compression is left out if none."""
    named = [each.lstrip(".").lower() for each in file.suffixes]
    if compression is None:
        compression = named.pop() if named and named[-1] in COMPRESSIONS else "none"
    elif named and named[-1] in COMPRESSIONS:
        named.pop()
    if format is None:
        if not named or named[-1] not in FORMATS:
            raise click.UsageError(f"what is in {file.name}? Give --image-format raw or --image-format qcow2")
        format = named[-1]
    return {"format": format} | ({} if compression == "none" else {"compression": compression})


def _checksum(session: Session, content: IO[bytes], size: int) -> str:
    """Known before the upload begins: the service refuses what comes out differently."""
    sha256, done = hashlib.sha256(), 0
    content.seek(0)
    with transfer_of(session.output, "reading") as progress:
        while chunk := content.read(_CHUNK):
            sha256.update(chunk)
            done += len(chunk)
            progress(done, size)
    return f"sha256:{sha256.hexdigest()}"


def _announce(session: Session, upload: Document, tag: str | None, public: bool) -> str | None:
    """The id of an image that waits for its bytes; None if only the plan was asked for."""
    body: Document = {"upload": upload, "visibility": "public" if public else "private"}
    if tag is not None:
        body["name"] = tag
    record = session.change("POST", "/v1/images", body, done="upload begun")
    return None if record is None else str(record["id"])


def _upload(session: Session, image: str, content: IO[bytes], size: int) -> Document:
    with transfer_of(session.output, "uploading") as progress:
        return send(session.client, image, content, size, progress)


def _complete(session: Session, operation: Document) -> None:
    if not session.wait:
        session.output.record(OPERATION, operation)
        return
    record = session.client.resource(session.finish(operation))
    session.output.say("image available")
    session.output.record(IMAGE, record)

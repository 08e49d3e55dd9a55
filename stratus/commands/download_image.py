"""stratus-download-image"""

from __future__ import annotations

import os
from pathlib import Path

import click

from blockdev.files import durable_rename
from stratus.arguments import IMAGE_ID
from stratus.cli import Session, command
from stratus.errors import Conflict, file_errors
from stratus.progress import transfer_of
from stratus.puller import digest_of, download

EXAMPLES = """
  To a file; once more, after Ctrl-C or a broken line, and it goes on where it was:
    stratus-download-image 6f9619ff-8b86-4d01-b42d-00cf4fc964ff debian-12.qcow2
"""


@command(EXAMPLES)
@click.argument("image", type=IMAGE_ID, metavar="ID")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--force", is_flag=True, help="Replace FILE if there is one.")
def main(session: Session, image: str, file: Path, force: bool) -> None:
    """Download an image, as qcow2. FILE appears when all of it is there and its digest is right.

    Until then what came is in a hidden file beside it, .FILE.….part, from which another try goes on.
    """
    if file.exists() and not force:
        raise Conflict(f"there is a file {file} already", "give another name, or --force to replace it")
    record = session.client.get(f"/v1/images/{image}")
    part = file.with_name(f".{file.name}.{digest_of(record)[:16]}.part")
    with (
        file_errors(file, "write"),
        transfer_of(session.output, "downloading") as progress,
        download(session.client, record, part, progress),
    ):
        part.chmod(0o666 & ~_umask())  # a part is its owner's only
        durable_rename(part, file, replace=force)
    session.output.say(f"{file}: complete, SHA-256 {record['digest']}")


def _umask() -> int:
    """What new files of this process may not have; there is no way to ask but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

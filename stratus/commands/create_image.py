"""stratus-create-image"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import click

from stratus.arguments import SNAPSHOT_ID, VOLUME_ID, checksum_option
from stratus.cli import Session, command
from stratus.errors import Document
from stratus.views import IMAGE

EXAMPLES = """
  By its Marketplace identifier:
    stratus-create-image BEE8-MMAw-Lk_IgsEExAy3d9R8h
  By its address, with what it must be:
    stratus-create-image https://cloud.example.org/debian-12.qcow2 --checksum sha256:9f86d081884c7d659a2feaa0c55ad015…
  From a volume, as it is now:
    stratus-create-image --volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff -t "web server" --public
  Many, a reference on each line (and its checksum, if it needs one):
    stratus-create-image --preload references.txt
  A file of your own: stratus-upload-image
"""


@command(EXAMPLES, changes=True)
@click.argument("reference", required=False, metavar="[REF]")
@checksum_option("What an image named by its address must have, if nobody endorses it.")
@click.option("--volume", type=VOLUME_ID, metavar="ID", help="From this volume, which nobody may be writing to.")
@click.option("--snapshot", type=SNAPSHOT_ID, metavar="ID", help="From this snapshot.")
@click.option("-t", "--tag", help="A name for people; it need not be unique.")
@click.option("--public/--private", default=None, help="Let everyone see and use it, or only you.")
@click.option("--pin", is_flag=True, help="Keep it in the cache, used or not (admin).")
@click.option("--preload", type=click.File(), metavar="FILE", help="Fetch what this file lists; - is stdin.")
def main(
    session: Session,
    reference: str | None,
    checksum: str | None,
    volume: str | None,
    snapshot: str | None,
    tag: str | None,
    public: bool | None,
    pin: bool,
    preload: IO[str] | None,
) -> None:
    """Have an image ready: fetched, verified and kept, or made from a volume or a snapshot.

    REF is an identifier of a Marketplace (27 characters), the address of a metadata entry, or that of the image
    itself. What the site's policy refuses is not fetched: stratus-policy-image tells why. What is there already is
    answered at once.
    """
    if sum(source is not None for source in (reference, volume, snapshot, preload)) != 1:
        raise click.UsageError("what shall it be? Give one of REF, --volume, --snapshot, --preload")
    if checksum and not reference:
        raise click.UsageError("--checksum says what REF must be")
    visibility = None if public is None else "public" if public else "private"
    common = {"name": tag, "visibility": visibility}
    if preload:
        wanted = _listed(preload)
        session.each(wanted, lambda one: _create(session, {"reference": one, "checksum": wanted[one], **common}, pin))
        return
    sources = {"reference": reference, "checksum": checksum, "volume": volume, "snapshot": snapshot}
    _create(session, {**sources, **common}, pin)


def _create(session: Session, given: dict[str, str | None], pin: bool) -> None:
    body = {key: value for key, value in given.items() if value is not None}
    image: Document | None = session.change("POST", "/v1/images", body, done="image available")
    if image is None:
        return
    session.output.record(IMAGE, image)
    if pin:
        session.change("PUT", f"/v1/images/{image['id']}/pins/admin", done="pin admin set")


def _listed(file: IO[str]) -> dict[str, str | None]:
    """References, each with its checksum or None. Empty lines and what follows a # at the start of one are not."""
    found: dict[str, str | None] = {}
    for line in file:
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise click.UsageError(f"{Path(file.name).name}: a line has a reference and at most a checksum: {line!r}")
        found[words[0]] = words[1] if len(words) == 2 else None
    return found

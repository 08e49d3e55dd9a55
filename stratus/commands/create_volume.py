"""stratus-create-volume"""

from __future__ import annotations

import click

from stratus.arguments import SIZE, SNAPSHOT_ID, VOLUME_ID, checksum_option
from stratus.cli import Session, command
from stratus.views import VOLUME

EXAMPLES = """
  An empty volume of 10 GiB:
    stratus-create-volume -s 10 -t results
  One of half a GiB that everyone may read and copy:
    stratus-create-volume -s 512MiB -t reference-data --public
  A volume as a snapshot was, as large as it:
    stratus-create-volume --snapshot 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
  One that a machine can start from, of an image's size or larger:
    stratus-create-volume --image BEE8-MMAw-Lk_IgsEExAy3d9R8h
    stratus-create-volume --image https://cloud.example.org/debian-12.qcow2 --checksum sha256:9f86d0… -s 20
  Only its id, for a script:
    stratus-create-volume -s 10 --format csv -q | sed 1d | cut -d, -f1
"""


@command(EXAMPLES, changes=True)
@click.option("-s", "--size", type=SIZE, metavar="GIB", help="GiB, or with a unit: 10, 1.5, 512MiB. A copy needs none.")
@click.option("-t", "--tag", help="A name for people; it need not be unique.")
@click.option("--public/--private", default=False, help="Let everyone see, copy and read it. The default: private.")
@click.option("--pool", help="Where its bytes lie; the site's default when left out.")
@click.option("--snapshot", type=SNAPSHOT_ID, metavar="ID", help="Start as a copy of this snapshot.")
@click.option("--volume", type=VOLUME_ID, metavar="ID", help="Start as a copy of this volume.")
@click.option("--image", metavar="REF", help="Start as a copy of this image: an id or a reference.")
@checksum_option("What an image named by its address must have, if nobody endorses it.")
def main(
    session: Session,
    size: int | None,
    tag: str | None,
    public: bool,
    pool: str | None,
    snapshot: str | None,
    volume: str | None,
    image: str | None,
    checksum: str | None,
) -> None:
    """Create a volume: storage that outlives the machines it is attached to.

    It is empty, or a copy of an image, a snapshot or another volume. An image that is not here yet is fetched first;
    what names one is told in stratus-create-image --help.
    """
    copied = {"image": image, "snapshot": snapshot, "volume": volume}
    if sum(each is not None for each in copied.values()) > 1:
        raise click.UsageError("a volume is a copy of one thing: give one of --image, --snapshot, --volume, not both")
    if size is None and not any(copied.values()):
        raise click.UsageError(
            "how large? Give -s GIB, for example -s 10, or what to copy with --image, --snapshot or --volume"
        )
    if checksum and not image:
        raise click.UsageError("--checksum says what --image must be")
    given = {"name": tag, "size": size, "pool": pool, "checksum": checksum, **copied}
    body = {key: value for key, value in given.items() if value is not None}
    body["visibility"] = "public" if public else "private"
    if record := session.change("POST", "/v1/volumes", body, done="volume created"):
        session.output.record(VOLUME, record)

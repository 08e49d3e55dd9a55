"""stratus-create-volume"""

from __future__ import annotations

import click

from stratus.arguments import SIZE, SNAPSHOT_ID, VOLUME_ID
from stratus.cli import Session, command
from stratus.views import VOLUME

EXAMPLES = """
  An empty volume of 10 GiB:
    stratus-create-volume -s 10 -t results
  One of half a GiB that everyone may read and copy:
    stratus-create-volume -s 512MiB -t reference-data --public
  A volume as a snapshot was, as large as it:
    stratus-create-volume --snapshot 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
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
def main(
    session: Session,
    size: int | None,
    tag: str | None,
    public: bool,
    pool: str | None,
    snapshot: str | None,
    volume: str | None,
) -> None:
    """Create a volume: storage that outlives the machines it is attached to.

    It is empty, or a copy of a snapshot or of another volume.
    """
    if snapshot and volume:
        raise click.UsageError("a volume is a copy of one thing: give --snapshot or --volume, not both")
    if size is None and not (snapshot or volume):
        raise click.UsageError("how large? Give -s GIB, for example -s 10, or what to copy with --snapshot or --volume")
    given = {"name": tag, "size": size, "pool": pool, "snapshot": snapshot, "volume": volume}
    body = {key: value for key, value in given.items() if value is not None}
    body["visibility"] = "public" if public else "private"
    if record := session.change("POST", "/v1/volumes", body, done="volume created"):
        session.output.record(VOLUME, record)

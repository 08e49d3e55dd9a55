"""stratus-update-volume"""

from __future__ import annotations

import click

from stratus.arguments import SIZE, VOLUME_ID
from stratus.cli import Session, command
from stratus.views import VOLUME

EXAMPLES = """
  Another name:
    stratus-update-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff -t run-2024
  Grow it to 20 GiB, attached or not (then grow the file system in it, from the machine):
    stratus-update-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff -s 20
  No longer for everyone:
    stratus-update-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --private
"""


@command(EXAMPLES, changes=True)
@click.argument("volume", type=VOLUME_ID, metavar="ID")
@click.option("-t", "--tag", help="A new name.")
@click.option("--public/--private", default=None, help="Let everyone see, copy and read it, or no longer.")
@click.option("-s", "--size", type=SIZE, metavar="GIB", help="Grow to this size; a volume never shrinks.")
def main(session: Session, volume: str, tag: str | None, public: bool | None, size: int | None) -> None:
    """Rename a volume, publish it, or make it larger."""
    visibility = None if public is None else "public" if public else "private"
    given = {"name": tag, "visibility": visibility, "size": size}
    body = {key: value for key, value in given.items() if value is not None}
    if not body:
        raise click.UsageError("nothing to change: give -t, --public, --private or -s")
    if record := session.change("PATCH", f"/v1/volumes/{volume}", body, done="volume updated"):
        session.output.record(VOLUME, record)

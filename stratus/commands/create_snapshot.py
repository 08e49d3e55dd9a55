"""stratus-create-snapshot"""

from __future__ import annotations

import click

from stratus.arguments import VOLUME_ID
from stratus.cli import Session, command
from stratus.views import SNAPSHOT

EXAMPLES = """
  Before an experiment:
    stratus-create-snapshot 6f9619ff-8b86-4d01-b42d-00cf4fc964ff -t before-upgrade
  Back to it:
    stratus-revert-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --snapshot ID
"""


@command(EXAMPLES, changes=True)
@click.argument("volume", type=VOLUME_ID, metavar="VOLUME")
@click.option("-t", "--tag", help="A name for people.")
def main(session: Session, volume: str, tag: str | None) -> None:
    """Keep a volume as it is now.

    Of an attached volume, it is what a machine would find after a power cut. Pools that cannot do that ask you to
    detach first.
    """
    body = {} if tag is None else {"name": tag}
    if record := session.change("POST", f"/v1/volumes/{volume}/snapshots", body, done="snapshot created"):
        session.output.record(SNAPSHOT, record)

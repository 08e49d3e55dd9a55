"""stratus-revert-volume"""

from __future__ import annotations

import click

from stratus.arguments import SNAPSHOT_ID, VOLUME_ID
from stratus.cli import Session, command
from stratus.views import VOLUME

EXAMPLES = """
  Which snapshots there are:
    stratus-describe-snapshots --volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
  Back to one of them:
    stratus-revert-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --snapshot 0b0e2b7e-41a4-4c2a-9d52-5f0d4a3c0f11
"""


@command(EXAMPLES, changes=True)
@click.argument("volume", type=VOLUME_ID, metavar="ID")
@click.option("--snapshot", type=SNAPSHOT_ID, metavar="ID", required=True, help="One of this volume's snapshots.")
def main(session: Session, volume: str, snapshot: str) -> None:
    """Make a detached volume what it was when a snapshot of it was taken.

    What was written since is lost. Take a snapshot of that first if you may want it back.
    """
    path = f"/v1/volumes/{volume}/revert"
    if record := session.change("POST", path, {"snapshot": snapshot}, done="volume reverted"):
        session.output.record(VOLUME, record)

"""stratus-delete-snapshot"""

from __future__ import annotations

import click

from stratus.arguments import SNAPSHOT_ID
from stratus.cli import Session, command

EXAMPLES = """
  Every snapshot of a volume:
    stratus-describe-snapshots --volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --format csv \\
      | sed 1d | cut -d, -f1 | xargs -r stratus-delete-snapshot
"""


@command(EXAMPLES, changes=True)
@click.argument("ids", type=SNAPSHOT_ID, nargs=-1, required=True, metavar="ID...")
def main(session: Session, ids: tuple[str, ...]) -> None:
    """Delete snapshots, for good. Their volumes stay as they are."""
    session.each(ids, lambda one: session.change("DELETE", f"/v1/snapshots/{one}", done=f"snapshot {one} deleted"))

"""stratus-delete-volume"""

from __future__ import annotations

import click

from stratus.arguments import VOLUME_ID
from stratus.cli import Session, command

EXAMPLES = """
  What would go, and what stands in the way:
    stratus-delete-volume --dry-run 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
  Every volume named scratch-…:
    stratus-describe-volumes -f tag:^scratch- --format csv | sed 1d | cut -d, -f1 | xargs -r stratus-delete-volume
"""


@command(EXAMPLES, changes=True)
@click.argument("ids", type=VOLUME_ID, nargs=-1, required=True, metavar="ID...")
def main(session: Session, ids: tuple[str, ...]) -> None:
    """Delete volumes and the data in them, for good.

    An attached volume is refused: detach it first. What is refused for one volume does not keep the others.
    """
    session.each(ids, lambda one: session.change("DELETE", f"/v1/volumes/{one}", done=f"volume {one} deleted"))

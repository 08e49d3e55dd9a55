"""stratus-share-volume"""

from __future__ import annotations

import click

from stratus.arguments import VOLUME_ID
from stratus.cli import Session, command
from stratus.views import SHARE

EXAMPLES = """
  Let the group "climate" read it:
    stratus-share-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --group climate
  Let them write as well:
    stratus-share-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --group climate --mode rw
  No longer:
    stratus-share-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --group climate --remove
"""


@command(EXAMPLES, changes=True)
@click.argument("volume", type=VOLUME_ID, metavar="ID")
@click.option("--group", help="The group to share with.")
@click.option("--mode", type=click.Choice(["ro", "rw"]), help="What its members may do: read (ro, default) or write.")
@click.option("--remove", is_flag=True, help="Share with this group no longer.")
@click.option("--list", "show", is_flag=True, help="Show with whom it is shared, and change nothing.")
def main(session: Session, volume: str, group: str | None, mode: str | None, remove: bool, show: bool) -> None:
    """Share a volume with a group of users, or stop it, or show with whom it is shared."""
    path = f"/v1/volumes/{volume}/shares"
    if show:
        if group or mode or remove:
            raise click.UsageError("--list goes alone")
        session.output.records(SHARE, session.client.get(path)["items"])
        return
    if not group:
        raise click.UsageError("with whom? Give --group NAME, or --list to see with whom it is shared")
    if remove:
        if mode:
            raise click.UsageError("--remove takes no --mode")
        session.change("DELETE", path, params={"group": group}, done=f"no longer shared with {group}")
    elif shares := session.change("PUT", path, {"group": group, "mode": mode or "ro"}, done=f"shared with {group}"):
        session.output.records(SHARE, shares["items"])

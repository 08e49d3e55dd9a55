"""stratus-detach-volume"""

from __future__ import annotations

import click

from stratus.arguments import VOLUME_ID
from stratus.cli import Session, command
from stratus.errors import Conflict, Document, Exit, NotFound, Problem
from stratus.views import live

EXAMPLES = """
  The volume's only attachment:
    stratus-detach-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
  One of several readers, by the id of the attachment:
    stratus-describe-attachments --volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
    stratus-detach-volume 0b0e2b7e-41a4-4c2a-9d52-5f0d4a3c0f11
"""


@command(EXAMPLES, changes=True)
@click.argument("one", type=VOLUME_ID, metavar="ID")
@click.option("--force", is_flag=True, help="Without the node's consent (admin). Writes under way still end first.")
@click.option("--all", "every", is_flag=True, help="End every attachment of the volume.")
def main(session: Session, one: str, force: bool, every: bool) -> None:
    """Detach a volume: ID is the volume's, or an attachment's.

    Unmount it in the machine first: what the machine has not written by then is lost to the volume.
    """
    params = {"force": "true"} if force else {}

    def detach(attachment: str) -> None:
        done = f"attachment {attachment} ended"
        session.change("DELETE", f"/v1/attachments/{attachment}", params=params, done=done)

    session.each(_attachments(session, one, every), detach)


def _attachments(session: Session, one: str, every: bool) -> list[str]:
    """The ids of the attachments meant by `one`, the id of a volume or of an attachment."""
    volume = _find(session, f"/v1/volumes/{one}")
    if volume is None:
        if _find(session, f"/v1/attachments/{one}") is None:
            raise NotFound(f"there is no volume and no attachment {one}", "list them with: stratus-describe-volumes")
        return [one]
    ids = [each["id"] for each in live(volume["attachments"])]
    if not ids:
        raise Conflict(f"volume {one} is not attached")
    if len(ids) > 1 and not every:
        raise Conflict(f"volume {one} has {len(ids)} attachments: {', '.join(ids)}", "name one of them, or give --all")
    return ids


def _find(session: Session, path: str) -> Document | None:
    try:
        return session.client.get(path)
    except Problem as problem:
        if problem.exit_code != Exit.NOT_FOUND:
            raise
        return None

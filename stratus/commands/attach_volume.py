"""stratus-attach-volume"""

from __future__ import annotations

import socket
from pathlib import Path

import click

from stratus.arguments import INITIATOR, VOLUME_ID
from stratus.cli import Session, command
from stratus.connection import ConnectionFile, connection_options, show_connection
from stratus.errors import Document

EXAMPLES = """
  To this machine, with what iscsiadm or qemu needs in a file that only you can read:
    stratus-attach-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff \\
      --initiator iqn.2004-10.org.example:host7 --connection-file volume.json
  To read from many machines at once:
    stratus-attach-volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff \\
      --initiator iqn.2004-10.org.example:host7 --mode ro
"""


@command(EXAMPLES, changes=True)
@click.argument("volume", type=VOLUME_ID, metavar="ID")
@click.option("--initiator", type=INITIATOR, help="The initiator that may log in: a direct attachment.")
@click.option("-i", "--instance", help="The machine that will use it.  [default: direct]")
@click.option("--node", help="The host the initiator runs on.  [default: this host's name]")
@click.option("--mode", type=click.Choice(["rw", "ro"]), default="rw", help="One may write (rw, default) or many read.")
@click.option("--mutual-chap", is_flag=True, help="Have the target prove itself to the initiator as well.")
@connection_options
def main(
    session: Session,
    volume: str,
    initiator: str | None,
    instance: str | None,
    node: str | None,
    mode: str,
    mutual_chap: bool,
    connection_file: Path | None,
    show_secret: bool,
) -> None:
    """Attach a volume to an initiator of your own, over iSCSI.

    What the initiator needs to log in is the connection: portal, target, LUN, user name and password. The password is
    made for this attachment and ends with it. A table leaves it out unless --show-secret is given; JSON has it.
    """
    if initiator is None:
        raise click.UsageError(
            "an initiator is needed: --initiator IQN. That of a Linux machine stands in /etc/iscsi/initiatorname.iscsi"
        )
    body = {
        "instance_id": instance or "direct",
        "node": node or socket.gethostname(),
        "initiator": initiator,
        "mode": mode,
        "mutual_chap": mutual_chap,
    }
    # Opened first: an attachment whose connection cannot be kept would have to be undone.
    with ConnectionFile(connection_file) as file:
        record = session.change("POST", f"/v1/volumes/{volume}/attachments", body, done="volume attached")
        if record:
            connection = _connection(session, record)
            file.save(connection)
            show_connection(session.output, record, connection, show_secret)


def _connection(session: Session, attachment: Document) -> Document:
    # An answer that was repeated, or that came by way of an operation, holds no secret.
    at_once: Document | None = attachment.get("connection")
    return at_once or session.client.get(f"/v1/attachments/{attachment['id']}/connection")

"""stratus-describe-attachments"""

from __future__ import annotations

from pathlib import Path

import click

from stratus.arguments import ATTACHMENT_ID, VOLUME_ID
from stratus.cli import Session, command
from stratus.connection import ConnectionFile, connection_options, show_connection
from stratus.views import ATTACHMENT, live

EXAMPLES = """
  Who holds a volume:
    stratus-describe-attachments --volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
  The connection once more, after a reboot of the machine:
    stratus-describe-attachments 0b0e2b7e-41a4-4c2a-9d52-5f0d4a3c0f11 --connection --show-secret
"""


@command(EXAMPLES)
@click.argument("ids", type=ATTACHMENT_ID, nargs=-1, metavar="[ID]...")
@click.option("--volume", type=VOLUME_ID, metavar="ID", help="Only those of this volume.")
@click.option("--connection", is_flag=True, help="Show what the initiator needs to log in; for one ID, your own.")
@connection_options
def main(
    session: Session,
    ids: tuple[str, ...],
    volume: str | None,
    connection: bool,
    connection_file: Path | None,
    show_secret: bool,
) -> None:
    """Show attachments: those that last, or those with these ids even if they have ended."""
    if not (connection or connection_file or show_secret):
        session.show_each(
            ATTACHMENT,
            "/v1/attachments",
            ids,
            lambda record: volume in (None, record["volume_id"]) and bool(ids or live([record])),
            params={"volume": volume},
        )
        return
    if len(ids) != 1:
        raise click.UsageError("a connection is that of one attachment: give one ID")
    with ConnectionFile(connection_file) as file:
        record = session.client.get(f"/v1/attachments/{ids[0]}")
        found = session.client.get(f"/v1/attachments/{ids[0]}/connection")
        file.save(found)
        show_connection(session.output, record, found, show_secret)

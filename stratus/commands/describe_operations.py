"""stratus-describe-operations"""

from __future__ import annotations

import click

from stratus.arguments import OPERATION_ID
from stratus.cli import Session, command
from stratus.views import OPERATION

EXAMPLES = """
  What is going on:
    stratus-describe-operations
  Start long work, do something else, then wait for it; the exit code says how it ended:
    operation=$(stratus-create-volume --volume ID --no-wait --format csv | sed 1d | cut -d, -f1)
    stratus-describe-operations --wait $operation
"""


@command(EXAMPLES)
@click.argument("ids", type=OPERATION_ID, nargs=-1, metavar="[ID]...")
@click.option("--wait", is_flag=True, help="Wait until those with these ids are done.")
@click.option("--all", "ended", is_flag=True, help="Those that have ended as well.")
def main(session: Session, ids: tuple[str, ...], wait: bool, ended: bool) -> None:
    """Show long work: what is queued or running, or the operations with these ids."""
    if wait and not ids:
        raise click.UsageError("--wait needs the ids of the operations to wait for")
    if wait:
        session.each(ids, lambda one: session.finish(session.client.get(f"/v1/operations/{one}")))
    session.show_each(
        OPERATION,
        "/v1/operations",
        ids,
        lambda record: bool(ids) or ended or record["state"] in ("queued", "running"),
    )

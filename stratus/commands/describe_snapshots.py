"""stratus-describe-snapshots"""

from __future__ import annotations

import click

from stratus.arguments import SNAPSHOT_FILTER, SNAPSHOT_ID, VOLUME_ID, Filter
from stratus.cli import Session, command
from stratus.views import SNAPSHOT

EXAMPLES = """
  Every snapshot of a volume:
    stratus-describe-snapshots --volume 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
  Those whose name starts with before-:
    stratus-describe-snapshots -f tag:^before-
"""


@command(EXAMPLES)
@click.argument("ids", type=SNAPSHOT_ID, nargs=-1, metavar="[ID]...")
@click.option("--volume", type=VOLUME_ID, metavar="ID", help="Only those of this volume.")
@click.option(
    "-f",
    "--filter",
    "filters",
    type=SNAPSHOT_FILTER,
    multiple=True,
    help="Only those whose field matches; all filters must. Fields: " + ", ".join(SNAPSHOT_FILTER.fields),
)
def main(session: Session, ids: tuple[str, ...], volume: str | None, filters: tuple[Filter, ...]) -> None:
    """Show snapshots: all that you may see, or those with these ids."""

    def wanted(record: dict[str, object]) -> bool:
        return volume in (None, record["volume_id"]) and all(each.passes(record) for each in filters)

    session.show_each(SNAPSHOT, "/v1/snapshots", ids, wanted, params={"volume": volume})

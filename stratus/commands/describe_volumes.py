"""stratus-describe-volumes"""

from __future__ import annotations

import click

from stratus.arguments import VOLUME_FILTER, VOLUME_ID, Filter
from stratus.cli import Session, command
from stratus.views import VOLUME

EXAMPLES = """
  Every volume you may see:
    stratus-describe-volumes
  Those named run-1, run-2, … that are free:
    stratus-describe-volumes -f tag:^run- -f state:available
  Your share of the pool, in bytes, for a spreadsheet:
    stratus-describe-volumes -f owner:^alice$ --format csv > volumes.csv
"""


@command(EXAMPLES)
@click.argument("ids", type=VOLUME_ID, nargs=-1, metavar="[ID]...")
@click.option(
    "-f",
    "--filter",
    "filters",
    type=VOLUME_FILTER,
    multiple=True,
    help="Only those whose field matches; all filters must. Fields: " + ", ".join(VOLUME_FILTER.fields),
)
def main(session: Session, ids: tuple[str, ...], filters: tuple[Filter, ...]) -> None:
    """Show volumes: all that you may see, or those with these ids.

    A regular expression matches anywhere in a field unless it is anchored with ^ and $. A size is tried as bytes and
    as the table shows it.
    """
    session.show_each(VOLUME, "/v1/volumes", ids, lambda record: all(each.passes(record) for each in filters))

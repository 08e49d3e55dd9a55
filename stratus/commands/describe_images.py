"""stratus-describe-images"""

from __future__ import annotations

import click

from stratus.arguments import IMAGE_FILTER, IMAGE_ID, Filter
from stratus.cli import Session, command
from stratus.views import IMAGE

EXAMPLES = """
  Every image you may see:
    stratus-describe-images
  Those of Debian that can be used:
    stratus-describe-images -f os:(?i)debian -f state:available
  All that is known of one, its reference, endorser and digests:
    stratus-describe-images 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --format json
"""


@command(EXAMPLES)
@click.argument("ids", type=IMAGE_ID, nargs=-1, metavar="[ID]...")
@click.option(
    "-f",
    "--filter",
    "filters",
    type=IMAGE_FILTER,
    multiple=True,
    help="Only those whose field matches; all filters must. Fields: " + ", ".join(IMAGE_FILTER.fields),
)
def main(session: Session, ids: tuple[str, ...], filters: tuple[Filter, ...]) -> None:
    """Show images: all that you may see, or those with these ids.

    SIZE is that of a machine's root disk, FILE_SIZE what the image takes as a file. A reference is told to those who
    asked for it.
    """
    session.show_each(IMAGE, "/v1/images", ids, lambda record: all(each.passes(record) for each in filters))

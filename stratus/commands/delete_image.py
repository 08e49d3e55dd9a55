"""stratus-delete-image"""

from __future__ import annotations

import click

from stratus.arguments import IMAGE_ID
from stratus.cli import Session, command

EXAMPLES = """
  What would go, and what stands in the way:
    stratus-delete-image --dry-run 6f9619ff-8b86-4d01-b42d-00cf4fc964ff
  Every image named test-…:
    stratus-describe-images -f tag:^test- --format csv | sed 1d | cut -d, -f1 | xargs -r stratus-delete-image
"""


@command(EXAMPLES, changes=True)
@click.argument("ids", type=IMAGE_ID, nargs=-1, required=True, metavar="ID...")
def main(session: Session, ids: tuple[str, ...]) -> None:
    """Delete images. What a machine, a volume or a pin still needs is refused.

    An image that came by a reference can be had again by it; one that was uploaded or made from a volume is gone for
    good. What is refused for one image does not keep the others.
    """
    session.each(ids, lambda one: session.change("DELETE", f"/v1/images/{one}", done=f"image {one} deleted"))

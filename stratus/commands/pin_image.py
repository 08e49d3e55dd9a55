"""stratus-pin-image"""

from __future__ import annotations

import click

from stratus.arguments import IMAGE_ID
from stratus.cli import Session, command
from stratus.views import LISTED_PIN, PIN

EXAMPLES = """
  Keep an image in the cache, used or not:
    stratus-pin-image 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --name golden
  Who or what keeps it there:
    stratus-pin-image 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --list
  No longer:
    stratus-pin-image 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --name golden --remove
"""


@command(EXAMPLES, changes=True)
@click.argument("image", type=IMAGE_ID, metavar="ID")
@click.option("--name", default="admin", metavar="NAME", help="What to call the pin.  [default: admin]")
@click.option("--remove", is_flag=True, help="Take the pin away.")
@click.option("--list", "show", is_flag=True, help="Show the image's pins, and change nothing.")
def main(session: Session, image: str, name: str, remove: bool, show: bool) -> None:
    """Keep an image in the cache (admin): it is neither evicted nor deleted while it has a pin.

    Machines pin what they run on by themselves.
    """
    if show and remove:
        raise click.UsageError("--list goes alone")
    if show:
        session.output.records(LISTED_PIN, session.client.get(f"/v1/images/{image}/pins")["items"])
    elif remove:
        session.change("DELETE", pin_path(image, name), done=f"pin {name} removed")
    elif pin := session.change("PUT", pin_path(image, name), done=f"pin {name} set"):
        session.output.record(PIN, pin)


def pin_path(image: str, name: str) -> str:
    """Where the pin `name` of an image is."""
    from urllib.parse import quote

    return f"/v1/images/{image}/pins/{quote(name, safe='')}"
